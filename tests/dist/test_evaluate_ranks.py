"""Evaluation on two ranks, under the real launcher, or killed and finished by one rank: the figures are those of one rank."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest

from pipeline.__main__ import main
from tests.dist.ports import free_port
from tests.dist.runs import end_group, finish, launcher, start
from tests.unit.evaluation.labelled_pairs import write_xnli
from tests.unit.evaluation.questions import ANSWER, needs_all_windows, write_mlqa

PATIENCE_S = 120


def test_two_killed_ranks_finish_with_the_figures_of_one_rank(
    tiny_teacher: Path, tiny_shards: Path, tmp_path: Path
) -> None:
    pairs = write_xnli(tmp_path / "pairs", train=99, evaluation=10, languages=("en", "de"))
    settings = [f"xnli.data={pairs}", "xnli.learning_rates=[3e-3, 1e-3]", "xnli.epochs=10", "xnli.batch=14"]
    settings += ["xnli.max_length=48", "heldout.heads=12", "heldout.seq_len=32", "heldout.heldout_rows=2"]
    command = ["evaluate", f"{tiny_teacher}@2", "--tasks", "heldout,xnli", "--teacher", str(tiny_teacher)]
    command += ["--data", str(tiny_shards), *(word for setting in settings for word in ("--set", setting))]
    once, cut = tmp_path / "once", tmp_path / "cut"
    main([*command, "--output", str(once)])

    meeting = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    line = [sys.executable, "-m", "pipeline", *command, "--output", str(cut)]
    logs = [tmp_path / f"rank{rank}.log" for rank in range(2)]
    ranks = [start(line, logs[rank], RANK=str(rank), LOCAL_RANK=str(rank), **meeting) for rank in range(2)]
    try:
        deadline = time.monotonic() + PATIENCE_S
        while not list(cut.glob("xnli/*/lr0.001-seed0/step-*/manifest.json")):
            assert all(rank.poll() is None for rank in ranks), [log.read_text()[-2000:] for log in logs]
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        for rank in ranks:
            end_group(rank)  # SIGKILL
    assert list(cut.glob("xnli/*/lr0.003-seed0/grid_point.json")), "the first grid point was finished"
    assert not list(cut.glob("xnli/*/lr0.001-seed0/grid_point.json")), "the second one was running"
    heldout_of_two = json.loads((cut / "evaluation.json").read_text())["tasks"]["heldout"]
    main([*command, "--output", str(cut)])

    (expected,), (got,) = (
        [*json.loads((at / "evaluation.json").read_text())["tasks"]["xnli"].values()] for at in (once, cut)
    )
    assert len(got["cells"]) == 2
    for ours, theirs in zip(got["cells"], expected["cells"], strict=True):
        assert ours["best_epoch"] == theirs["best_epoch"]
        assert ours["test"] == theirs["test"]
        losses = ([epoch["loss"] for epoch in point["epochs"]] for point in (ours, theirs))
        assert next(losses) == pytest.approx(next(losses), rel=2e-3, abs=1e-5)
    heldout_of_one = json.loads((once / "evaluation.json").read_text())["tasks"]["heldout"]
    (two,), (one,) = heldout_of_two.values(), heldout_of_one.values()
    assert two["per_language"] == pytest.approx(one["per_language"], rel=1e-6)


@needs_all_windows
def test_questions_under_the_real_launcher(tiny_teacher: Path, tmp_path: Path) -> None:
    """`deepspeed --module pipeline evaluate` on two ranks: the last batch and the last question have one rank only."""
    data = write_mlqa(tmp_path / "data", {"en": ANSWER, "zh": ANSWER}, train=21, evaluation=3)
    settings = [f"train={data / 'train-v1.1.json'}", f"data={data}", "languages=[en, zh]", "learning_rates=[3e-3]"]
    settings += ["epochs=2", "batch=10", "max_length=32", "stride=8"]
    command = ["evaluate", str(tiny_teacher), "--tasks", "mlqa"]
    command += [word for setting in settings for word in ("--set", f"mlqa.{setting}")]
    one, two = tmp_path / "one", tmp_path / "two"
    main([*command, "--output", str(one)])
    line = [*launcher("deepspeed", 2)[:-1], "--module", "pipeline", *command, "--output", str(two)]
    log = finish(start(line, tmp_path / "two.log"), tmp_path / "two.log")
    assert log.count("MLQA, F1 / exact match") == 1, "only rank 0 prints"

    (expected,), (got,) = (
        [*json.loads((at / "evaluation.json").read_text())["tasks"]["mlqa"].values()] for at in (one, two)
    )
    losses = [[epoch["loss"] for epoch in result["cells"][0]["epochs"]] for result in (expected, got)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    assert got["test"] == expected["test"]
    assert got["dev_mean"] == expected["dev_mean"]
