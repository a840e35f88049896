"""Figure 3: files with flipped bits, cut, lost, swapped or from another step; and the same flips in DeepSpeed's files."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

from pipeline.runtime.checkpoint import newest_valid
from tests.faults.sweeps.lab import Lab, Outcome
from tests.unit.runtime.test_checkpoint_damage import damage_somehow

SETTINGS = {"steps": 8, "save_every": 4, "eval_every": 8}
STOCK_FLIPS = 60


def corrupted_checkpoints(lab: Lab, quick: bool) -> Outcome:
    """Two checkpoints of a real run on two ranks. In each trial a copy of the newer one is corrupted."""
    original, choice, trials = lab.untouched(2, SETTINGS) / "checkpoints", random.Random(3), 40 if quick else 400
    rejected = 0
    for _ in range(trials):
        copy = lab.fresh("corrupt")
        shutil.copytree(original, copy)
        older, newer = sorted(copy.iterdir())
        while not _differs(newer, original / newer.name):  # frozen weights are the same file at every step
            damage_somehow(choice, newer, older)
        taken, problems = newest_valid(copy)
        rejected += taken == older and len(problems) == 1
    loads = None if quick else flips_that_stock_loads(lab)
    return Outcome(
        "a corrupt checkpoint is rejected and the older valid one loaded",
        trials,
        rejected,
        "flipped bits, cut, grown, missing, added, swapped, linked files, files of another step",
        "not measured" if loads is None else f"{loads} of {STOCK_FLIPS} checkpoints with one flipped bit load silently",
        {"stock_silent_loads": loads},
    )


def _differs(checkpoint: Path, original: Path) -> bool:
    files = sorted(original.iterdir())
    return len(files) != len(list(checkpoint.iterdir())) or any(
        (checkpoint / file.name).is_symlink()
        or not (checkpoint / file.name).exists()
        or (checkpoint / file.name).read_bytes() != file.read_bytes()
        for file in files
    )


def flips_that_stock_loads(lab: Lab) -> int:
    """How many flips `load_checkpoint` loads silently (stock_flips.py, in one rank)."""
    directory = lab.fresh("stock-flips")
    log, report = directory.with_suffix(".log"), directory / "report.json"
    directory.mkdir()
    words = [str(directory / "checkpoints"), str(STOCK_FLIPS), str(report)]
    job = lab.server.start(1, words, log, script="tests/faults/sweeps/stock_flips.py")
    assert job.wait() == 0, log.read_text()[-3000:]
    return json.loads(Path(report).read_text())["silent"]
