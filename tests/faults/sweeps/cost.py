"""Figure 10: the cost of saving: its share of the quickstart, and how long training of a large student is stopped."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from tests.dist.runs import curve, end_group, metrics
from tests.faults.sweeps.lab import Lab, Outcome

QUICKSTART = Path("recipes/quickstart.yaml")
INPUTS = (Path("artifacts/teacher"), Path("artifacts/shards"))
MOST_SHARE, MOST_STOPPED_S = 0.02, 5.0
RUN_TIMEOUT_S = 3000.0


def cost_of_saving(lab: Lab, quick: bool) -> Outcome:
    """The quickstart as shipped, on one rank; then one save of 118 M trained parameters."""
    stopped = _stopped_seconds(lab, layers=2 if quick else 12, vocabulary=5_000 if quick else 250_002)
    share, steps = (None, 0) if quick or not all(path.is_dir() for path in INPUTS) else _share_of_quickstart(lab)
    kept = (stopped["stopped_s"] < MOST_STOPPED_S) + (share is not None and share < MOST_SHARE)
    measured = f"{stopped['stopped_s']:.2f} s stopped of {stopped['total_s']:.1f} s for {stopped['parameters_m']:.0f} M parameters"
    if share is not None:
        measured += f"; {share:.2%} of the quickstart's {steps} steps"
    return Outcome(
        "saving: < 2 % of the quickstart's training time, < 5 s of stopped training for 118 M parameters",
        1 + (share is not None),
        kept,
        measured,
        f"{stopped['stock_s']:.1f} s stopped for the same student (no fsync, no hash)",
        {"share_of_quickstart": share, **stopped},
    )


def _share_of_quickstart(lab: Lab) -> tuple[float, int]:
    """Seconds that saving stopped training, divided by the seconds from the first to the last step; and the steps."""
    run_dir = lab.fresh("quickstart")
    log = run_dir.with_suffix(".log")
    words = ["--deepspeed", "ds_configs/zero2.json", "--recipe", str(QUICKSTART), "--run-dir", str(run_dir)]
    job = lab.server.start(1, words, log)
    try:
        assert job.wait(RUN_TIMEOUT_S) == 0, log.read_text()[-3000:]
    finally:
        end_group(job)
    stopped_s = sum(curve(run_dir, "speed/save_stall_seconds").values())
    rows = metrics(run_dir)
    share = stopped_s / (rows[-1]["time_s"] - rows[0]["time_s"])
    shutil.rmtree(run_dir)
    return share, rows[-1]["step"]


def _stopped_seconds(lab: Lab, layers: int, vocabulary: int) -> dict[str, float]:
    directory = lab.fresh("large")
    directory.mkdir()
    log, report = directory / "log", directory / "report.json"
    words = [str(layers), str(vocabulary), str(directory / "checkpoints"), str(report)]
    job = lab.server.start(1, words, log, script="tests/faults/sweeps/large_save.py")
    try:
        assert job.wait() == 0, log.read_text()[-3000:]
        return json.loads(report.read_text())
    finally:
        end_group(job)
        shutil.rmtree(directory)
