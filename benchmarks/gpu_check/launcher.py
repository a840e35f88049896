"""The XLM-R-large-shaped job as a user starts it, by DeepSpeed's launcher: tokens per second and losses from its metrics."""

from __future__ import annotations

import statistics
from functools import partial

from benchmarks.gpu_check.figures import Figures, Row
from benchmarks.gpu_check.processes import Process, reason_in
from benchmarks.gpu_check.setting import RECIPE, Setting, words_of
from demo.__main__ import launcher
from pipeline.runtime.json_files import read_points
from pipeline.runtime.run_paths import RunPaths

TABLE = "By the launcher"
LIMIT_S = 65
INTERVALS = 6  # log intervals of the run; the first has the warm-up
SPEED, LOSS = "speed/tokens_per_second", "loss/total"
SHOWN = ("_share", "/mfu", "_gib")  # endings of further tags, of the last interval


def measure(setting: Setting, figures: Figures) -> None:
    figures.attempt(TABLE, {"recipe": RECIPE.name, "ZeRO": 2}, partial(_train, setting))


def _train(setting: Setting) -> Row:
    paths, log, steps = (
        RunPaths(setting.work / "runs" / "launcher"),
        setting.log("launcher-run"),
        setting.scale.launcher_steps,
    )
    changes = {
        "steps": steps,
        "metrics.log_every": max(1, steps // INTERVALS),
        "save_every": steps,
        "eval_every": steps,
    }
    command = [*launcher(), "pipeline/train.py", "--deepspeed", "ds_configs/zero2.json", "--recipe", str(RECIPE)]
    command += ["--run-dir", str(paths.directory), *words_of(setting.overrides(changes))]
    ended = Process(command, log).wait(LIMIT_S * setting.scale.patience)
    if not paths.done.is_file():
        raise RuntimeError(f"the run ended with {ended.code}, without DONE: {reason_in(log)}")
    points = [point for point in read_points(paths.metrics) if SPEED in point]
    speeds, losses = [point[SPEED] for point in points], [point[LOSS] for point in points]
    shares = {tag: value for tag, value in points[-1].items() if tag.endswith(SHOWN)}
    row: Row = {"steps": steps, "seconds": ended.seconds, "tokens/s": round(statistics.median(speeds[1:] or speeds))}
    return row | {"first loss": losses[0], "last loss": losses[-1], **shares}
