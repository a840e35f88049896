"""What was measured of a student, as Markdown for its model card.

In: directories that hold what the commands leave: `demo.json` and `metrics.jsonl` (a run), `evaluation.json`
(`pipeline evaluate`), `onnx/check.json` (an export). Out: one section per kind of figure, each named with its source.
What is not there is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.evaluation.finetuning.mlqa import moved_line
from pipeline.evaluation.languages import left_out_line
from pipeline.export.onnx import checked_on, int8_warning
from pipeline.runtime.json_files import read_json, read_points

STAGES = {"teacher": "teacher", "before": "student before training", "after": "student after training"}
POOLINGS = {"output": "output", "last_input": "input of the last layer", "values": "values of the distilled layer"}
SUFFIXES = {"output": "", "last_input": "_last_input", "values": "_values"}


def measured_sections(directories: Iterable[Path], steps: int | None) -> str:
    """Every figure that the directories hold of a student of so many steps."""
    parts: list[str] = []
    for directory in dict.fromkeys(directories):
        for name, section in (
            ("demo.json", _retrieval_of_demo),
            ("evaluation.json", _evaluation),
            ("onnx/check.json", _onnx),
        ):
            if (directory / name).is_file():
                found = read_json(directory / name)
                if name == "demo.json" and found.get("steps") != steps:
                    continue  # the run went on after the demo: these are figures of an earlier student
                parts += section(found)
        if (directory / "metrics.jsonl").is_file():
            parts += _heldout_of_run(directory / "metrics.jsonl")
    return "\n\n".join(parts)


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """First column to the left, figures to the right."""
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, rule, *rows])


def _retrieval_of_demo(report: dict[str, Any]) -> list[str]:
    means = [
        [f"{name}, {pooled}", f"{report[f'{stage}_mean{SUFFIXES[pooling]}']:.3f}"]
        for pooling, pooled in POOLINGS.items()
        for stage, name in STAGES.items()
    ]
    per_pair = report["per_pair"]
    by_language = [
        [name, *(f"{pair[stage]['output']:.3f}" for pair in per_pair.values())] for stage, name in STAGES.items()
    ]
    return [
        "### Cross-lingual retrieval\n\nOf the run's student, by `make demo`: share of sentences whose nearest neighbour in the other language is their "
        f"translation, both directions, mean of {len(per_pair)} language pairs with English.",
        markdown_table(["model, pooled from", "accuracy"], means),
        "Per language, pooled from the output:",
        markdown_table(["model", *per_pair], by_language),
        *filter(None, [_sentence(left_out_line({"after": report}))]),
    ]


def _evaluation(report: dict[str, Any]) -> list[str]:
    """Every task of one evaluation."""
    parts = []
    for task, results in report["tasks"].items():
        if task not in TABLES:
            raise UserError(
                f"an evaluation.json holds a task {task!r}, of which no table is known: {', '.join(TABLES)}"
            )
        parts += [f"### {task}, by `pipeline evaluate`", TABLES[task](results)]
        parts += filter(None, [_sentence(left_out_line(results))])
    return parts


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}." if text else ""


def _retrieval(results: dict[str, Any]) -> str:
    languages = list(next(iter(results.values()))["per_pair"])
    rows = [
        [f"{name}, {pooling}", *(f"{result['per_pair'][x][pooling]['mean']:.3f}" for x in languages), f"{mean:.3f}"]
        for name, result in results.items()
        for pooling, mean in result["mean"].items()
    ]
    return markdown_table(["model, pooled from", *languages, "mean"], rows)


def _heldout(results: dict[str, Any]) -> str:
    languages = list(next(iter(results.values()))["per_language"])
    rows = [
        [name, *(f"{result['per_language'][x]:.3f}" for x in languages), f"{result['mean']:.3f}"]
        for name, result in results.items()
    ]
    return markdown_table(["relation loss, lower is better", *languages, "mean"], rows)


def _speed(results: dict[str, Any]) -> str:
    shapes = list(next(iter(results.values()))["sentences_per_second"])
    rows = [
        [
            name,
            f"{result['parameters'] / 1e6:.1f}",
            f"{result['megabytes']:.0f}",
            *(f"{result['times_first'][shape]:.2f}x" for shape in shapes),
        ]
        for name, result in results.items()
    ]
    return markdown_table(["model; speed as times the first at batch x tokens", "M parameters", "MB", *shapes], rows)


def _sts(results: dict[str, Any]) -> str:
    files = list(next(iter(results.values()))["per_file"])
    rows = [
        [f"{name}, {pooling}", *(f"{result['per_file'][file][pooling]:.3f}" for file in files), f"{mean:.3f}"]
        for name, result in results.items()
        for pooling, mean in result["mean"].items()
    ]
    return markdown_table(["Spearman correlation, pooled from", *(Path(file).name for file in files), "mean"], rows)


def _xnli(results: dict[str, Any]) -> str:
    first = next(iter(results.values()))
    about = f"Accuracy in per cent, after fine-tuning on {first['train_pairs']:,} pairs of {first['train_language']}."
    return f"{about}\n\n{_by_language(results, {'accuracy': 'accuracy'})}"


def _mlqa(results: dict[str, Any]) -> str:
    about = f"In per cent, after fine-tuning on {next(iter(results.values()))['train_questions']:,} English questions."
    moved = _sentence(moved_line(next(iter(results.values()))))
    table = _by_language(results, {"f1": "F1", "exact_match": "exact match"})
    return "\n\n".join(filter(None, [about, table, moved]))


def _by_language(results: dict[str, Any], measures: dict[str, str]) -> str:
    """Test scores of the chosen place of the grid, and which place that was."""
    languages = list(next(iter(results.values()))["test"])
    rows = [
        [
            f"{name}, {title}",
            *(f"{result['test'][x][measure]:.1f}" for x in languages),
            f"{result['mean'][measure]:.1f}",
            f"{result['learning_rate']:g}",
            ", ".join(map(str, result["best_epochs"])),
        ]
        for name, result in results.items()
        for measure, title in measures.items()
    ]
    return markdown_table(["test", *languages, "average", "learning rate", "epoch"], rows)


def _heldout_of_run(path: Path) -> list[str]:
    """First and last held-out relation loss of every language."""
    points = read_points(path, needed=("step",))
    evaluations = [point for point in points if "heldout/mean" in point]
    if not evaluations:
        return []
    first, last = evaluations[0], evaluations[-1]
    tags = [tag for tag in last if tag.startswith("heldout/") and tag in first]
    rows = [[tag.removeprefix("heldout/"), f"{first[tag]:.3f}", f"{last[tag]:.3f}"] for tag in tags]
    return [
        "### Held-out relation loss\n\nOn rows that training never saw, against the teacher (the run's `metrics.jsonl`).",
        markdown_table(["language", f"step {first['step']}", f"step {last['step']}"], rows),
    ]


def _onnx(check: dict[str, Any]) -> list[str]:
    rows = [["torch", "", f"{check['torch']['retrieval_mean']:.3f}", "0"]]
    rows += [
        [
            f"ONNX {name}",
            f"{check['megabytes'][name]:.0f}",
            f"{check[name]['retrieval_mean']:.3f}",
            f"{check[name]['greatest_difference']:.1e}",
        ]
        for name in ("fp32", "int8")
    ]
    return [
        f"### ONNX files\n\nChecked against torch on {checked_on(check)} (`pipeline export --onnx`).",
        markdown_table(["", "MB", "retrieval", "greatest difference of a hidden state"], rows),
        *filter(None, [int8_warning(check)]),
    ]


TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    "heldout": _heldout,
    "retrieval": _retrieval,
    "sts": _sts,
    "xnli": _xnli,
    "mlqa": _mlqa,
    "speed": _speed,
}
