"""What several processes do in the tests of ranks: programs that every rank runs, and how they are started.

Processes are forked off a server that has imported everything, so that a dozen of them start in a second.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import time
from collections.abc import Callable, Sequence
from functools import cache
from multiprocessing.process import BaseProcess
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from qquant import stage_solver
from qquant.config import QuantizeConfig
from qquant.errors import NumericError, QquantError
from qquant.moments import CrossMoment, Hessian, Moments
from qquant.ranks import ALONE, Ranks, joined
from qquant.stage_solver import Solved, solve_stage
from tests.method_reference import make_layer

COLUMNS, SIDE, ROWS = 300, 60, 24  # more columns than a panel of the Hessian
SAMPLES: dict[str, list[int]] = {
    "fewer than lanes": [0, 1, 2],
    "more than lanes": list(range(21)),
    "some of many": [3, 18, 19, 35],
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SIZES = (2, 3, 4)


def sums(samples: list[int], dtype: torch.dtype, ranks: Ranks) -> dict[str, Tensor]:
    """All kinds of moments of these samples, each of another length; sample 19 has no token that counts."""
    hessian, blocks = Hessian(COLUMNS), Hessian(COLUMNS, side=SIDE)
    cross = CrossMoment(ROWS, COLUMNS)
    for lane in ranks.steps(samples):
        for i in lane:
            draw = torch.Generator().manual_seed(i)
            height = 0 if i == 19 else 5 + i
            x, wanted, got = (torch.randn(height, n, generator=draw).to(dtype) for n in (COLUMNS, ROWS, ROWS))
            hessian.add(x)
            blocks.add(x)
            cross.add(wanted, got, x)
        for moment in (hessian, blocks, cross):
            moment.end_lane(ranks)
    tokens = torch.tensor([hessian.tokens, blocks.tokens, cross.tokens])
    return {
        "hessian": hessian.finish(ranks),
        "blocks": blocks.finish(ranks).contiguous(),
        "cross": cross.finish(ranks),
        "tokens": tokens,
    }


Stage = tuple[dict[str, nn.Linear], Moments | None, dict[str, QuantizeConfig | None], dict[str, Tensor]]
PIECE_ROWS = 32
HEIGHTS = {"q": 40, "k": 56, "v": 24}
METHODS: dict[str, dict[str, Any]] = {
    "gptq": {"method": "gptq", "group_size": 16},
    "best": {"method": "qep+clip-weight+signed+output+refine:1", "group_size": 16},
    "gptaq act-order": {"method": "gptaq:0.5", "group_size": 16, "desc_act": True, "sym": False},
    "rtn": {"method": "rtn", "group_size": 16},
}


def stage(method: str) -> Stage:
    """Three linears of one method; "mixed": two settings and a linear left alone; "residual": one linear alone."""
    if method == "residual":
        layer = make_layer(rows=72, columns=48, seed=5)
        config = QuantizeConfig(method="qep+residual:0.5", group_size=16)
        return {"o": linear_of(layer.weight)}, float_moments(layer.moments()), {"o": config}, {}
    layer = make_layer(rows=sum(HEIGHTS.values()), columns=48, seed=5, dead=(7,))
    parts = layer.weight.split([*HEIGHTS.values()])
    layers = {name: linear_of(part) for name, part in zip(HEIGHTS, parts, strict=True)}
    known = float_moments(layer.moments(8))
    assert known.outputs is not None
    blocks = known.outputs.split([height // 8 for height in HEIGHTS.values()])
    outputs = dict(zip(HEIGHTS, blocks, strict=True)) if method == "best" else {}
    moments = Moments(known.inputs, known.mismatch)
    if method == "mixed":
        some, others = (QuantizeConfig(method="gptq", group_size=16, bits=bits) for bits in (4, 8))
        return layers, moments, {"q": some, "k": others, "v": some}, {}
    if method == "left alone":
        return layers, moments, {"q": QuantizeConfig(method="gptq", group_size=16), "k": None, "v": None}, {}
    if method == "damaged":
        with torch.no_grad():
            layers["v"].weight[3, 3] = torch.nan
        method = "gptq"
    config = QuantizeConfig(**METHODS[method])
    return layers, moments if config.needs_data else None, dict.fromkeys(layers, config), outputs


STAGES = [*METHODS, "mixed", "left alone", "residual"]


def float_moments(moments: Moments) -> Moments:
    fields = (moments.inputs, moments.mismatch, moments.residual, moments.outputs)
    inputs, *others = (None if moment is None else moment.float().contiguous() for moment in fields)
    assert inputs is not None
    return Moments(inputs, *others)


def linear_of(weight: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight = nn.Parameter(weight.float(), requires_grad=False)
    return layer


def flat(solved: dict[str, Solved]) -> dict[str, Tensor]:
    """Everything of solved linears that may not depend on ranks."""
    found: dict[str, Tensor] = {}
    for place, (name, one) in enumerate(solved.items()):
        solution = one.solution
        assert solution.target is None
        found |= {
            f"{place} {name} {field}": getattr(solution, field) for field in ("codes", "scales", "zeros", "g_idx")
        }
        numbers = [solution.damp_percent, solution.damp_escalations, solution.dead_columns, one.relative_error]
        found[f"{place} {name} numbers"] = torch.tensor([*numbers, one.settings.bits], dtype=torch.float64)
    return {name: tensor.clone().contiguous() for name, tensor in found.items()}


def everything(ranks: Ranks) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """All that ranks do with one another: tensors and JSON values, which must be the same on every rank."""
    stage_solver.PIECE_ROWS = PIECE_ROWS
    tensors: dict[str, Tensor] = {}
    for kind, dtype in DTYPES.items():
        for name, samples in SAMPLES.items():
            tensors |= {f"{kind} {name} {key}": value for key, value in sums(samples, dtype, ranks).items()}
    for method in STAGES:
        tensors |= {f"{method} {key}": value for key, value in flat(solve_stage(*stage(method), ranks)).items()}
    return tensors, {"damaged weight": failure(lambda: solve_stage(*stage("damaged"), ranks))}


def failure(call: Callable[[], Any]) -> list[str]:
    try:
        call()
    except QquantError as error:
        return [type(error).__name__, str(error)]
    return []


def report(ranks: Ranks, folder: Path) -> None:
    """Write what ``everything`` finds on this rank, and what the small calls do."""
    tensors, values = everything(ranks)
    sent = dict(ranks.sent)
    last = ranks.size - 1
    own = {
        torch.bfloat16: torch.arange(6).reshape(2, 3).bfloat16(),
        torch.uint8: torch.arange(9, dtype=torch.uint8)[::2],
        torch.int64: torch.tensor(7),
        torch.bool: torch.tensor([True, False]),
        torch.float32: torch.zeros(0, 4),
    }
    for dtype, tensor in own.items():
        tensors[f"shared {dtype}"] = ranks.share(tensor if ranks.rank == last else None, last).clone()
    values["json"] = ranks.json({"é": [1, None, 0.1]} if ranks.writer else "not looked at")
    values["counts"] = ranks.counts(10 + ranks.rank)
    values["any"] = [ranks.any(ranks.rank == last), ranks.any(False)]

    def spoiled() -> None:
        hessian = Hessian(4)
        hessian.add(torch.full((1, 4), torch.nan if ranks.rank == last else 1.0))
        hessian.finish(ranks)

    def refused() -> None:
        with ranks.agreed():
            if ranks.rank == last:
                raise NumericError("numbers must be good, got bad ones")

    values["empty"] = failure(lambda: Hessian(4).finish(ranks) and None)
    values["spoiled"], values["refused"] = failure(spoiled), failure(refused)
    save_file(tensors, folder / f"{ranks.rank}.safetensors")
    (folder / f"{ranks.rank}.json").write_text(json.dumps({"values": values, "sent": sent}))


def lose_a_rank(ranks: Ranks, folder: Path) -> None:
    """The last rank is killed while the others wait for its part of a sum."""
    ranks.barrier()
    if ranks.rank == ranks.size - 1:
        os.kill(os.getpid(), signal.SIGKILL)
    hessian = Hessian(64)
    hessian.add(torch.ones(2, 64))
    hessian.end_lane(ranks)


def mixed_of(model: Path, out: Path | None, ranks: Ranks, kill_at: int | None = None) -> dict[str, Any]:
    """Measure a model, look at the block where the process ends if it is the first rank, and compare with another."""
    from qquant.mixed_precision import measure
    from qquant.run import Pace
    from qquant.samples import samples_from_ids

    blocks = []

    def on_progress(what: str, done: int, total: int) -> None:
        if what.startswith("measuring"):
            if done == kill_at and ranks.writer:
                os.kill(os.getpid(), signal.SIGKILL)
            blocks.append(done)

    setattr(Pace, "due", True)  # noqa: B010  mypy forbids the assignment
    samples = samples_from_ids(torch.randint(0, 300, (24, 16), generator=torch.Generator().manual_seed(0)))
    config = QuantizeConfig(method="gptq", group_size=32)
    mixed = measure(model, samples, config, sensitivity_tokens=5 * 256, out=out, ranks=ranks, on_progress=on_progress)
    found = mixed.measured_kl(model.with_name("quantized"))
    costs = [[stage.shape.names, stage.kl, stage.errors] for stage in mixed.costs]
    return {"costs": costs, "divergence": [found.kl, found.stderr, found.tokens], "blocks": blocks}


def measure_until_killed(ranks: Ranks, folder: Path) -> None:
    """Two of three blocks, as far as the first rank comes."""
    mixed_of(folder / "model", folder / "out", ranks, kill_at=2)


def measure_to_the_end(ranks: Ranks, folder: Path) -> None:
    """Write what every rank found."""
    (folder / f"{ranks.rank}.json").write_text(json.dumps(mixed_of(folder / "model", folder / "out", ranks)))


PROGRAMS = {
    "report": report,
    "lose a rank": lose_a_rank,
    "measure until killed": measure_until_killed,
    "measure to the end": measure_to_the_end,
}


def rank_process(program: str, rank: int, size: int, port: int, folder: str) -> None:
    """The body of one process."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    try:
        with joined("cpu") as (ranks, _):
            PROGRAMS[program](ranks, Path(folder))
    except QquantError as error:
        (Path(folder) / f"{rank}.error").write_text(f"{type(error).__name__}: {error}")
        raise SystemExit(error.exit_code) from error


def start(program: str, size: int, folder: Path) -> Sequence[BaseProcess]:
    """The processes of a program, one per rank."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.rank_programs", "qquant.mixed_precision"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [
        context.Process(target=rank_process, args=(program, rank, size, port, str(folder)), daemon=True)
        for rank in range(size)
    ]
    for process in processes:
        process.start()
    return processes


def ended(processes: Sequence[BaseProcess], seconds: float = 120) -> list[int | None]:
    """Their exit codes; None: it had to be killed."""
    deadline = time.monotonic() + seconds
    codes = []
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
        codes.append(process.exitcode)
        process.kill()
    return codes


Report = tuple[dict[str, Tensor], dict[str, Any], dict[str, int]]


@cache
def reports(size: int) -> list[Report]:
    """What each of ``size`` ranks found: tensors, values, bytes it sent before the small calls."""
    with TemporaryDirectory() as folder:
        codes = ended(start("report", size, Path(folder)))
        assert codes == [0] * size, [path.read_text() for path in Path(folder).glob("*.error")]
        found = []
        for rank in range(size):
            told = json.loads((Path(folder) / f"{rank}.json").read_text())
            found.append((load_file(Path(folder) / f"{rank}.safetensors"), told["values"], told["sent"]))
        return found


@cache
def alone() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What one process finds."""
    before = stage_solver.PIECE_ROWS
    try:
        return everything(ALONE)
    finally:
        stage_solver.PIECE_ROWS = before


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether dtype, shape and every bit agree, that of a zero's sign too."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(*(tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (a, b)))
