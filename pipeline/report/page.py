"""The page about one student.

In: the files of a run (recipe.yaml, run.json, restarts.json, metrics.jsonl, TensorBoard images, checkpoints, retrieval
results, an evaluation). Out: a page with curves, tables, relation maps and the recipe; it loads nothing over the network.
"""

from __future__ import annotations

import html
from pathlib import Path
from typing import Any

from pipeline.comparison.students import (
    median_speed,
    newest_state,
    paths_of,
    points_until_end,
    read_recipe,
    read_recipe_tree,
)
from pipeline.config import as_tree
from pipeline.errors import UserError
from pipeline.evaluation.encoder import POOLINGS
from pipeline.evaluation.languages import left_out_line
from pipeline.evaluation.tables import heldout_rows
from pipeline.report import plots
from pipeline.report import timeline as times
from pipeline.report.html_parts import Page, facts_table, page_of, table
from pipeline.report.loss_parts import loss_parts, loss_table, sum_note
from pipeline.report.relation_maps import relation_maps
from pipeline.report.retrieval import read_retrieval
from pipeline.report.state import progress_facts, run_state
from pipeline.runtime.checkpoint_files import committed_steps
from pipeline.runtime.json_files import read_json_if_there, read_points
from pipeline.runtime.run_paths import RunPaths

RECIPE_ROWS = {
    "teacher": "teacher",
    "vocabulary": "vocabulary",
    "data": "shards",
    "steps": "steps",
    "global_batch": "rows per step",
    "seq_len": "tokens per row",
    "alpha": "language temperature",
    "relations": "relations",
    "student": "student",
    "optimizer": "optimizer",
}
NOT_ONE_CHART = (
    "It is the sum of the weighted relation losses, without a term for the output, and every language counts the same. The "
    "training loss has all terms and follows the mixture of languages, so the two are not in one chart."
)
MAPS = (
    "How strongly every token of one row is related to every other, in the first relation heads. Bright means strongly. A student "
    "that has learned its teacher's relations has the same pictures."
)
MARKS = "Green lines are checkpoints, red dashes are restarts."


def render(run_dir: Path, student: str = "") -> str:
    """The complete page about one student. A section without content is left out."""
    paths = paths_of(run_dir, student)
    metrics = read_metrics(paths)
    about, recipe = read_json_if_there(paths.description), _read_recipe(paths.recipe)
    full = read_recipe(paths.recipe) if paths.recipe.is_file() else None
    parts = loss_parts(metrics, full.relations if full else None)
    state = run_state(paths, metrics, full.steps if full else None, newest_state(paths))
    events = times.events_of(run_dir, metrics, committed_steps(paths.checkpoints), student)
    retrieval = read_retrieval(paths, metrics[-1]["step"], recipe.get("teacher"))
    compared = "Retrieval before and after" if "before" in retrieval else "Retrieval"
    languages = (
        "On rows that training never saw (logarithmic); the three lowest and the three highest languages are named."
    )
    sections = [
        ("Loss", f"Training loss of single steps (logarithmic). {sum_note(metrics, parts)}",
         plots.loss_curves(metrics, parts) + loss_table(metrics, parts)),
        ("Held-out loss per language", languages, plots.heldout_curves(metrics) + heldout_note(metrics) + heldout_table(metrics)),
        (compared, "Share of sentences whose nearest neighbour in the other language is their "
         "translation, both directions.", retrieval_section(retrieval)),
        ("Throughput", f"Tokens per second. {MARKS}", plots.throughput(metrics, events)),
        ("Where the time goes", "Shares of the training time on one device, saves and evaluations left out.",
         plots.time_shares(metrics)),
        ("Learning rate and health", MARKS, plots.health(metrics, events)),
        ("Time line", "Finished steps against time. Green dots are checkpoints, red dashes are restarts.", plots.time_line(events)),
        ("Relation maps", MAPS, relation_maps(paths, full, about)),
        ("Cost", "", facts_table(times.cost(metrics, events, about, recipe.get("seq_len")))),
        ("Recipe", "The settings of the run, and the machine that it ran on.", recipe_section(paths, recipe)),
    ]  # fmt: skip
    name = f"{run_dir.resolve().name}{f', {student}' if student else ''}"
    shown = {**progress_facts(metrics, full.steps if full else None, state), **facts(metrics, retrieval)}
    return page_of(Page(name, subtitle(about, recipe), shown, state.html()), sections)


def read_metrics(paths: RunPaths) -> times.Points:
    """The points of `metrics.jsonl`. A line that is still being written is left out."""
    path = paths.metrics
    if not path.is_file():
        raise UserError(
            f"{path} is missing: {paths.directory} is not a run directory, or its training has not started."
        )
    if not (points := points_until_end(read_points(path), newest_state(paths))):
        raise UserError(f"{path} is empty: the training has not reported anything yet. Try again in a minute.")
    return points


def subtitle(about: dict[str, Any], recipe: dict[str, Any]) -> str:
    """One line: student, teacher, languages, devices and commit."""
    student = recipe.get("student", {})
    parts = []
    if isinstance(student, dict) and {"layers", "hidden"} <= student.keys():
        parts.append(f"a {student['layers']} x {student['hidden']} student of {recipe.get('teacher')}")
    if about:
        parts.append(f"{len(about.get('languages', []))} languages")
        parts.append(f"{about.get('world_size')} x {about.get('device')}, {about.get('precision')}")
        parts.append(f"commit {about.get('git_commit')}")
    return html.escape(" · ".join(parts))


def facts(metrics: times.Points, retrieval: dict[str, dict[str, Any]]) -> dict[str, str]:
    """The figures at the top, after those of the progress."""
    heldout = times.series(metrics, "heldout/mean")
    speed = median_speed(metrics)
    shown = {"rows seen": f"{metrics[-1]['samples']:,}"}
    if heldout:
        shown["held-out loss"] = " → ".join(f"{value:.3f}" for _, value in (heldout[0], heldout[-1])[: len(heldout)])
    if {"before", "after"} <= retrieval.keys():
        before, after = (retrieval[stage]["mean"]["output"] for stage in ("before", "after"))
        shown["retrieval"] = f"{before:.3f} → {after:.3f}"
    elif "student" in retrieval:
        shown["retrieval"] = f"{retrieval['student']['mean']['output']:.3f}"
    if speed is not None:
        shown["tokens per second"] = f"{speed:,.0f}"
    return shown


def heldout_note(metrics: times.Points) -> str:
    """Why this loss is in no chart together with the training loss."""
    return f'<p class="note">{NOT_ONE_CHART}</p>' if times.series(metrics, "heldout/mean") else ""


def heldout_table(metrics: times.Points) -> str:
    """A folded table: first and last held-out loss of every language."""
    if not (rows := heldout_rows(metrics, 4)):
        return ""
    return f"<details><summary>all {len(rows) - 2} languages</summary>{table(rows[0], rows[1:])}</details>"


def retrieval_section(results: dict[str, dict[str, Any]]) -> str:
    """Accuracy of every evaluated model: bars of the means, and a table of all languages."""
    if not results:
        return ""
    languages = list(next(iter(results.values()))["per_pair"])
    rows = [
        [
            stage,
            POOLINGS[pooling],
            *(f"{result['per_pair'][x][pooling]['mean']:.3f}" for x in languages),
            f"{result['mean'][pooling]:.3f}",
        ]
        for pooling in POOLINGS
        for stage, result in results.items()
    ]
    content = table(["model", "pooled from", *languages, "mean"], rows, "two")
    left_out = html.escape(left_out_line(results))
    return plots.retrieval_bars(results, POOLINGS) + content + (f'<p class="note">{left_out}</p>' if left_out else "")


def recipe_section(paths: RunPaths, recipe: dict[str, Any]) -> str:
    """The main keys as a table; recipe, run.json and DeepSpeed config as folded text."""
    rows = {label: _short(recipe[key]) for key, label in RECIPE_ROWS.items() if recipe.get(key) is not None}
    parts = [facts_table(rows)] if rows else []
    for path in (paths.recipe, paths.description, paths.deepspeed):
        if path.is_file():
            text = html.escape(path.read_text(encoding="utf-8"))
            parts.append(f"<details><summary>{path.name}</summary><pre>{text}</pre></details>")
    return "\n".join(parts)


def _short(value: Any) -> str:
    """A value or a section of the recipe on one line, without keys that are not set."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {_short(item)}" for key, item in value.items() if item not in (None, [], False))
    if isinstance(value, list):
        return " ".join(_short(item) for item in value)
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _read_recipe(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    tree = as_tree(read_recipe(path))
    return {key: tree[key] for key in read_recipe_tree(path)}
