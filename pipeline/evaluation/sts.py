"""Semantic textual similarity: how well the cosine of two sentence vectors ranks pairs as people do.

In: encoders and CSV or TSV files of sentence pairs with a score; columns are found by the names in a header line, and a
file without a header has exactly three columns; or `.jsonl` files (MTEB's layout), also `.gz`. Out: Spearman correlation per file, for each pooling.
"""

from __future__ import annotations

import csv
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.errors import UserError
from pipeline.evaluation.beir_data import json_lines
from pipeline.evaluation.encoder import POOLINGS, Encoder, sentence_vectors
from pipeline.evaluation.finetuning.labelled_pairs import header_positions
from pipeline.evaluation.tables import markdown_table, pooling_rows
from pipeline.evaluation.task import OnHub, Panel, Results, Task
from pipeline.recipe.ranges import LARGEST_BATCH, LONGEST_ROW, check_ranges
from pipeline.runtime.text_tables import text_table


@dataclass
class StsConfig:
    """Which files are scored, and how sentences are encoded."""

    files: list[str] = field(default_factory=list)  # .csv, .tsv, .jsonl or .jsonl.gz
    columns: list[str] = field(
        default_factory=lambda: ["sentence1", "sentence2", "score"]
    )  # names in a header or of JSON keys
    max_length: int = 128  # tokens; longer sentences are cut
    batch_size: int = 32  # sentences per forward
    prefix: str = ""  # put before every sentence, for encoders that were trained with one

    def __post_init__(self) -> None:
        if len(self.columns) != 3:
            raise UserError("sts.columns must name three columns: first sentence, second sentence, score")
        check_ranges(self, "sts", {"max_length": (3, LONGEST_ROW), "batch_size": (1, LARGEST_BATCH)})


@dataclass
class ScoredPairs:
    """One file."""

    first: list[str]
    second: list[str]
    scores: list[float]


def read_all(config: StsConfig) -> dict[str, ScoredPairs]:
    """Read all files: file name -> its pairs."""
    if not config.files:
        raise UserError(
            "the task sts needs files: --set 'sts.files=[pairs.tsv]' (CSV, TSV or JSONL; sentence, sentence, score)"
        )
    return {name: read_scored_pairs(Path(name), config.columns) for name in config.files}


def read_scored_pairs(path: Path, columns: list[str]) -> ScoredPairs:
    """Read one file. A bad line raises a `UserError` with its number."""
    if not path.is_file():
        raise UserError(f"file {path} not found. Name existing ones: --set 'sts.files=[pairs.tsv]'")
    pairs = ScoredPairs([], [], [])
    if path.name.endswith((".jsonl", ".jsonl.gz")):
        for where, line in json_lines(path):
            _add(pairs, [_cell(line, column, where) for column in columns], [0, 1, 2], where)
        return _ranked(pairs, path)
    rows = _read_rows(path)
    _, first = next(rows, ("", []))
    header = [name.strip().casefold() for name in first]
    positions, width = [0, 1, 2], len(first)
    if {column.casefold() for column in columns} <= set(header):
        positions = header_positions(header, columns, f"{path}, line 1")
    elif first:
        _check_columns(first, columns, path)
        _add(pairs, first, positions, f"{path}, line 1 (no header: it lacks {', '.join(columns)})")
    for where, row in rows:
        if len(row) != width:
            raise UserError(
                f"{where}: {len(row)} columns, the first line has {width}: {_shown(row)}. Correct or delete that line; in a .csv, "
                "a sentence with a comma is put in quotation marks."
            )
        _add(pairs, row, positions, where)
    return _ranked(pairs, path)


def _cell(row: dict[str, Any], column: str, where: str) -> str:
    value = row.get(column)
    if not isinstance(value, str | int | float) or isinstance(value, bool):
        raise UserError(
            f"{where}: `{column}` is {'missing' if value is None else 'neither text nor number'}; the line has {', '.join(row)[:200]}. "
            "Name its keys: --set 'sts.columns=[FIRST, SECOND, SCORE]'"
        )
    return str(value)


def _ranked(pairs: ScoredPairs, path: Path) -> ScoredPairs:
    if len(set(pairs.scores)) < 2:
        raise UserError(
            f"{path} holds {len(pairs.scores)} pair(s); a ranking needs at least two different scores. Name a file with scores "
            "(GLUE's test file has none)."
        )
    return pairs


def _read_rows(path: Path) -> Iterator[tuple[str, list[str]]]:
    """Yield (where, cells) of every line that is not blank.

    A cell with a line break raises a `UserError`: one stray quotation mark joins all pairs up to the next mark into one cell.
    """
    with open(path, encoding="utf-8-sig", newline="") as text:
        # STS files with tabs do not quote: a quotation mark is part of the sentence
        unquoted = path.suffix.lower() == ".tsv"
        rows = csv.reader(text, delimiter="\t", quoting=csv.QUOTE_NONE) if unquoted else csv.reader(text, strict=True)
        before = 0
        try:
            for row in rows:
                if rows.line_num > before + 1 and any("\n" in cell or "\r" in cell for cell in row):
                    raise UserError(
                        f"{path}, lines {before + 1} to {rows.line_num}: a cell with a line break. A stray quotation mark "
                        "joins all pairs up to the next mark. Double the quotation marks within a quoted cell, or write "
                        "the file tab-separated and unquoted, as .tsv."
                    )
                before = rows.line_num
                if any(cell.strip() for cell in row):
                    yield f"{path}, line {rows.line_num}", row
        except UnicodeDecodeError as error:
            raise UserError(f"{path}, after line {before}: not UTF-8 ({error}). Convert the file first.") from None
        except csv.Error as error:
            raise UserError(
                f"{path}, line {before + 1}: {error}. Double the quotation marks within a quoted cell, or write the file "
                "tab-separated and unquoted, as .tsv."
            ) from None


def _check_columns(first: list[str], columns: list[str], path: Path) -> None:
    """Without a header the columns are known only if there are exactly three."""
    if len(first) != 3:
        raise UserError(
            f"{path}, line 1: {len(first)} columns and no header with {', '.join(columns)}: {_shown(first)}. Add a header line "
            "with these names, give the names of your header with --set 'sts.columns=[FIRST, SECOND, SCORE]', or keep only "
            "sentence, sentence, score in the file (tabs separate columns in a .tsv, commas in any other file)."
        )


def _shown(cells: list[str]) -> str:
    return " | ".join(f"{cell[:20]!r}" for cell in cells[:10])


def _add(pairs: ScoredPairs, row: list[str], positions: list[int], where: str) -> None:
    cells = [row[position].strip() for position in positions]
    try:
        score = math.nan if "_" in cells[2] else float(cells[2])
    except ValueError:
        score = math.nan
    if not cells[0] or not cells[1] or not math.isfinite(score):
        raise UserError(
            f"{where}: expected sentence, sentence, number; got {_shown(cells)}. Correct or delete that line. "
            "For a header with other names: --set 'sts.columns=[FIRST, SECOND, SCORE]'."
        )
    pairs.first.append(cells[0])
    pairs.second.append(cells[1])
    pairs.scores.append(score)


def evaluate_sts(encoders: list[Encoder], config: StsConfig) -> dict[str, dict[str, Any]]:
    """Per model: Spearman correlation per file and pooling, and the mean over files."""
    files = read_all(config)
    results = {}
    for encoder in encoders:
        encoder.check_max_length(config.max_length, "sts.max_length")
        per_file = {name: score_file(encoder, pairs, config) for name, pairs in files.items()}
        mean = {pooling: sum(file[pooling] for file in per_file.values()) / len(per_file) for pooling in POOLINGS}
        num_pairs = {name: len(pairs.scores) for name, pairs in files.items()}
        about = {"num_pairs": num_pairs, "sentence_pooling": encoder.pooling.name}
        results[encoder.name] = {"mean": mean, "per_file": per_file, **about}
    return results


def score_file(encoder: Encoder, pairs: ScoredPairs, config: StsConfig) -> dict[str, float]:
    """Pooling -> Spearman correlation of the cosines and the scores of one file."""
    texts = [config.prefix + text for text in pairs.first + pairs.second]
    vectors, _ = sentence_vectors(encoder, texts, config.max_length, config.batch_size)
    half = len(pairs.first)
    found = {}
    for pooling, rows in vectors.items():
        cosines = (rows[:half] * rows[half:]).sum(dim=1).numpy()
        if len(np.unique(cosines)) < 2:
            print(
                f"warning: {encoder.name}, {pooling}: all pairs are equally alike, so there is no ranking and the correlation is 0",
                file=sys.stderr,
            )
        found[pooling] = spearman(cosines, np.array(pairs.scores))
    return found


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's correlation: Pearson's correlation of the ranks. It is 0 if all values of one side are equal."""
    if len(np.unique(a)) < 2 or len(np.unique(b)) < 2:
        return 0.0
    return float(np.corrcoef(ranks(a), ranks(b))[0, 1])


def ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1; equal values get the mean of their ranks."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[inverse]


def sts_table(results: Results) -> str:
    """One row per model and pooling: Spearman correlation per file and the mean."""
    files = next(iter(results.values()))["per_file"]
    header = ["model", "pooled from", *(Path(name).stem[-16:] for name in files), "mean"]
    columns = ["<12", *[">18"] * (len(files) + 1)]
    return text_table(
        "semantic textual similarity, Spearman correlation", header, pooling_rows(results, "per_file"), columns
    )


def _card(results: Results) -> str:
    files = next(iter(results.values()))["per_file"]
    rows = [[f"{name}, {pooling}", *cells] for name, pooling, *cells in pooling_rows(results, "per_file")]
    return markdown_table(["Spearman correlation, pooled from", *(Path(file).name for file in files), "mean"], rows)


def _panels(results: Results) -> list[Panel]:
    values = {
        model: {
            f"{Path(file).stem}: {pooling}": figure
            for file, poolings in {**result["per_file"], "mean": result["mean"]}.items()
            for pooling, figure in poolings.items()
        }
        for model, result in results.items()
    }
    return [Panel("semantic textual similarity, Spearman correlation", values)]


TASK = Task(
    name="sts",
    settings=StsConfig,
    check=read_all,
    evaluate=lambda encoders, settings, ranks, directory: evaluate_sts(encoders, settings),
    table=sts_table,
    panels=_panels,
    card=_card,
    on_hub=OnHub("sentence-similarity", "Semantic textual similarity", {"output": "spearmanr"}),
    place=30,
)
