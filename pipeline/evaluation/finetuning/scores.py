"""The results of a fine-tuning grid as a table, a plot and a section of the model card.

In: results as `grid.choose` returns them, by model. Out: text, a panel, Markdown.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from pipeline.evaluation.languages import marked
from pipeline.evaluation.tables import markdown_table
from pipeline.evaluation.task import Panel, Results
from pipeline.runtime.text_tables import text_table


def score_table(
    title: str, dev_title: str, results: Results, text_of: Callable[[dict[str, float]], str], notes: Iterable[str]
) -> str:
    """One row per model: the scores per language and their average, the development mean and the chosen grid point.

    Args:
        dev_title: title of the column with the development mean
        text_of: the text of one language's scores; all texts have the same width
    """
    rows = [
        [
            name,
            *map(text_of, [*result["test"].values(), result["mean"]]),
            f"{result['dev_mean']:.1f}",
            f"lr {result['learning_rate']:g}, epoch {_epochs(result)}",
        ]
        for name, result in results.items()
    ]
    languages = [*marked(_first(results)["test"], results), "average"]
    columns = [*[f">{len(rows[0][1])}"] * len(languages), ">9", "<1"]
    return text_table(title, ["model", *languages, dev_title, "chosen"], rows, columns, notes)


def score_panel(title: str, results: Results, measure: str) -> Panel:
    """The scores of every language and their average."""
    values = {
        model: {**{x: scores[measure] for x, scores in result["test"].items()}, "average": result["mean"][measure]}
        for model, result in results.items()
    }
    return Panel(title, values)


def score_card(results: Results, measures: dict[str, str]) -> str:
    """A Markdown table. `measures`: key of a measure -> its title."""
    rows = [
        [
            f"{name}, {title}",
            *(f"{scores[measure]:.1f}" for scores in (*result["test"].values(), result["mean"])),
            f"{result['learning_rate']:g}",
            _epochs(result),
        ]
        for name, result in results.items()
        for measure, title in measures.items()
    ]
    return markdown_table(
        ["test", *marked(_first(results)["test"], results), "average", "learning rate", "epoch"], rows
    )


def _first(results: Results) -> dict[str, Any]:
    return next(iter(results.values()))


def _epochs(result: dict[str, Any]) -> str:
    return ", ".join(map(str, result["best_epochs"]))
