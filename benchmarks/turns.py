"""Contestants that take turns, peers in processes of their own, and a record that is written row by row.

Times are of thread CPU: what waits behind other processes does not count, what waits for memory does. Which contestants
there are, and what is made of the times, is for bench_linear.py and bench_decode.py.
"""

from __future__ import annotations

import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

TURN_SECONDS = 2e-3
"""One turn repeats a call until it lasts about this long or more, so that short calls run with warm code."""
LEAST_TURNS, MOST_TURNS = 3, 15


@dataclass(frozen=True)
class Contestant:
    """One way of computing the same."""

    name: str
    run: Callable[[int], float]
    """Number of calls -> seconds of thread CPU time that they took together."""


def timed(call: Callable[[], object]) -> Callable[[int], float]:
    """A contestant's ``run`` out of one call in this process."""

    def run(calls: int) -> float:
        began = time.thread_time()
        for _ in range(calls):
            call()
        return time.thread_time() - began

    return run


def take_turns(contestants: Sequence[Contestant], seconds: float) -> dict[str, list[float]]:
    """Seconds of one call for every turn of each contestant; every second round goes backwards.

    Args:
        contestants: with names of their own.
        seconds: for each, after LEAST_TURNS; a call that takes longer than that has two turns and no warm-up.
    """
    found: dict[str, list[float]] = {}
    calls: dict[str, int] = {}
    for each in contestants:
        first = each.run(1)
        found[each.name], calls[each.name] = ([first] if first > seconds else []), 1
        # Slow calls, as the first ones are, must not say how many fit into a turn: one call alone runs with cold code.
        while first <= seconds and min(each.run(calls[each.name]) for _ in range(3)) < TURN_SECONDS:
            calls[each.name] *= 2
    for number in range(MOST_TURNS):
        for each in contestants if number % 2 == 0 else contestants[::-1]:
            times = found[each.name]
            spent = sum(times) * calls[each.name]
            if spent <= seconds or (len(times) < LEAST_TURNS and spent < 2 * seconds):
                times.append(each.run(calls[each.name]) / calls[each.name])
    return found


def times_as_fast(times: Sequence[float], others: Sequence[float]) -> float:
    """How many times the speed of another: the middle of what the rounds say, each of which met one machine."""
    return statistics.median(other / own for own, other in zip(times, others, strict=False))


def median_ms(times: Sequence[float]) -> float:
    """Median of seconds, in milliseconds."""
    return 1e3 * statistics.median(times)


def read_bandwidth(host: Any, seconds: float = 0.05) -> float:
    """GB/s at which one thread reads memory now."""
    found: float = host.read_bandwidth(4 * max(host.last_level_cache_bytes(), 1 << 25), seconds)
    return found


class PeerError(Exception):
    """A peer's process that cannot do what was asked; the message is its own."""


class Peer:
    """A process of another tool, asked by a line of JSON and answering with one."""

    def __init__(self, python: Path, script: str, *arguments: str, environment: Mapping[str, str]) -> None:
        self._log = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115 - until close
        command = [str(python), str(Path(__file__).with_name(script)), *arguments, "--serve"]
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log,
                text=True,
                env={**os.environ, **environment},
            )
        except OSError as error:
            raise PeerError(f"{shlex.join(command)}: {error}") from error
        self.about = self._answer()
        """What the peer says of itself: names and versions."""

    def ask(self, **request: Any) -> dict[str, Any]:
        """The answer to one request.

        Raises:
            PeerError: it answers with an error, or has ended.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # _answer says what it died of
        return self._answer()

    def close(self) -> None:
        """End the process, whose standard input is its reason to live."""
        self._process.communicate()
        self._log.close()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            self._log.seek(0)
            last = [text.strip() for text in self._log if text.strip()][-1:]
            raise PeerError(f"the peer ended: {last[0] if last else f'exit code {self._process.returncode}'}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise PeerError(answer["error"])
        return answer


class Record:
    """Rows of a JSON file, written after each one; a file that is there is taken up where it ended.

    Args:
        path: the file, or None: nothing is written.
        setting: what all rows were measured under; rows of another setting are not mixed in.
    """

    def __init__(self, path: Path | None, setting: dict[str, Any]) -> None:
        self._path, self.setting = path, setting
        self.rows: dict[str, dict[str, Any]] = {}
        if path is None or not path.exists():
            return
        known = json.loads(path.read_text(encoding="utf-8"))
        differing = [key for key, value in setting.items() if key != "commands" and known.get(key) != value]
        if differing:
            sys.exit(f"{path} was measured with another {', '.join(differing)}; give another --out or remove it")
        self.setting["commands"] = sorted({*known["commands"], *setting["commands"]})
        self.rows = known["rows"]

    def add(self, key: str, row: dict[str, Any]) -> None:
        """Keep a row; the file is whole at every moment."""
        self.rows[key] = row
        if self._path is not None:
            part = self._path.with_name(self._path.name + ".part")
            part.write_text(_text(self.setting, self.rows), encoding="utf-8")
            part.replace(self._path)


def _text(setting: dict[str, Any], rows: dict[str, Any]) -> str:
    """JSON with a line for each row, numbers to five digits."""
    lines = ",\n".join(f"  {json.dumps(key)}: {json.dumps(_short(row))}" for key, row in rows.items())
    head = json.dumps(setting, indent=1).removesuffix("\n}")
    return f'{head},\n "rows": {{\n{lines}\n }}\n}}\n'


def _short(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: _short(each) for key, each in value.items()}
    return [_short(each) for each in value] if isinstance(value, list) else value


def setting_of(script: str, host: Any, **more: Any) -> dict[str, Any]:
    """What the rows of a run have in common: command, machine, kernels, limits."""
    import torch

    import qquant
    from qquant.measure import environment
    from qquant.results import shown_command

    machine = environment(torch.device("cpu"), qquant_version=qquant.__version__)
    return {
        "commands": [shown_command(["python", f"benchmarks/{script}", *sys.argv[1:]])],
        "environment": asdict(machine),
        "kernels": torch.ops.qquant.cpu_kernel_info(),
        "last_level_cache_bytes": host.last_level_cache_bytes(),
        "large_pages_for_torch": os.environ.get("THP_MEM_ALLOC_ENABLE") == "1",
        **more,
    }
