"""The quickstart by `python -m demo`: distil the real teacher, export, retrieval of the student before and after training.

It needs the teacher and the shards of `make demo`. A tiny check has a tiny teacher instead.
"""

from __future__ import annotations

import sys
from pathlib import Path

from benchmarks.gpu_check.figures import Figures, NotHere, Row
from benchmarks.gpu_check.processes import Process, reason_in
from benchmarks.gpu_check.setting import Setting, words_of
from benchmarks.measure import REPO
from demo.settings import QUICKSTART
from pipeline.config import load_recipe
from pipeline.runtime.json_files import read_json

RETRIEVAL, TRAINING = "Retrieval, mean over the languages", "Training of the quickstart"
LIMIT_S = 125
POOLINGS = {"output": "", "values": "_values", "last layer's input": "_last_input"}


def measure(setting: Setting, figures: Figures) -> None:
    report: Row = {}

    def run() -> Row:
        report.update(_demo(setting))
        return {name: report[name] for name in ("steps", "seconds", "tokens_per_second")}

    figures.attempt(TRAINING, {"recipe": QUICKSTART.name}, run)
    for pooling, suffix in POOLINGS.items() if report else ():
        stages = {stage: report[f"{stage}_mean{suffix}"] for stage in ("teacher", "before", "after")}
        figures.add(RETRIEVAL, {"pooling": pooling, **stages})


def _demo(setting: Setting) -> Row:
    """The content of demo.json."""
    if not setting.is_tiny:
        _check_artifacts()
    overrides = _tiny_overrides(setting) if setting.is_tiny else []
    run_dir, log = setting.work / "runs" / "quickstart", setting.log("quickstart-demo")
    command = [sys.executable, "-m", "demo", "--recipe", str(QUICKSTART), "--run-dir", str(run_dir)]
    ended = Process([*command, *words_of(overrides)], log).wait(LIMIT_S * setting.scale.patience)
    if ended.code != 0:
        raise RuntimeError(f"python -m demo ended with {ended.code}: {reason_in(log)}")
    return read_json(run_dir / "demo.json")


def _check_artifacts() -> None:
    recipe = load_recipe(REPO / QUICKSTART, [])
    missing = [str(path) for path in (Path(recipe.teacher), Path(recipe.data)) if not (REPO / path).is_dir()]
    if missing:
        raise NotHere(
            f"{' and '.join(missing)} not found. `make demo` makes them; on a machine without a network make them "
            "elsewhere and copy artifacts/"
        )


def _tiny_overrides(setting: Setting) -> list[str]:
    keys = {
        "teacher": setting.teacher,
        "data": setting.shards,
        "steps": setting.scale.launcher_steps,
        "global_batch": setting.scale.rows,
        "micro_batch_per_gpu": setting.scale.rows,
        "seq_len": setting.scale.seq_len,
        "relations.teacher_layer": 3,
        "relations.heads": setting.scale.relation_heads,
        "student.layers": 2,
        "student.init_layers": "null",
        "student.hidden": setting.scale.teacher["hidden_size"],
        "student.heads": setting.scale.teacher["num_attention_heads"],
        "student.ffn": setting.scale.teacher["intermediate_size"],
        "retrieval.languages": "[de]",
        "retrieval.max_pairs": 8,
        "retrieval.max_length": 60,
    }
    return [f"{key}={value}" for key, value in keys.items()]
