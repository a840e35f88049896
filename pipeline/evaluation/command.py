"""Evaluate encoders side by side: tables on the console, `evaluation.json` in the output directory.

    python -m pipeline evaluate artifacts/teacher runs/quickstart/student --tasks retrieval,speed --output runs/evaluation

A model is a Hugging Face directory or hub name; `MODEL@19` pools the values of layer 19 instead of the last one.
Settings of a task are overridden like a recipe's: `--set retrieval.pairs=DIR`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import transformers

from pipeline.config import apply_override, build_section
from pipeline.errors import UserError
from pipeline.evaluation import retrieval, speed, sts
from pipeline.evaluation.encoder import Encoder, load_encoder


@dataclasses.dataclass
class EvaluationConfig:
    """Settings of all tasks, one section each."""

    retrieval: retrieval.RetrievalConfig = dataclasses.field(default_factory=retrieval.RetrievalConfig)
    sts: sts.StsConfig = dataclasses.field(default_factory=sts.StsConfig)
    speed: speed.SpeedConfig = dataclasses.field(default_factory=speed.SpeedConfig)


@dataclasses.dataclass(frozen=True)
class Task:
    """`check` looks at the input before any model is loaded; `evaluate` gives results by model; `table` shows them."""

    check: Callable[[Any], object]
    evaluate: Callable[[list[Encoder], Any], dict[str, dict[str, Any]]]
    table: Callable[[dict[str, dict[str, Any]]], str]


TASKS = {
    "retrieval": Task(retrieval.read_pairs, retrieval.evaluate_each, retrieval.retrieval_table),
    "sts": Task(sts.read_all, sts.evaluate_sts, sts.sts_table),
    "speed": Task(lambda config: None, speed.evaluate_speed, speed.speed_table),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("models", nargs="+", metavar="MODEL", help="HF directory or hub name, optionally @LAYER")
    parser.add_argument("--tasks", default="retrieval", help=f"comma-separated, of: {', '.join(TASKS)}")
    parser.add_argument("--output", type=Path, required=True, help="directory for evaluation.json")
    parser.add_argument("--set", action="append", default=[], metavar="TASK.KEY=VALUE")


def run(arguments: argparse.Namespace) -> None:
    tasks = [task for task in arguments.tasks.split(",") if task]
    unknown = [task for task in tasks if task not in TASKS]
    if unknown or not tasks:
        raise UserError(f"--tasks {arguments.tasks!r}: unknown {', '.join(unknown)}. Tasks: {', '.join(TASKS)}")
    if len(set(arguments.models)) < len(arguments.models):
        raise UserError(f"a model is named twice: {' '.join(arguments.models)}. Name each once.")
    config = read_overrides(arguments.set)
    for task in tasks:
        TASKS[task].check(getattr(config, task))
    transformers.logging.disable_progress_bar()
    encoders = [load_encoder(name) for name in arguments.models]
    report: dict[str, Any] = {"tasks": {}, "settings": dataclasses.asdict(config)}
    arguments.output.mkdir(parents=True, exist_ok=True)
    for task in tasks:
        report["tasks"][task] = TASKS[task].evaluate(encoders, getattr(config, task))
        print(TASKS[task].table(report["tasks"][task]), end="\n\n", flush=True)
    path = arguments.output / "evaluation.json"
    path.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"written: {path}")


def read_overrides(overrides: list[str]) -> EvaluationConfig:
    """`--set section.key=value` on top of the defaults, as strict as a recipe."""
    tree: dict[str, Any] = {}
    for override in overrides:
        apply_override(tree, override)
    return build_section(EvaluationConfig, tree, "")
