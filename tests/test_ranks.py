"""Ranks share the samples so that every sum is that of one process, tell one another, and end together."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch

from qquant import ranks as room
from qquant.config import QuantizeConfig
from qquant.errors import RankLostError, StoppedError, UsageError
from qquant.quantizing import quantize_checkpoint
from qquant.ranks import ALONE, LANES, Ranks, joined
from qquant.run import Pace
from tests.conftest import Factory
from tests.rank_programs import DTYPES, SAMPLES, SIZES, alone, ended, mixed_of, reports, same_bits, start

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7, 16])
@pytest.mark.parametrize("samples", [list(range(40)), [3, 18, 19, 35], [5], []], ids=["many", "some", "one", "none"])
def test_every_sample_is_run_once_in_the_lane_order_of_one_process(size: int, samples: list[int]) -> None:
    ranks = [Ranks(rank, size) for rank in range(size)]
    steps = [one.steps(samples) for one in ranks]
    assert len({len(of_one) for of_one in steps}) == 1
    in_order = [lane for step in zip(*steps, strict=True) for lane in step if lane]
    assert in_order == ALONE.steps(samples)
    assert sorted(i for lane in in_order for i in lane) == sorted(samples)
    for one, of_one in zip(ranks, steps, strict=True):
        assert one.mine(samples) == sorted(i for lane in of_one for i in lane)
        assert all(one.owner(i) == one.rank for lane in of_one for i in lane)


def test_one_process_has_a_lane_for_every_sixteenth_sample() -> None:
    assert ALONE.steps(range(18)) == [[0, 16], [1, 17], *([i] for i in range(2, LANES))]


def test_one_process_sends_nothing_and_copies_no_tensor() -> None:
    tensor = torch.ones(3)
    assert ALONE.share(tensor, 0) is tensor
    assert ALONE.add_in_order(None, tensor, [1]) is tensor
    assert ALONE.whole(tensor, 3) is tensor
    assert ALONE.json({"a": (1, 2)}) == {"a": [1, 2]}
    assert ALONE.counts(3) == [3]
    ALONE.barrier()
    assert ALONE.sent == {"moments": 0, "solutions": 0, "other": 0}


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("samples", SAMPLES)
def test_moments_are_those_of_one_process_bit_for_bit(size: int, dtype: str, samples: str) -> None:
    expected = {key: value for key, value in alone()[0].items() if key.startswith(f"{dtype} {samples} ")}
    assert len(expected) == 4
    for tensors, _, _ in reports(size):
        assert all(same_bits(tensors[key], value) for key, value in expected.items())


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
def test_what_is_shared_arrives_on_every_rank(size: int) -> None:
    for tensors, values, _ in reports(size):
        assert torch.equal(tensors["shared torch.bfloat16"], torch.arange(6).reshape(2, 3).bfloat16())
        assert torch.equal(tensors["shared torch.uint8"], torch.tensor([0, 2, 4, 6, 8], dtype=torch.uint8))
        assert torch.equal(tensors["shared torch.int64"], torch.tensor(7))
        assert torch.equal(tensors["shared torch.bool"], torch.tensor([True, False]))
        assert tensors["shared torch.float32"].shape == (0, 4)
        assert values["json"] == {"é": [1, None, 0.1]}
        assert values["counts"] == [10 + rank for rank in range(size)]
        assert values["any"] == [True, False]


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
def test_an_error_of_one_rank_is_raised_by_all_in_the_same_words(size: int) -> None:
    for _, values, _ in reports(size):
        assert values["refused"] == ["NumericError", "numbers must be good, got bad ones"]
        assert values["spoiled"][0] == values["empty"][0] == "NumericError"
        assert "must be finite" in values["spoiled"][1]
        assert "at least one calibration token" in values["empty"][1]


@pytest.mark.slow
def test_a_model_is_measured_by_any_number_of_ranks_that_go_on_where_others_were_killed(
    checkpoint: Factory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Pace, "due", Pace.due)  # put back what measuring here sets
    source = checkpoint("olmo2", num_hidden_layers=3, hidden_size=32, intermediate_size=64)
    shutil.copytree(source, tmp_path / "model")
    quantize_checkpoint(source, None, QuantizeConfig(method="rtn", group_size=32), tmp_path / "quantized")
    expected = json.loads(json.dumps(mixed_of(tmp_path / "model", None, ALONE)))
    assert expected["blocks"] == [0, 1, 2]
    assert ended(start("measure until killed", 2, tmp_path)) == [-9, StoppedError.exit_code]
    assert ended(start("measure to the end", 3, tmp_path)) == [0, 0, 0]
    for rank in range(3):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == {**expected, "blocks": [2]}


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
def test_when_a_rank_is_killed_the_others_end_by_themselves(size: int, tmp_path: Path) -> None:
    began = time.monotonic()
    *others, killed = ended(start("lose a rank", size, tmp_path))
    assert killed == -9
    assert others == [StoppedError.exit_code] * (size - 1)
    assert time.monotonic() - began < 60
    for rank in range(size - 1):
        told = (tmp_path / f"{rank}.error").read_text()
        assert told.startswith("RankLostError: another rank ended")
        assert "any number of ranks" in told


@pytest.mark.slow
def test_torchrun_starts_ranks(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        "import sys, pathlib\n"
        "from qquant.ranks import joined\n"
        "with joined('auto') as (ranks, device):\n"
        "    told = ranks.json(ranks.counts(ranks.rank))\n"
        "    pathlib.Path(sys.argv[1], f'{ranks.rank}.told').write_text(f'{ranks.size} {device} {told}')\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    found = subprocess.run(
        [*command, str(program), str(tmp_path)], capture_output=True, text=True, cwd=ROOT, timeout=120
    )
    assert found.returncode == 0, found.stderr
    devices = ["cuda:0", "cuda:1"] if torch.cuda.device_count() > 1 else ["cpu", "cpu"]
    for rank, device in enumerate(devices):
        assert (tmp_path / f"{rank}.told").read_text() == f"2 {device} [0, 1]"


def test_without_torchrun_there_is_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with joined("cuda:3") as (ranks, device):
        assert (ranks, device) == (ALONE, "cuda:3")
    monkeypatch.setenv("WORLD_SIZE", "1")
    with joined("auto") as (ranks, device):
        assert (ranks, device) == (ALONE, "auto")


@pytest.mark.parametrize(
    ("variables", "device", "told"),
    [
        ({"WORLD_SIZE": "17", "RANK": "0"}, "cpu", "at most 16 ranks"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "cuda:1", "each takes its own GPU"),
        ({"WORLD_SIZE": "2", "RANK": ""}, "cpu", "RANK is ''"),
        ({"WORLD_SIZE": "2", "RANK": "2"}, "cpu", "RANK is '2'"),
        ({"WORLD_SIZE": "two"}, "cpu", "WORLD_SIZE is 'two'"),
        ({"WORLD_SIZE": "0"}, "cpu", "WORLD_SIZE is '0'"),
        ({"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "4096"}, "cuda", "needs a GPU of its own"),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_PORT": ""}, "cpu", "MASTER_PORT is ''"),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_PORT": "1", "MASTER_ADDR": ""}, "cpu", "MASTER_ADDR is ''"),
    ],
    ids=["too many", "gpu by number", "no rank", "high rank", "no number", "nobody", "no gpu", "no port", "nowhere"],
)
def test_an_environment_that_cannot_be_followed_is_refused(
    variables: dict[str, str], device: str, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=told), joined(device):
        pass


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_rank_that_never_comes_is_not_waited_for_for_ever(rank: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "_MEETING", timedelta(seconds=1))
    port = "0" if rank == "0" else "1"  # rank 0 listens at any free one, at 1 nobody does
    for name, value in {"WORLD_SIZE": "2", "RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RankLostError, match="did not come"), joined("cpu"):
        pass
