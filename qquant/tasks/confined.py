"""The process that generated code runs in: it gives up its rights, runs one program, and says how that ended.

Started by sandbox.py as a script of its own, by path, with nothing but the standard library; nobody imports it. What it
reads on its standard input is a line ``token processor_seconds memory_bytes`` and then the program; what it writes on
its standard output is at most two lines: ``ready`` with the optional walls that stand, or ``refused`` with the reason,
then the token with the verdict. When it is confined, the program can compute, read files, and write to nothing but
``/dev/null`` and the pipe of the verdict. docs/task-code.md tells what that does and does not protect against.
"""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import signal
import struct
import sys
import types

_ARCHITECTURE = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
"""AUDIT_ARCH of linux/audit.h: numbers of system calls mean something only together with it."""
_ALLOWED = {
    "x86_64": """
        read=0 write=1 close=3 stat=4 fstat=5 lstat=6 poll=7 lseek=8 mmap=9 mprotect=10 munmap=11 brk=12
        rt_sigaction=13 rt_sigprocmask=14 rt_sigreturn=15 pread64=17 readv=19 writev=20 access=21 select=23
        sched_yield=24 mremap=25 madvise=28 dup=32 nanosleep=35 getpid=39 exit=60 uname=63 getcwd=79 readlink=89
        gettimeofday=96 getrusage=98 sysinfo=99 times=100 getuid=102 getgid=104 geteuid=107 getegid=108 getppid=110
        sigaltstack=131 gettid=186 time=201 futex=202 sched_getaffinity=204 getdents64=217 restart_syscall=219
        clock_gettime=228 clock_getres=229 clock_nanosleep=230 exit_group=231 newfstatat=262 readlinkat=267
        faccessat=269 pselect6=270 ppoll=271 getrandom=318 statx=332 faccessat2=439
    """,
    "aarch64": """
        getcwd=17 dup=23 faccessat=48 close=57 getdents64=61 lseek=62 read=63 write=64 readv=65 writev=66 pread64=67
        pselect6=72 ppoll=73 readlinkat=78 fstatat=79 fstat=80 exit=93 exit_group=94 futex=98 nanosleep=101
        clock_gettime=113 clock_getres=114 clock_nanosleep=115 sched_getaffinity=123 sched_yield=124
        restart_syscall=128 sigaltstack=132 rt_sigaction=134 rt_sigprocmask=135 rt_sigreturn=139 times=153 uname=160
        getrusage=165 gettimeofday=169 getpid=172 getppid=173 getuid=174 geteuid=175 getgid=176 getegid=177
        gettid=178 sysinfo=179 brk=214 munmap=215 mremap=216 mmap=222 mprotect=226 madvise=233 getrandom=278
        statx=291 faccessat2=439
    """,
}
"""All that a program which computes and reads needs. Not here, among others: sockets, new processes and threads,
signals to others, ioctl (it can type into a terminal), prlimit (root could raise a limit), io_uring, ptrace."""
_OPENAT = {"x86_64": "openat=257", "aarch64": "openat=56"}
_FCNTL = {"x86_64": "fcntl=72", "aarch64": "fcntl=25"}
_WRITING = 0x3 | 0x40 | 0x200 | 0x400000
"""O_ACCMODE, O_CREAT, O_TRUNC and O_TMPFILE: a flag of openat that is more than reading."""
_BEYOND_GETFL = 0xFFFFFFFF & ~3
"""Commands of fcntl after F_DUPFD, F_GETFD, F_SETFD and F_GETFL; among them is having a signal sent to anyone."""

_LOAD, _EQUAL, _ANY_BIT, _RETURN = 0x20, 0x15, 0x45, 0x06
"""Instructions of a classic BPF filter (linux/bpf_common.h) on a 32-bit word of ``struct seccomp_data``."""
_NUMBER_AT, _ARCHITECTURE_AT, _ARGUMENTS_AT = 0, 4, 16
_KILL, _DENY, _ALLOW = 0x80000000, 0x00050000 | 13, 0x7FFF0000
"""Results of a filter; denied is EACCES, which Python knows as PermissionError and survives in optional calls."""

_CLONE_NEWUSER, _CLONE_NEWNET = 0x10000000, 0x40000000
_PR_SET_PDEATHSIG, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 1, 22, 38
_CAPSET = {"x86_64": 126, "aarch64": 91}
_CAPABILITIES_3 = 0x20080522
"""_LINUX_CAPABILITY_VERSION_3 of linux/capability.h."""
_LANDLOCK_CREATE, _LANDLOCK_RESTRICT = 444, 446
_LANDLOCK_READ = 0b1100
"""LANDLOCK_ACCESS_FS_READ_FILE and READ_DIR."""
_OPEN_FILES = 64

_libc = ctypes.CDLL(None, use_errno=True)


def numbers(table: str) -> dict[str, int]:
    """System calls by name, of a table above."""
    return {name: int(number) for name, number in (entry.split("=") for entry in table.split())}


def filter_program(machine: str) -> bytes:
    """The seccomp filter of a machine: what is not allowed by name is denied, as are two calls by an argument.

    Args:
        machine: "x86_64" or "aarch64".

    Source: struct sock_filter and struct seccomp_data of the kernel's headers.
    """
    allowed = numbers(_ALLOWED[machine])
    ((_, openat),) = numbers(_OPENAT[machine]).items()
    ((_, fcntl),) = numbers(_FCNTL[machine]).items()
    # The end is: kill, deny, allow. A jump says how many instructions are skipped.
    rules = [(_EQUAL, number, "allow", None) for number in allowed.values()]
    code: list[tuple[int, int, str | int | None, str | int | None]] = [
        (_LOAD, _ARCHITECTURE_AT, None, None),
        (_EQUAL, _ARCHITECTURE[machine], None, "kill"),
        (_LOAD, _NUMBER_AT, None, None),
        *rules,
        (_EQUAL, openat, None, 2),
        (_LOAD, _ARGUMENTS_AT + 2 * 8, None, None),
        (_ANY_BIT, _WRITING, "deny", "allow"),
        (_EQUAL, fcntl, None, "deny"),
        (_LOAD, _ARGUMENTS_AT + 1 * 8, None, None),
        (_ANY_BIT, _BEYOND_GETFL, "deny", "allow"),
    ]
    ends = {"kill": len(code), "deny": len(code) + 1, "allow": len(code) + 2}

    def skipped(at: int, target: str | int | None) -> int:
        return ends[target] - at - 1 if isinstance(target, str) else target or 0

    packed = [
        struct.pack("HBBI", op, skipped(at, then), skipped(at, otherwise), value)
        for at, (op, value, then, otherwise) in enumerate(code)
    ]
    return b"".join(packed) + b"".join(struct.pack("HBBI", _RETURN, 0, 0, end) for end in (_KILL, _DENY, _ALLOW))


class _FilterProgram(ctypes.Structure):
    """Struct sock_fprog."""

    _fields_ = (("instructions", ctypes.c_ushort), ("first", ctypes.c_char_p))


def _enter_namespace() -> bool:
    """Leave for a user and a network namespace of one's own: no interface is up there, and root is nobody outside."""
    return bool(_libc.unshare(_CLONE_NEWUSER | _CLONE_NEWNET) == 0)


def _enter_landlock() -> bool:
    """Give up, by Landlock, all of the file system but reading, and from its later versions on TCP and signals."""
    version = int(_libc.syscall(_LANDLOCK_CREATE, None, ctypes.c_size_t(0), 1))
    if version < 1:
        return False
    rights = {1: 13, 2: 14, 3: 15, 4: 15}.get(version, 16)
    handled = ((1 << rights) - 1) & ~_LANDLOCK_READ
    attributes = struct.pack("QQQ", handled, 0b11, 0b11)[: 8 if version < 4 else 16 if version < 6 else 24]
    ruleset = _libc.syscall(_LANDLOCK_CREATE, attributes, ctypes.c_size_t(len(attributes)), 0)
    if ruleset < 0:
        return False
    entered = bool(_libc.syscall(_LANDLOCK_RESTRICT, ruleset, 0) == 0)
    os.close(ruleset)
    return entered


def _give_up_capabilities() -> None:
    """Be nobody special: root's rights over files, devices and memory pages are not needed to compute.

    Nothing is said where the kernel refuses, for a process without any right to give up is what is wanted.
    """
    header = struct.pack("Ii", _CAPABILITIES_3, 0)
    _libc.syscall(_CAPSET[platform.machine()], header, bytes(2 * 3 * 4))  # effective, permitted, inheritable: none


def _limit(processor_seconds: int, memory_bytes: int) -> None:
    """Set the limits that the kernel counts itself."""
    for kind, most in (
        (resource.RLIMIT_AS, memory_bytes),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NPROC, 0),
        (resource.RLIMIT_NOFILE, _OPEN_FILES),
    ):
        resource.setrlimit(kind, (most, most))
    # The first ends the program by SIGXCPU, which says why; the second ends one that ignores that signal.
    resource.setrlimit(resource.RLIMIT_CPU, (processor_seconds, processor_seconds + 1))


def confine(processor_seconds: int, memory_bytes: int) -> str:
    """Give up every right that a computing program does not need, for good.

    Returns:
        The walls that stand beside the filter of system calls: "namespace" and "landlock", as far as the kernel has
        them, separated by a space.

    Raises:
        OSError: there is no filter for this machine, or the kernel takes none. Without it nothing may be run.
    """
    machine = platform.machine()
    if sys.platform != "linux" or machine not in _ALLOWED:
        raise OSError(f"no filter of system calls is written for {sys.platform} on {machine}")
    walls = ["namespace"] if _enter_namespace() else []
    # After the namespace, which would clear it. Should the parent have gone before, writing "ready" fails.
    _libc.prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    if _libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "the kernel does not let a process give up new privileges")
    if _enter_landlock():
        walls.append("landlock")
    _give_up_capabilities()
    instructions = filter_program(machine)
    _limit(processor_seconds, memory_bytes)
    program = _FilterProgram(len(instructions) // 8, instructions)
    if _libc.prctl(_PR_SET_SECCOMP, 2, ctypes.byref(program), 0, 0):
        raise OSError(ctypes.get_errno(), "the kernel takes no filter of system calls (seccomp)")
    return " ".join(walls)


def verdict(program: str) -> str:
    """Run a program to its end as a module named "program", and say how it ended.

    Returns:
        "passed"; "out of memory"; or "failed" and the name of the exception.
    """
    module = types.ModuleType("program")
    sys.modules[module.__name__] = module
    try:
        exec(compile(program, "<program>", "exec", dont_inherit=True), module.__dict__)
    except MemoryError:
        return "out of memory"
    except BaseException as stopped:  # SystemExit too: a program that leaves early has not passed
        return f"failed {type(stopped).__name__}"
    return "passed"


def main() -> None:
    """Read, confine, run, tell."""
    with open(0, "rb", closefd=False) as stream:
        head, program = stream.readline().split(), stream.read().decode()
    token, processor_seconds, memory_bytes = head[0].decode(), int(head[1]), int(head[2])
    # The program keeps nothing that it could write to: not our input, not what its parent reads as our output.
    told = os.dup(1)
    write, leave = os.write, os._exit
    nothing = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(nothing, descriptor)
    os.close(nothing)
    try:
        walls = confine(processor_seconds, memory_bytes)
    except OSError as missing:
        write(told, f"refused {missing.strerror or missing}\n".encode())
        leave(0)
    write(told, f"ready {walls}\n".encode())
    write(told, f"{token} {verdict(program)}\n".encode())
    leave(0)


if __name__ == "__main__":
    main()
