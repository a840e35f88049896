"""Write one self-contained HTML page about a run.

    python -m pipeline report runs/quickstart            writes runs/quickstart/report.html

In: the files of a run (recipe.yaml, run.json, restarts.json, metrics.jsonl, TensorBoard images, checkpoints, retrieval
results, an evaluation). Out: a page with curves, tables, relation maps and the recipe; it loads nothing over the network.
The run may still be running.
"""

from __future__ import annotations

import argparse
import base64
import html
import io
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from data_prep.durable_files import replace_file
from data_prep.outputs import output_path
from pipeline.config import Recipe, as_tree, build_recipe
from pipeline.errors import UserError
from pipeline.evaluation.encoder import POOLINGS
from pipeline.evaluation.languages import left_out_line
from pipeline.evaluation.tables import heldout_rows
from pipeline.recipe.text import read_yaml
from pipeline.report import plots
from pipeline.report import timeline as times
from pipeline.report.retrieval import read_retrieval
from pipeline.runtime.checkpoint_files import committed_steps
from pipeline.runtime.json_files import read_json_if_there, read_points
from pipeline.runtime.run_paths import RunPaths

MAPS_COLORS = "magma"
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
LOADS_NOTHING = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"  # browsers enforce this policy
MARKS = "Green lines are checkpoints, red dashes are restarts."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="what --run-dir of the training named")
    parser.add_argument("--output", type=output_path, help="default: report.html in the run directory")


def run(arguments: argparse.Namespace) -> None:
    output = arguments.output or arguments.run_dir / "report.html"
    replace_file(output, render(arguments.run_dir))
    print(f"report: {output} ({output.stat().st_size / 1e6:.1f} MB)")


def render(run_dir: Path) -> str:
    """The complete page. A section without content is left out."""
    metrics = read_metrics(run_dir)
    paths = RunPaths(run_dir)
    about, recipe = read_json_if_there(paths.description), _read_recipe(paths.recipe)
    events = times.events_of(run_dir, metrics, committed_steps(paths.checkpoints))
    retrieval = read_retrieval(run_dir, metrics[-1]["step"], recipe.get("teacher"))
    compared = "Retrieval before and after" if "before" in retrieval else "Retrieval"
    languages = "On rows that training never saw; the three lowest and the three highest languages are named."
    sections = [
        ("Loss", "Training loss: the sum, and each relation (logarithmic).", plots.loss_curves(metrics)),
        ("Held-out loss per language", languages, plots.heldout_curves(metrics) + heldout_table(metrics)),
        (compared, "Share of sentences whose nearest neighbour in the other language is their "
         "translation, both directions.", retrieval_section(retrieval)),
        ("Throughput", f"Tokens per second. {MARKS}", plots.throughput(metrics, events)),
        ("Where the time goes", "Shares of the training time on one device, saves and evaluations left out.",
         plots.time_shares(metrics)),
        ("Learning rate and health", MARKS, plots.health(metrics, events)),
        ("Time line", "Finished steps against time. Green dots are checkpoints, red dashes are restarts.", plots.time_line(events)),
        ("Relation maps", "One row of text, one column per relation head: teacher above, student below. "
         "Bright means a strong relation.", relation_maps(run_dir)),
        ("Cost", "", facts_table(times.cost(metrics, events, about, recipe.get("seq_len")))),
        ("Recipe", "The settings of the run, and the machine that it ran on.", recipe_section(run_dir, recipe)),
    ]  # fmt: skip
    shown = [(title, note, content) for title, note, content in sections if content]
    body = "\n".join(
        f'<section id="{anchor(title)}"><h2>{title}</h2>'
        + (f'\n<p class="note">{note}</p>' if note else "")
        + f"\n{content}</section>"
        for title, note, content in shown
    )
    links = "".join(f'<a href="#{anchor(title)}">{title}</a>' for title, _, _ in shown)
    name = html.escape(run_dir.resolve().name)
    style = Path(__file__).with_suffix(".css").read_text(encoding="utf-8")
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{LOADS_NOTHING}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
        f"<title>{name}</title><style>{style}</style></head>\n<body>\n<header><h1>{name}</h1>\n"
        f"<p>{subtitle(about, recipe)}</p></header>\n<nav>{links}</nav>\n{facts(run_dir, metrics, retrieval)}\n{body}\n"
        "</body></html>\n"
    )


def anchor(title: str) -> str:
    return re.sub(r"[^a-z]+", "-", title.lower())


def read_metrics(run_dir: Path) -> times.Points:
    """The points of `metrics.jsonl`. A line that is still being written is left out."""
    path = RunPaths(run_dir).metrics
    if not path.is_file():
        raise UserError(f"{path} is missing: {run_dir} is not a run directory, or its training has not started.")
    if not (points := read_points(path)):
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


def facts(run_dir: Path, metrics: times.Points, retrieval: dict[str, dict[str, Any]]) -> str:
    """The figures at the top."""
    marker = next((path.name for path in RunPaths(run_dir).end_markers if path.is_file()), "no end marker")
    heldout = times.series(metrics, "heldout/mean")
    speeds = sorted(value for _, value in times.series(metrics, "speed/tokens_per_second"))
    shown = {"state": marker, "steps": f"{metrics[-1]['step']:,}", "rows seen": f"{metrics[-1]['samples']:,}"}
    if heldout:
        shown["held-out loss"] = f"{heldout[0][1]:.3f} → {heldout[-1][1]:.3f}"
    if {"before", "after"} <= retrieval.keys():
        before, after = (retrieval[stage]["mean"]["output"] for stage in ("before", "after"))
        shown["retrieval"] = f"{before:.3f} → {after:.3f}"
    elif "student" in retrieval:
        shown["retrieval"] = f"{retrieval['student']['mean']['output']:.3f}"
    if speeds:
        shown["tokens per second"] = f"{speeds[len(speeds) // 2]:,.0f}"
    cells = "".join(
        f'<div class="fact">{html.escape(label)}<b>{html.escape(text)}</b></div>' for label, text in shown.items()
    )
    return f'<div class="facts">{cells}</div>'


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


def relation_maps(run_dir: Path) -> str:
    """The first and the last image of every relation, from the TensorBoard files."""
    board = run_dir / "tensorboard"
    if not board.is_dir():
        return ""
    events = EventAccumulator(str(board), size_guidance={"images": 0, "scalars": 1})
    events.Reload()
    parts = []
    for tag in events.Tags()["images"]:
        images = events.Images(tag)
        for image in (images[0], images[-1])[: len(images)]:
            caption = f"{html.escape(tag.removeprefix('relations/'))}, step {image.step}"
            data = base64.b64encode(colored(image.encoded_image_string)).decode()
            parts.append(
                f"<figure><figcaption>{caption}</figcaption>"
                f'<img alt="relation map {caption}" src="data:image/png;base64,{data}"></figure>'
            )
    return f'<div class="maps">{"".join(parts)}</div>' if parts else ""


def colored(png: bytes) -> bytes:
    """The grey PNG as a PNG with a palette from dark violet to bright yellow."""
    grey = Image.open(io.BytesIO(png)).convert("L")
    picture = Image.fromarray(np.asarray(grey))
    palette = (matplotlib.colormaps[MAPS_COLORS](np.arange(256))[:, :3] * 255).astype(np.uint8)
    picture.putpalette(palette.tobytes())
    out = io.BytesIO()
    picture.save(out, format="png", optimize=True)
    return out.getvalue()


def recipe_section(run_dir: Path, recipe: dict[str, Any]) -> str:
    """The main keys as a table; recipe, run.json and DeepSpeed config as folded text."""
    rows = {label: _short(recipe[key]) for key, label in RECIPE_ROWS.items() if recipe.get(key) is not None}
    parts = [facts_table(rows)] if rows else []
    paths = RunPaths(run_dir)
    for path in (paths.recipe, paths.description, paths.deepspeed):
        if path.is_file():
            text = html.escape(path.read_text(encoding="utf-8"))
            parts.append(f"<details><summary>{path.name}</summary><pre>{text}</pre></details>")
    return "\n".join(parts)


def facts_table(rows: dict[str, str]) -> str:
    """A table with one label and one figure per line."""
    cells = "\n".join(f"<tr><td>{html.escape(a)}</td><td>{html.escape(b)}</td></tr>" for a, b in rows.items())
    return f'<table class="facts-table">{cells}</table>'


def table(header: list[str], rows: list[list[str]], kind: str = "") -> str:
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    body = "\n".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table class="{kind}"><tr>{head}</tr>\n{body}</table></div>'


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
    # A run of another version may have further keys; the page shows the file as well.
    known = {field.name for field in fields(Recipe)}
    given = {key: value for key, value in read_yaml(path).items() if key in known}
    try:
        tree = as_tree(build_recipe(given))
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return {key: value for key, value in tree.items() if key in given}
