"""Compares the teacher with the student before and after training: the demo's table and its `demo.json`.

In: the recipe, the retrieval settings and a run directory with an exported student. Out: the table as text, and
`demo.json` with `teacher_mean`, `before_mean`, `after_mean` (pooled from the output), the same with `_values`,
`per_pair`, and `seconds` and `tokens_per_second` of the training. Evaluations are kept in `retrieval/` and repeated only
when their input has changed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from data_prep.durable_files import replace_file
from pipeline.config import Recipe
from pipeline.distillation.models.teacher import load_encoder as load_teacher_encoder
from pipeline.evaluation.encoder import Encoder, load_encoder
from pipeline.evaluation.retrieval import RetrievalConfig, evaluate_retrieval, retrieval_table
from pipeline.export.card import write_card
from pipeline.runtime.json_files import read_json, read_json_if_there, read_points
from pipeline.runtime.run_paths import RunPaths
from pipeline.training.build import student_of
from pipeline.training.checks import cut_teacher, open_data

STAGES = ("teacher", "before", "after")
SPEED = "speed/tokens_per_second"


def compare(recipe: Recipe, retrieval: RetrievalConfig, run_dir: Path) -> str:
    """Evaluate the three models, write `demo.json`, return the table."""
    makers: dict[str, Callable[[], Encoder]] = {
        "teacher": lambda: load_encoder(recipe.teacher, recipe.relations.teacher_layer),
        "before": lambda: untrained_student(recipe),
        "after": lambda: load_encoder(str(run_dir / "student"), recipe.relations.student_layer),
    }
    identities = identities_of(recipe, retrieval, run_dir)
    results = {
        stage: kept_or_made(run_dir / "retrieval" / f"{stage}.json", identities[stage], makers[stage], retrieval)
        for stage in STAGES
    }
    report = report_of(results, read_json(run_dir / "demo_training.json"), training_speed(run_dir))
    replace_file(run_dir / "demo.json", json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    write_card(run_dir / "student", [run_dir])  # the export was made before these figures
    return "\n".join([retrieval_table(results), *summary(report, recipe)])


def untrained_student(recipe: Recipe) -> Encoder:
    """The student at the start of training, with the teacher's tokenizer."""
    teacher = load_encoder(recipe.teacher)
    teacher_model = load_teacher_encoder(recipe.teacher)
    if recipe.vocabulary is not None:
        cut_teacher(recipe.vocabulary, recipe.teacher, teacher_model)
    student = student_of(recipe, teacher_model, open_data(recipe))
    layer = recipe.relations.student_layer or recipe.student.layers
    model = student.model.eval().to(teacher.device)
    return Encoder("student before training", model, teacher.tokenizer, layer, path=recipe.teacher)


def identities_of(recipe: Recipe, retrieval: RetrievalConfig, run_dir: Path) -> dict[str, str]:
    """What each evaluation depends on, as one string. When it changes, the evaluation is repeated."""
    asked = [dataclasses.asdict(retrieval), recipe.teacher, dataclasses.asdict(recipe.relations)]
    start = [*asked, dataclasses.asdict(recipe.student), recipe.seed]
    weights = run_dir / "student" / "model.safetensors"
    with open(weights, "rb") as file:
        trained = [*start, hashlib.file_digest(file, "sha256").hexdigest()]
    return {name: json.dumps(value) for name, value in zip(STAGES, (asked, start, trained), strict=True)}


def kept_or_made(
    path: Path, identity: str, make_encoder: Callable[[], Encoder], retrieval: RetrievalConfig
) -> dict[str, Any]:
    """The kept evaluation if it depends on the same things, else a new one."""
    kept = read_json_if_there(path)
    if kept.get("identity") == identity:
        return kept["result"]
    result = evaluate_retrieval(make_encoder(), retrieval)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, json.dumps({"identity": identity, "result": result}, indent=1) + "\n")
    return result


def training_speed(run_dir: Path) -> float:
    """Median of the tokens per second in the log intervals of the training."""
    speeds = [point[SPEED] for point in read_points(RunPaths(run_dir).metrics) if SPEED in point]
    return round(statistics.median(speeds), 1)


def report_of(results: dict[str, Any], training: dict[str, Any], tokens_per_second: float) -> dict[str, Any]:
    """The content of `demo.json`."""
    means: dict[str, Any] = {}
    for suffix, pooling in (("", "output"), ("_values", "values"), ("_last_input", "last_input")):
        means |= {f"{stage}_mean{suffix}": round(results[stage]["mean"][pooling], 4) for stage in STAGES}
    languages = list(results["teacher"]["per_pair"])
    per_pair = {
        language: {
            stage: {pooling: round(both["mean"], 4) for pooling, both in results[stage]["per_pair"][language].items()}
            for stage in STAGES
        }
        for language in languages
    }
    about = {name: results["after"][name] for name in ("left_out", "untrained") if name in results["after"]}
    return {**means, "per_pair": per_pair, **about, **training, "tokens_per_second": tokens_per_second}


def summary(report: dict[str, Any], recipe: Recipe) -> list[str]:
    """The lines below the table."""
    tokens = recipe.steps * recipe.global_batch * recipe.seq_len
    return [
        "",
        f"gain in accuracy: output {report['after_mean'] - report['before_mean']:+.3f}, "
        f"values {report['after_mean_values'] - report['before_mean_values']:+.3f}",
        f"training: {recipe.steps} steps, {tokens:,} tokens, {report['seconds']:.0f} s, "
        f"{report['tokens_per_second']:,.0f} tokens/s",
    ]
