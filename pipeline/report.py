"""One self-contained HTML page about a run, for people who would rather look than read.

    python -m pipeline report runs/quickstart            writes runs/quickstart/report.html

In: what a run leaves behind (recipe.yaml, run.json, metrics.jsonl, TensorBoard images, checkpoints, retrieval results).
Out: a page with curves, tables, relation maps and the recipe; it loads nothing from anywhere. Works on a running run.
"""

from __future__ import annotations

import argparse
import base64
import html
import json
from pathlib import Path
from typing import Any

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pipeline import report_plots as plots
from pipeline.errors import UserError
from pipeline.runtime.checkpoint import committed_steps

POOLING_NAMES = {"output": "output", "last_input": "input of the last layer", "values": "values of the distilled layer"}
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin-top: 2.2rem; border-bottom: 1px solid #ddd }
.facts { display: flex; flex-wrap: wrap; gap: .6rem }
.fact { background: #f4f5f7; border-radius: .4rem; padding: .4rem .8rem } .fact b { display: block; font-size: 1.15rem }
table { border-collapse: collapse; font-variant-numeric: tabular-nums } td, th { padding: .15rem .6rem; text-align: right }
td:first-child, th:first-child, td:nth-child(2), th:nth-child(2) { text-align: left } tr:nth-child(even) { background: #f7f7f9 }
svg, img { max-width: 100%; height: auto } pre { background: #f4f5f7; padding: .8rem; overflow-x: auto }
img { image-rendering: pixelated; width: 100%; border: 1px solid #ddd }
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="what --run-dir of the training named")
    parser.add_argument("--output", type=Path, help="default: report.html in the run directory")


def run(arguments: argparse.Namespace) -> None:
    output = arguments.output or arguments.run_dir / "report.html"
    page = render(arguments.run_dir)
    temporary = output.with_name(output.name + ".tmp")
    temporary.write_text(page, encoding="utf-8")
    temporary.replace(output)
    print(f"report: {output} ({output.stat().st_size / 1e6:.1f} MB)")


def render(run_dir: Path) -> str:
    """The whole page."""
    metrics = read_metrics(run_dir)
    sections = [
        ("Loss", plots.loss_curves(metrics)),
        ("Held-out relation loss per language", plots.heldout_curves(metrics) + heldout_table(metrics)),
        ("Is it fast? Is it healthy?", plots.speed_and_health(metrics, committed_steps(run_dir / "checkpoints"))),
        ("Cross-lingual retrieval", retrieval_section(run_dir)),
        ("Relation maps: teacher above, student below, one column per head", relation_maps(run_dir)),
        ("Where it comes from", lineage_section(run_dir)),
    ]
    body = "\n".join(f"<h2>{html.escape(title)}</h2>\n{content}" for title, content in sections if content)
    name = html.escape(run_dir.resolve().name)
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{name}</title><style>{STYLE}</style></head>'
        f"<body>\n<h1>Run {name}</h1>\n{facts(run_dir, metrics)}\n{body}\n</body></html>\n"
    )


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The points of `metrics.jsonl`; a line that is still being written is left out."""
    path = run_dir / "metrics.jsonl"
    if not path.is_file():
        raise UserError(f"{path} is missing: {run_dir} is no run directory, or its training never began.")
    points = []
    for line in path.read_text(encoding="utf-8").split("\n"):
        if line.endswith("}"):
            points.append(json.loads(line))
    if not points:
        raise UserError(f"{path} is empty: the training has not reported anything yet. Try again in a minute.")
    return points


def facts(run_dir: Path, metrics: list[dict[str, Any]]) -> str:
    """The figures at the top."""
    marker = next((name for name in ("DONE", "PREEMPTED") if (run_dir / name).is_file()), "no end marker")
    last = metrics[-1]
    heldout = plots.series(metrics, "heldout/mean")
    speeds = sorted(value for _, value in plots.series(metrics, "speed/tokens_per_second"))
    shown = {"state": marker, "steps": f"{last['step']:,}", "rows seen": f"{last['samples']:,}"}
    if heldout:
        shown["held-out loss, first to last"] = f"{heldout[0][1]:.3f} → {heldout[-1][1]:.3f}"
    if speeds:
        shown["tokens per second, median"] = f"{speeds[len(speeds) // 2]:,.0f}"
    shown["hours from first to last line"] = f"{(last['time_s'] - metrics[0]['time_s']) / 3600:.2f}"
    cells = "".join(
        f'<div class="fact">{html.escape(label)}<b>{html.escape(text)}</b></div>' for label, text in shown.items()
    )
    return f'<div class="facts">{cells}</div>'


def heldout_table(metrics: list[dict[str, Any]]) -> str:
    """First and last held-out loss of every language."""
    evaluations = [point for point in metrics if "heldout/mean" in point]
    if not evaluations:
        return ""
    first, last = evaluations[0], evaluations[-1]
    names = [tag for tag in last if tag.startswith("heldout/")]
    rows = [[tag.removeprefix("heldout/"), f"{first[tag]:.4f}", f"{last[tag]:.4f}"] for tag in names if tag in first]
    return table(["language", f"step {first['step']}", f"step {last['step']}"], rows)


def retrieval_section(run_dir: Path) -> str:
    """Accuracy of every evaluated model, from `retrieval/*.json` that the demo and evaluations leave."""
    results = {
        stage: json.loads(path.read_text(encoding="utf-8"))["result"]
        for stage in ("teacher", "before", "after")
        if (path := run_dir / "retrieval" / f"{stage}.json").is_file()
    }
    if not results:
        return ""
    languages = list(next(iter(results.values()))["per_pair"])
    rows = [
        [
            stage,
            POOLING_NAMES[pooling],
            *(f"{result['per_pair'][x][pooling]['mean']:.3f}" for x in languages),
            f"{mean:.3f}",
        ]
        for pooling in POOLING_NAMES
        for stage, result in results.items()
        for mean in [result["mean"][pooling]]
    ]
    return plots.retrieval_bars(results) + table(["model", "pooled from", *languages, "mean"], rows)


def relation_maps(run_dir: Path) -> str:
    """The first and the last image of every relation, out of the TensorBoard files."""
    board = run_dir / "tensorboard"
    if not board.is_dir():
        return ""
    events = EventAccumulator(str(board), size_guidance={"images": 0, "scalars": 1})
    events.Reload()
    parts = []
    for tag in events.Tags()["images"]:
        images = events.Images(tag)
        for image in (images[0], images[-1])[: len(images)]:
            data = base64.b64encode(image.encoded_image_string).decode()
            parts.append(
                f'<p>{html.escape(tag)}, step {image.step}<br><img alt="" src="data:image/png;base64,{data}"></p>'
            )
    return "\n".join(parts)


def lineage_section(run_dir: Path) -> str:
    """Run facts, recipe and DeepSpeed config, folded away."""
    parts = []
    for name in ("run.json", "recipe.yaml", "deepspeed.json"):
        if (run_dir / name).is_file():
            text = html.escape((run_dir / name).read_text(encoding="utf-8"))
            parts.append(f"<details><summary>{name}</summary><pre>{text}</pre></details>")
    return "\n".join(parts)


def table(header: list[str], rows: list[list[str]]) -> str:
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    body = "\n".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><tr>{head}</tr>\n{body}</table>"
