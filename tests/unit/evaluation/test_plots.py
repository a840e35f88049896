"""The picture of an evaluation shows the figures of every task, with the models side by side."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.evaluation.plots import draw, picture_of
from tests.unit.evaluation.questions import HAS_ALL_WINDOWS


def pair(to: float) -> dict[str, dict[str, float]]:
    return {"output": {"mean": to}, "values": {"mean": to / 2}}


RETRIEVAL = {
    "teacher": {"mean": {"output": 0.8, "values": 0.4}, "per_pair": {"de": pair(0.9), "ru": pair(0.7)}},
    "student": {"mean": {"output": 0.5, "values": 0.25}, "per_pair": {"de": pair(0.6), "ru": pair(0.4)}},
}
HELDOUT = {"student": {"mean": 0.3, "per_language": {"de": 0.2, "ru": 0.4}}}


def heights(figure, panel: int) -> dict[str, list[float]]:
    return {bars.get_label(): [bar.get_height() for bar in bars] for bars in figure.axes[panel].containers}


def test_bars_are_the_figures(tmp_path: Path) -> None:
    figure = picture_of({"heldout": HELDOUT, "retrieval": RETRIEVAL})
    assert [axes.get_title(loc="left") for axes in figure.axes] == [
        "held-out relation loss (lower is better)",
        "retrieval accuracy, pooled from output",
        "retrieval accuracy, pooled from values",
    ]
    assert heights(figure, 0) == {"student": [0.2, 0.4, 0.3]}
    assert heights(figure, 1) == {"teacher": [0.9, 0.7, 0.8], "student": [0.6, 0.4, 0.5]}
    assert heights(figure, 2)["student"] == pytest.approx([0.3, 0.2, 0.25])
    draw({"heldout": HELDOUT}, tmp_path / "evaluation.png")
    assert (tmp_path / "evaluation.png").read_bytes().startswith(b"\x89PNG")


def test_a_real_evaluation_has_every_panel(evaluated: Path) -> None:
    tasks = json.loads((evaluated / "evaluation.json").read_text())["tasks"]
    figure = picture_of(tasks)
    titles = [axes.get_title(loc="left").partition(",")[0] for axes in figure.axes]
    assert len(titles) == (13 if HAS_ALL_WINDOWS else 11), (
        "retrieval has three panels, MLQA and speed two, the others one"
    )
    accuracy = titles.index("XNLI accuracy in per cent")
    for number, (model, result) in enumerate(tasks["xnli"].items()):
        shown = list(heights(figure, accuracy).values())[number]
        assert shown == [*(scores["accuracy"] for scores in result["test"].values()), result["mean"]["accuracy"]], model
