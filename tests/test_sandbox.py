"""What a program in the sandbox cannot do, one attempt each, and how its end is told."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qquant.errors import UsageError
from qquant.tasks import confined, sandbox
from qquant.tasks.sandbox import Limits, Outcome, enforced, run_untrusted

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the sandbox is Linux's")

ROOT = Path(__file__).parent.parent
SHORT = Limits(processor_seconds=1, wall_seconds=20.0)
HEADERS = {
    "x86_64": Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h"),
    "aarch64": Path("/usr/include/asm-generic/unistd.h"),
}

FORBIDDEN = {
    "opening a socket": "import socket\nsocket.socket()",
    "a socket pair": "import socket\nsocket.socketpair()",
    "forking": "import os\nos.fork()",
    "starting a program": "import subprocess\nsubprocess.run(['/bin/true'])",
    "becoming another program": "import os\nos.execv('/bin/true', ['true'])",
    "killing its parent": "import os, signal\nos.kill(os.getppid(), signal.SIGKILL)",
    "signalling its group": "import os, signal\nos.killpg(0, signal.SIGTERM)",
    "tracing": "import ctypes\nassert ctypes.CDLL(None).ptrace(0, 0, 0, 0) == 0\n",
    "removing a file": "import os\nos.unlink('/tmp/there-is-no-such-file')",
    "making a folder": "import os\nos.mkdir('/tmp/there-is-no-such-folder')",
    "changing rights": "import os\nos.chmod('/tmp', 0o777)",
    "raising its limits": "import resource\nresource.setrlimit(resource.RLIMIT_CPU, (99, 99))",
    "typing into a terminal": "import fcntl\nfcntl.ioctl(0, 0x5412, b'x')",
    "having signals sent": "import fcntl, os\nfcntl.fcntl(0, fcntl.F_SETOWN, os.getppid())",
    "memory that is a file": "import os\nos.memfd_create('name')",
}
ENDS = {
    "reaches its end": ("x = 1", Outcome("passed", "")),
    "reads a file": ("assert open('/proc/self/stat').read()", Outcome("passed", "")),
    "imports": ("import math, random, re, collections, itertools, datetime, hashlib, typing", Outcome("passed", "")),
    "fails an assertion": ("assert 1 == 2", Outcome("failed", "AssertionError")),
    "is no Python": ("def f(:", Outcome("failed", "SyntaxError")),
    "holds a zero byte": ("x = '\0'", Outcome("failed", "SyntaxError")),
    "leaves early by sys.exit": ("import sys\nsys.exit(0)", Outcome("failed", "SystemExit")),
    "leaves early by os._exit": ("import os\nos._exit(0)", Outcome("failed", "ended before its last line")),
    "asks for input": ("input()", Outcome("failed", "EOFError")),
    "recurses without end": ("def f(): f()\nf()", Outcome("failed", "RecursionError")),
    "breaks the interpreter": ("import ctypes\nctypes.string_at(0)", Outcome("crashed", "SIGSEGV")),
    "starts a thread": ("import threading\nthreading.Thread(target=id).start()", Outcome("failed", "RuntimeError")),
    "closes everything": ("import os\nos.closerange(0, 64)", Outcome("failed", "ended before its last line")),
    "takes much memory at once": ("x = bytearray(1 << 40)", Outcome("out of memory", "more than 536870912 bytes")),
    "floods the verdict": (
        "import os\nwhile True: os.write(3, b'x' * 65536)",
        Outcome("failed", "wrote where only the verdict goes"),
    ),
    "raises with a text of its own": (
        "raise type('Secret' + 'Text', (Exception,), {})('secret')",
        Outcome("failed", "an exception of its own"),
    ),
}


def alone(code: str) -> subprocess.CompletedProcess[str]:
    """Run code of ours, unconfined, where it may call confined.py's parts."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)


@pytest.mark.parametrize(("code", "outcome"), list(ENDS.values()), ids=list(ENDS))
def test_the_end_of_a_program_is_told_when_it(code: str, outcome: Outcome) -> None:
    assert run_untrusted(code) == outcome


@pytest.mark.parametrize("code", list(FORBIDDEN.values()), ids=list(FORBIDDEN))
def test_refused_by_the_kernel_is(code: str) -> None:
    outcome = run_untrusted(code)
    # ptrace was called past Python, so it is the program's own assertion that tells.
    assert outcome == Outcome("failed", "AssertionError" if "ptrace" in code else "PermissionError")


def test_the_filter_alone_refuses_all_of_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """On a system without namespaces and Landlock, root included, nothing more is possible."""
    script = tmp_path / "confined.py"
    text = Path(confined.__file__).read_text(encoding="utf-8")
    for wall in ("_enter_namespace", "_enter_landlock"):
        assert f"if {wall}()" in text
        text = text.replace(f"if {wall}()", "if False")
    script.write_text(text, encoding="utf-8")
    monkeypatch.setattr(sandbox, "_CONFINED", script)
    assert enforced() == sandbox.Enforced(namespace=False, landlock=False)
    write = f"open({str(tmp_path / 'file')!r}, 'w')"
    assert {run_untrusted(code).status for code in (write, *FORBIDDEN.values())} == {"failed"}
    assert not (tmp_path / "file").exists()
    nobody = "assert open('/proc/self/status').read().count('Cap') == 5\n" + "".join(
        f"assert '{kind}:\\t{0:016x}' in open('/proc/self/status').read()\n" for kind in ("CapEff", "CapPrm", "CapInh")
    )
    assert run_untrusted(nobody) == Outcome(
        "passed", ""
    )  # with CAP_SYS_ADMIN, madvise could take pages from the machine


def test_a_loop_without_end_is_ended_by_its_processor_time() -> None:
    assert run_untrusted("while True: pass", limits=SHORT) == Outcome("timed out", "after 1 processor seconds")


def test_a_program_that_only_waits_is_ended_by_the_clock() -> None:
    limits = Limits(wall_seconds=0.5)
    begun = time.monotonic()
    outcome = run_untrusted("import time\ntime.sleep(60)", limits=limits)
    assert outcome == Outcome("timed out", "after 0.5 seconds")
    assert time.monotonic() - begun < 30


def test_a_program_that_ignores_its_time_limit_is_killed() -> None:
    code = "import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass"
    assert run_untrusted(code, limits=SHORT) == Outcome("crashed", "SIGKILL")


def test_memory_that_grows_is_ended_at_the_limit() -> None:
    limits = Limits(memory_bytes=1 << 27)
    outcome = run_untrusted("x = []\nwhile True: x.append(bytes(1 << 20))", limits=limits)
    assert outcome == Outcome("out of memory", "more than 134217728 bytes")


def test_a_program_that_prints_without_end_fills_nothing() -> None:
    code = "import sys\nfor _ in range(2000): print('x' * 100_000); sys.stderr.write('x' * 100_000)"
    assert run_untrusted(code).status == "passed"


@pytest.mark.parametrize("mode", ["w", "a", "x", "r+"])
def test_no_file_is_written(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "file.txt"
    if mode == "r+":
        path.write_text("as it was")
    assert run_untrusted(f"open({str(path)!r}, {mode!r})") == Outcome("failed", "PermissionError")
    assert path.exists() == (mode == "r+")


def test_printing_a_verdict_is_no_verdict() -> None:
    code = (
        "import os\n"
        "print('passed')\n"
        "for descriptor in range(8):\n"
        "  try: os.write(descriptor, b'\\n0 passed\\n')\n"
        "  except OSError: pass\n"
        "os._exit(0)\n"
    )
    assert run_untrusted(code).status == "failed"


def test_a_verdict_is_told_in_our_words_only() -> None:
    """The name of an exception goes into reports: a program could write there what it has read."""
    code = "class KeyError(Exception):\n  pass\nKeyError.__name__ = 'root:x:0:0 passed'\nraise KeyError"
    assert run_untrusted(code) == Outcome("failed", "an exception of its own")


def test_nothing_of_ours_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_TOKEN", "secret")
    code = (
        "import os, sys\n"
        "assert not {'SECRET_TOKEN', 'HOME', 'PATH'} & set(os.environ)\n"
        "assert os.getcwd() == '/' and len(sys.argv) == 1\n"
        "assert not [place for place in sys.path if 'site-packages' in place or 'qquant' in place]\n"
        "for name in ('qquant', 'torch', 'sandbox', 'items'):\n"
        "  try: __import__(name)\n"
        "  except ImportError: continue\n"
        "  assert False, name\n"
    )
    assert run_untrusted(code).status == "passed"


def test_the_order_of_a_set_does_not_depend_on_the_run() -> None:
    """Hashes of text are fixed, so that one program has one verdict."""
    environment = {**os.environ, "PYTHONHASHSEED": "0"}
    seen = subprocess.run(
        [sys.executable, "-c", "print(hash('a'))"], capture_output=True, text=True, check=True, env=environment
    )
    assert run_untrusted(f"assert hash('a') == {seen.stdout}").status == "passed"


def test_a_module_that_looks_itself_up_finds_itself() -> None:
    code = (
        "import sys\n"
        "from dataclasses import dataclass\n"
        "@dataclass\n"
        "class A:\n"
        "  x: int\n"
        "assert sys.modules[A.__module__].A(1).x\n"
    )
    assert run_untrusted(code).status == "passed"


def test_the_program_is_not_compiled_under_our_own_future() -> None:
    """A statement ``from __future__`` of confined.py must not change what annotations mean in the program."""
    assert run_untrusted("def f(x: int): ...\nassert f.__annotations__['x'] is int").status == "passed"


def test_no_program_outlives_us() -> None:
    code = "from qquant.tasks.sandbox import *; run_untrusted('import time; time.sleep(100)')"
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children")
    try:
        while not (found := children.read_text().split()):
            time.sleep(0.01)
        child = Path("/proc", found[0])
        # Confined once a filter is on; before that, writing "ready" would end it.
        while "Seccomp:\t2" not in (child / "status").read_text():
            time.sleep(0.01)
    finally:
        parent.send_signal(signal.SIGKILL)
        parent.wait()
    deadline = time.monotonic() + 20
    while child.exists() and (child / "stat").read_text().rpartition(")")[2].split()[0] != "Z":
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_machine_without_a_filter_runs_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    script = tmp_path / "confined.py"
    script.write_text("print('refused the kernel takes no filter')\n")
    monkeypatch.setattr(sandbox, "_CONFINED", script)
    with pytest.raises(UsageError, match=r"the kernel takes no filter.*container or virtual machine"):
        run_untrusted("pass")
    with pytest.raises(UsageError, match="confined"):
        enforced()


def test_a_python_that_does_not_start_is_a_refusal(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sandbox, "_CONFINED", tmp_path / "missing.py")
    with pytest.raises(UsageError, match="exit code 2 before it was confined"):
        run_untrusted("pass")


def test_another_system_runs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qquant.tasks.sandbox.sys.platform", "darwin")
    with pytest.raises(UsageError, match="no sandbox for darwin"):
        run_untrusted("pass")


def test_another_processor_runs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qquant.tasks.confined.platform.machine", lambda: "s390x")
    with pytest.raises(OSError, match="no filter of system calls is written for linux on s390x"):
        confined.confine(1, 1 << 29)


@pytest.mark.parametrize(
    "limits",
    [{"processor_seconds": 0}, {"wall_seconds": 0.0}, {"memory_bytes": 1 << 20}],
    ids=lambda case: next(iter(case)),
)
def test_limits_that_nothing_could_meet_are_refused(limits: dict[str, int]) -> None:
    with pytest.raises(UsageError, match="at least 1 processor second"):
        Limits(**limits)


@pytest.mark.parametrize("machine", list(HEADERS))
def test_the_numbers_of_system_calls_are_the_kernels(machine: str) -> None:
    if not HEADERS[machine].exists():
        pytest.skip("the kernel's headers are not installed")
    found = re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)", HEADERS[machine].read_text())
    kernel = {name: int(number) for name, number in found}
    for table in (confined._ALLOWED, confined._OPENAT, confined._FCNTL):
        for name, number in confined.numbers(table[machine]).items():
            assert kernel[name] == number, name


@pytest.mark.parametrize("machine", list(HEADERS))
def test_a_filter_has_every_jump_inside(machine: str) -> None:
    program = confined.filter_program(machine)
    size = len(program) // 8
    for at in range(size):
        code, then, otherwise = (
            int.from_bytes(program[8 * at : 8 * at + 2], "little"),
            *program[8 * at + 2 : 8 * at + 4],
        )
        assert at + 1 + max(then, otherwise) < size or code == confined._RETURN


def test_what_is_said_to_be_in_force_is_what_the_kernel_gave() -> None:
    walls = enforced()
    sentence = walls.sentence()
    assert "a filter of system calls" in sentence
    assert ("Landlock" in sentence.partition(";")[0]) == walls.landlock
    assert ("namespace" in sentence.partition(";")[0]) == walls.namespace
    assert (
        "not offered by this system: a user and network namespace, Landlock"
        in sandbox.Enforced(namespace=False, landlock=False).sentence()
    )


def test_landlock_alone_keeps_files_as_they_are(tmp_path: Path) -> None:
    if not enforced().landlock:
        pytest.skip("this kernel has no Landlock")
    code = (
        "from qquant.tasks import confined\n"
        "confined._libc.prctl(38, 1, 0, 0, 0)\n"
        "assert confined._enter_landlock()\n"
        "open('/proc/self/stat').read()\n"
        f"try: open({str(tmp_path / 'file')!r}, 'w')\n"
        "except PermissionError: print('refused')\n"
    )
    assert alone(code).stdout == "refused\n"
    assert not os.listdir(tmp_path)


def test_the_namespace_alone_reaches_nobody() -> None:
    if not enforced().namespace:
        pytest.skip("this system gives no namespaces")
    with socket.create_server(("127.0.0.1", 0)) as server:
        code = (
            "import socket\n"
            "from qquant.tasks import confined\n"
            "assert confined._enter_namespace()\n"
            f"try: socket.create_connection(('127.0.0.1', {server.getsockname()[1]}))\n"
            "except OSError: print('nobody')\n"
        )
        assert alone(code).stdout == "nobody\n"
