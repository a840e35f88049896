"""Evaluate encoders side by side: a table on the console, `evaluation.json` in the output directory.

    python -m pipeline evaluate artifacts/teacher runs/quickstart/student --tasks retrieval --output runs/evaluation

A model is a Hugging Face directory or hub name; `MODEL@19` pools the values of layer 19 instead of the last one.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import transformers

from pipeline.config import apply_override, build_section
from pipeline.errors import UserError
from pipeline.evaluation.encoder import POOLINGS, load_encoder
from pipeline.evaluation.retrieval import RetrievalConfig, evaluate_retrieval, read_pairs


@dataclasses.dataclass
class EvaluationConfig:
    """Settings of all tasks, one section each: `--set retrieval.pairs=DIR`."""

    retrieval: RetrievalConfig = dataclasses.field(default_factory=RetrievalConfig)


TASKS = {"retrieval": evaluate_retrieval}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("models", nargs="+", metavar="MODEL", help="HF directory or hub name, optionally @LAYER")
    parser.add_argument("--tasks", default="retrieval", help=f"comma-separated, of: {', '.join(TASKS)}")
    parser.add_argument("--output", type=Path, required=True, help="directory for evaluation.json")
    parser.add_argument("--set", action="append", default=[], metavar="TASK.KEY=VALUE")


def run(arguments: argparse.Namespace) -> None:
    tasks = [task for task in arguments.tasks.split(",") if task]
    unknown = [task for task in tasks if task not in TASKS]
    if unknown or not tasks:
        raise UserError(f"--tasks {arguments.tasks}: unknown {', '.join(unknown)}. Tasks: {', '.join(TASKS)}")
    config = read_overrides(arguments.set)
    transformers.logging.disable_progress_bar()
    if "retrieval" in tasks:
        read_pairs(config.retrieval)  # a wrong path should come to light before a model is loaded
    results: dict[str, dict[str, Any]] = {task: {} for task in tasks}
    for name in arguments.models:
        encoder = load_encoder(name)
        for task in tasks:
            results[task][name] = TASKS[task](encoder, getattr(config, task))
        del encoder
    arguments.output.mkdir(parents=True, exist_ok=True)
    report = {"tasks": results, "settings": dataclasses.asdict(config)}
    (arguments.output / "evaluation.json").write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    if "retrieval" in results:
        print(retrieval_table(results["retrieval"]))
    print(f"written: {arguments.output / 'evaluation.json'}")


def read_overrides(overrides: list[str]) -> EvaluationConfig:
    """`--set section.key=value` on top of the defaults, as strict as a recipe."""
    tree: dict[str, Any] = {}
    for override in overrides:
        apply_override(tree, override)
    return build_section(EvaluationConfig, tree, "")


def retrieval_table(results: dict[str, dict[str, Any]]) -> str:
    """One row per model and pooling: accuracy per language pair, both directions averaged, and the mean."""
    languages = list(next(iter(results.values()))["per_pair"])
    width = max(len("model"), *map(len, results))
    lines = ["retrieval accuracy, both directions averaged"]
    lines.append(f"{'model':<{width}}  {'pooled from':<12}" + "".join(f"{x:>9}" for x in [*languages, "mean"]))
    for name, result in results.items():
        for pooling in POOLINGS:
            figures = [result["per_pair"][language][pooling]["mean"] for language in languages]
            cells = "".join(f"{figure:9.3f}" for figure in [*figures, result["mean"][pooling]])
            lines.append(f"{name:<{width}}  {pooling:<12}{cells}")
    return "\n".join(lines)
