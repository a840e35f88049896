"""Checkpoints under real ranks: bit for bit at every ZeRO stage, across stages and rank counts, through kills and full disks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.runtime.checkpoint import CheckpointReader, newest_valid
from pipeline.runtime.checkpoint_files import KINDS, committed_steps, corruption
from tests.dist.ranks import run_ranks, run_ranks_to_any_end

WORKER = Path(__file__).parent / "engine_worker.py"
STAGES = (1, 2, 3)
PRECISIONS = ("fp32", "bf16", "fp16")
STEPS = 6
RANK_1_DOES_NOT_FIT = 1150  # bytes; the files of rank 0 are 1096 each, those of rank 1 1216


def assembled(checkpoint: Path) -> dict[tuple[str, str], torch.Tensor]:
    """Every weight and moment of a checkpoint as one flat tensor, for any number of ranks that wrote it."""
    reader = CheckpointReader(checkpoint)
    return {
        (kind, name): reader.read(kind, name, 0, int(torch.Size(shape).numel()))
        for kind in KINDS
        for name, shape in reader.state["parameters"].items()
    }


def equal(a: Path, b: Path) -> bool:
    one, two = assembled(a), assembled(b)
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


@pytest.fixture(scope="module", params=[1, 2])
def table(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Any], Path]:
    """Uninterrupted and resumed runs at every stage, in fp32 and bf16, on 1 and on 2 ranks."""
    base = tmp_path_factory.mktemp(f"ranks{request.param}")
    runs = []
    for stage in STAGES:
        for precision in PRECISIONS:
            full: dict[str, Any] = {"stage": stage, "precision": precision, "steps": STEPS}
            name, directory = f"{stage} {precision}", base / f"{stage}-{precision}"
            runs.append({**full, "name": name, "directory": str(directory), "save": [1, 3]})
            for step in (1, 3):
                source = str(directory / f"step-{step:08d}")
                runs.append({**full, "name": f"{name} from {step}", "directory": str(base / "unused"), "load": source})
    return run_ranks(WORKER, request.param, {"runs": runs}, base / "launch"), base


def test_resumed_is_uninterrupted_bit_for_bit(table: tuple[list[Any], Path]) -> None:
    reports, _ = table
    for report in reports:
        for stage in STAGES:
            for precision in PRECISIONS:
                full = report[f"{stage} {precision}"]
                for step in (1, 3):
                    resumed = report[f"{stage} {precision} from {step}"]
                    later = {number: loss for number, loss in full["losses"].items() if int(number) >= step}
                    assert resumed["losses"] == later, (stage, precision, step)
                    assert resumed["scales"] == {n: full["scales"][n] for n in later}, (stage, precision, step)
                    assert resumed["final"] == full["final"], (stage, precision, step)


def test_loss_scale_falls_and_rises_again(table: tuple[list[Any], Path]) -> None:
    """fp16 with a scale that is raised every other step: it overflows, those steps are skipped, the others train."""
    full = table[0][0]["2 fp16"]
    scales = list(full["scales"].values())
    assert 0 < len(full["skipped"]) < STEPS
    assert scales != sorted(scales, reverse=True), "the scale did not rise again"


def test_norm_and_verdict_equal_deepspeeds_to_the_last_bit(table: tuple[list[Any], Path]) -> None:
    """Over two groups, in steps that overflow as well; and the step learns them without a host read."""
    for report in table[0]:
        for stage in (1, 2):
            for precision in PRECISIONS:
                run = report[f"{stage} {precision}"]
                assert run["warnings"] == []
                assert repr(run["verdicts"]) == repr(run["verdicts_of_deepspeed"]), (stage, precision)
                assert run["reads"] == [0] * STEPS, (stage, precision)


def test_fragments_of_all_ranks_tile_every_parameter(table: tuple[list[Any], Path]) -> None:
    _, base = table
    for stage in STAGES:
        state = assembled(base / f"{stage}-fp32" / "step-00000003")
        sizes = {name: tensor.numel() for (kind, name), tensor in state.items() if kind == "weight"}
        assert sizes == {"inner.weight": 231, "inner.bias": 33, "norm.weight": 33, "norm.bias": 33} | {
            "outer.weight": 99,
            "outer.bias": 3,
        }


@pytest.mark.parametrize("ranks", [1, 2])
def test_sums_of_micro_batches_in_fp32(ranks: int, tmp_path: Path) -> None:
    """`data_types.grad_accum_dtype`: a resume is bit for bit, and with bf16 the sum of two is more exact than in bf16."""
    runs = []
    for stage, precision in ((1, "fp16"), (2, "bf16"), (3, "bf16")):
        name, directory = f"{stage} {precision}", tmp_path / str(stage)
        full = {"stage": stage, "precision": precision, "accumulation": 2, "steps": 4, "directory": str(directory)}
        runs.append({**full, "name": f"{name} as usual", "directory": str(tmp_path / "unused")})
        full["grad_accum_dtype"] = "fp32"
        runs.append({**full, "name": name, "save": [2]})
        runs.append({**full, "name": f"{name} resumed", "load": str(directory / "step-00000002")})
    for report in run_ranks(WORKER, ranks, {"runs": runs}, tmp_path / "launch"):
        for name in ("1 fp16", "2 bf16", "3 bf16"):
            assert report[f"{name} resumed"]["final"] == report[name]["final"], name
        for name in ("2 bf16", "3 bf16"):
            assert report[name]["final"] != report[f"{name} as usual"]["final"], name


def test_ranks_and_stages_may_change(tmp_path: Path) -> None:
    """2 ranks at stage 1 -> 1 rank at stage 3 -> 2 ranks at stage 2: nothing of the state changes on the way."""
    base: dict[str, Any] = {"precision": "fp32", "steps": STEPS}
    first = {**base, "name": "a", "stage": 1, "directory": str(tmp_path / "a"), "save": [3]}
    straight = run_ranks(WORKER, 2, {"runs": [first]}, tmp_path / "launch-a")
    checkpoint = tmp_path / "a" / "step-00000003"
    for number, (world_size, stage) in enumerate([(1, 3), (2, 2)]):
        resave = tmp_path / f"resaved{number}"
        run = {**base, "name": "b", "stage": stage, "directory": str(tmp_path / "unused"), "load": str(checkpoint)}
        reports = run_ranks(
            WORKER, world_size, {"runs": [{**run, "resave": str(resave)}]}, tmp_path / f"launch{number}"
        )
        assert equal(checkpoint, resave / "step-00000003")
        later = [straight[0]["a"]["losses"][str(step)] for step in range(3, STEPS)]
        assert list(reports[0]["b"]["losses"].values()) == pytest.approx(later, rel=1e-5)
        checkpoint = resave / "step-00000003"


def test_nan_on_one_rank_changes_no_parameter(tmp_path: Path) -> None:
    runs = [
        {"name": f"{stage} {precision}", "stage": stage, "precision": precision, "steps": 4, "poison": [1, 2]}
        | {"directory": str(tmp_path / "unused")}
        for stage in STAGES
        for precision in PRECISIONS
    ]
    for report in run_ranks(WORKER, 2, {"runs": runs}, tmp_path / "launch"):
        for run in runs:
            skipped = report[run["name"]]["skipped"]
            assert {1, 2} <= set(skipped), run["name"]
            assert run["precision"] == "fp16" or skipped == [1, 2], run["name"]  # loss scaling skips more on its own
            assert report[run["name"]]["unharmed"], run["name"]


def test_full_disk_keeps_the_older_checkpoint_and_the_run(tmp_path: Path) -> None:
    """One rank cannot write its files: no trace of that checkpoint, the older one is valid, the next save succeeds."""
    base: dict[str, Any] = {"stage": 2, "precision": "fp32", "steps": STEPS, "full_disk_at": 4}
    cases = [(1, [2, 4, 6]), (600, [2, 4, 6]), (RANK_1_DOES_NOT_FIT, [2, 4, 6]), (1, [2, 4])]
    runs = [
        {
            **base,
            "name": str(number),
            "directory": str(tmp_path / str(number)),
            "save": saves,
            "file_limit_bytes": limit,
        }
        for number, (limit, saves) in enumerate(cases)
    ]
    reports = run_ranks(WORKER, 2, {"runs": runs}, tmp_path / "launch")
    for number, run in enumerate(runs):
        directory = Path(run["directory"])
        expected = [2, 6] if 6 in run["save"] else [2]
        assert committed_steps(directory) == expected
        assert all(corruption(directory / f"step-{step:08d}") is None for step in expected)
        assert not list(directory.glob("*.tmp")), "a failed save left something behind"
        if 6 not in run["save"]:
            assert "File too large" in reports[0][str(number)]["problem"]


@pytest.mark.parametrize(
    ("operation", "call"),
    [("fsync", 1), ("fsync", 4), ("fsync", 6), ("rename", 1), ("fsync", 8)],
    ids=["first file", "mid-write", "manifest", "before rename", "after rename"],
)
def test_kill_at_every_point_of_a_save(operation: str, call: int, tmp_path: Path) -> None:
    """SIGKILL inside the second save: the newest checkpoint is the first or the second, and it is valid."""
    run: dict[str, Any] = {"name": "a", "stage": 2, "precision": "fp32", "steps": STEPS, "save": [2, 4]}
    run |= {"directory": str(tmp_path / "ck"), "kill_at": 4, "kill_operation": operation, "kill_call": call}
    codes, _ = run_ranks_to_any_end(WORKER, 1, {"runs": [run]}, tmp_path / "launch")
    assert codes == [-9], "the kill did not happen at this point"
    newest, problems = newest_valid(tmp_path / "ck")
    assert problems == []
    assert newest is not None
    assert newest.name == ("step-00000004" if (operation, call) == ("fsync", 8) else "step-00000002")
