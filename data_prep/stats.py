"""`stats`: the contents of a shard directory for each language, and their shares in a planned run, as a table and a plot.

In: a `ShardSet`, the sampling temperature, and the size of the run. Out: a Markdown table, and a PNG file.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_prep.quality import QUALITY_COLUMNS, Quality, qualities, quality_cells
from data_prep.shards import DataError, ShardSet


@dataclass
class LanguageStats:
    """One row of the table."""

    language: str
    documents: int
    tokens: int
    text_bytes: int
    shard_bytes: int
    raw_share: float
    share: float  # of the planned run, at its temperature
    epochs: float | None  # passes over the language in the planned run
    quality: Quality


def collect(shards: ShardSet, alpha: float, seq_len: int, num_samples: int | None) -> list[LanguageStats]:
    """The row of every language. A share p of the tokens becomes p**alpha, normalised; `num_samples` is the run's number of rows."""
    tokens = np.array([shards.num_tokens(language) for language in shards.languages], dtype=np.float64)
    if not tokens.sum():
        raise DataError(f"{shards.path} holds no tokens.")
    raw = tokens / tokens.sum()
    smoothed = np.where(tokens > 0, raw**alpha, 0)
    smoothed /= smoothed.sum()
    quality = qualities(shards)
    rows = [shards.num_rows(language, seq_len) for language in shards.languages]
    return [
        LanguageStats(
            language=language,
            documents=shards.num_documents(language),
            tokens=shards.num_tokens(language),
            text_bytes=shards.num_bytes(language),
            shard_bytes=sum(shard.num_bytes for shard in shards.shards(language)),
            raw_share=float(raw[index]),
            share=float(smoothed[index]),
            epochs=num_samples * float(smoothed[index]) / rows[index] if num_samples and rows[index] else None,
            quality=quality[index],
        )
        for index, language in enumerate(shards.languages)
    ]


def table(rows: list[LanguageStats], alpha: float) -> str:
    """A Markdown table with a row for each language and a row of totals."""
    lines = [
        f"| language | documents | tokens | text MB | shards MB | share | share at alpha {alpha:g} | epochs "
        f"| {QUALITY_COLUMNS} |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---|",
    ]
    for row in rows:
        epochs = "" if row.epochs is None else f"{row.epochs:.2f}"
        lines.append(
            f"| {row.language} | {row.documents:,} | {row.tokens:,} | {row.text_bytes / 1e6:.2f} "
            f"| {row.shard_bytes / 1e6:.2f} | {row.raw_share:.2%} | {row.share:.2%} | {epochs} | {quality_cells(row.quality)} |"
        )
    lines.append(
        f"| all {len(rows)} | {sum(row.documents for row in rows):,} | {sum(row.tokens for row in rows):,} "
        f"| {sum(row.text_bytes for row in rows) / 1e6:.2f} | {sum(row.shard_bytes for row in rows) / 1e6:.2f} "
        "| 100% | 100% | | | | | |"
    )
    return "\n".join(lines)


def draw(rows: list[LanguageStats], alpha: float, path: Path) -> None:
    """Write a PNG with each language's share before and after sampling, and below it the epochs of a planned run."""
    from matplotlib.figure import Figure

    ordered = sorted(rows, key=lambda row: -row.tokens)
    names, places = [row.language for row in ordered], np.arange(len(ordered))
    with_epochs = any(row.epochs is not None for row in ordered)
    figure = Figure(figsize=(max(6.0, 0.32 * len(rows)), 6 if with_epochs else 3.5), layout="tight")
    top, *below = figure.subplots(2 if with_epochs else 1, 1, squeeze=False)[:, 0]
    top.bar(places - 0.2, [100 * row.raw_share for row in ordered], 0.4, label="share of the text")
    top.bar(places + 0.2, [100 * row.share for row in ordered], 0.4, label=f"alpha {alpha:g}")
    top.set_ylabel("share of tokens, %")
    top.legend()
    for axis in below:
        axis.bar(places, [row.epochs or 0 for row in ordered], 0.6, color="tab:green")
        axis.set_yscale("log")
        axis.set_ylabel("epochs in the planned run")
    for axis in figure.axes:
        axis.set_xticks(places, names, rotation=90)
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        raise DataError(f"Cannot write the plot {path}: {error}.") from error
