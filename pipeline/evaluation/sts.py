"""Semantic textual similarity: does the cosine of two sentences' vectors rank pairs as people do?

In: an encoder and CSV or TSV files of sentence pairs with a score. Out: Spearman correlation per file, for each way of
pooling. Columns are found by the names in a header line, or are the first three. Used by `pipeline evaluate`.
"""

from __future__ import annotations

import csv
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.errors import UserError
from pipeline.evaluation.encoder import POOLINGS, Encoder, sentence_vectors


@dataclass
class StsConfig:
    """Which files are scored, and how sentences are encoded."""

    files: list[str] = field(default_factory=list)  # .csv or .tsv
    columns: list[str] = field(default_factory=lambda: ["sentence1", "sentence2", "score"])  # names in a header line
    max_length: int = 128  # tokens; longer sentences are cut
    batch_size: int = 32
    prefix: str = ""  # put before every sentence, for encoders that were trained with one

    def __post_init__(self) -> None:
        if len(self.columns) != 3:
            raise UserError("sts.columns must name three columns: first sentence, second sentence, score")
        if self.max_length < 3 or self.batch_size < 1:
            raise UserError("sts.max_length must be at least 3 and sts.batch_size at least 1")


@dataclass
class ScoredPairs:
    """One file."""

    first: list[str]
    second: list[str]
    scores: list[float]


def read_all(config: StsConfig) -> dict[str, ScoredPairs]:
    """File name -> its pairs."""
    if not config.files:
        raise UserError(
            "the task sts needs files: --set 'sts.files=[pairs.tsv]' (CSV or TSV; sentence, sentence, score)"
        )
    return {name: read_scored_pairs(Path(name), config.columns) for name in config.files}


def read_scored_pairs(path: Path, columns: list[str]) -> ScoredPairs:
    """The pairs of one file; a bad line is named by number."""
    if not path.is_file():
        raise UserError(f"there is no file {path}. Name existing ones: --set 'sts.files=[pairs.tsv]'")
    tab = path.suffix == ".tsv"
    pairs = ScoredPairs([], [], [])
    with open(path, encoding="utf-8-sig", newline="") as text:
        # TSV files of this field do not quote: a quotation mark there is part of the sentence
        rows = csv.reader(text, delimiter="\t", quoting=csv.QUOTE_NONE) if tab else csv.reader(text)
        positions = None
        try:
            for row in rows:
                if positions is None:
                    positions = _positions(row, columns)
                    if positions != [0, 1, 2] or row[:3] == columns:
                        continue
                _add(pairs, row, positions, f"{path}, line {rows.line_num}")
        except (UnicodeDecodeError, csv.Error) as error:
            raise UserError(
                f"{path}, after line {rows.line_num}: {error}. The file must be UTF-8 CSV or TSV."
            ) from None
    if len(set(pairs.scores)) < 2:
        raise UserError(f"{path} holds {len(pairs.scores)} pair(s); a ranking needs at least two different scores.")
    return pairs


def _positions(first_row: list[str], columns: list[str]) -> list[int]:
    """Where the three columns are: by the header's names, else the first three."""
    names = [name.strip() for name in first_row]
    return [names.index(column) for column in columns] if set(columns) <= set(names) else [0, 1, 2]


def _add(pairs: ScoredPairs, row: list[str], positions: list[int], where: str) -> None:
    cells = [row[position].strip() if position < len(row) else "" for position in positions]
    try:
        score = float(cells[2])
    except ValueError:
        score = math.nan
    if not cells[0] or not cells[1] or not math.isfinite(score):
        raise UserError(f"{where}: expected sentence, sentence, number; got {row[:4]!r}. Mend or delete that line.")
    pairs.first.append(cells[0])
    pairs.second.append(cells[1])
    pairs.scores.append(score)


def evaluate_sts(encoders: list[Encoder], config: StsConfig) -> dict[str, dict[str, Any]]:
    """Per model: Spearman correlation per file and pooling, and the mean over files."""
    files = read_all(config)
    results = {}
    for encoder in encoders:
        encoder.refuse_longer(config.max_length, "sts.max_length")
        per_file = {name: score_file(encoder, pairs, config) for name, pairs in files.items()}
        mean = {pooling: sum(file[pooling] for file in per_file.values()) / len(per_file) for pooling in POOLINGS}
        num_pairs = {name: len(pairs.scores) for name, pairs in files.items()}
        results[encoder.name] = {"mean": mean, "per_file": per_file, "num_pairs": num_pairs}
    return results


def score_file(encoder: Encoder, pairs: ScoredPairs, config: StsConfig) -> dict[str, float]:
    texts = [config.prefix + text for text in pairs.first + pairs.second]
    vectors, _ = sentence_vectors(encoder, texts, config.max_length, config.batch_size)
    half = len(pairs.first)
    found = {}
    for pooling, rows in vectors.items():
        cosines = (rows[:half] * rows[half:]).sum(dim=1).numpy()
        if len(np.unique(cosines)) < 2:
            print(f"warning: {encoder.name}, {pooling}: all pairs are equally alike, no ranking: 0", file=sys.stderr)
        found[pooling] = spearman(cosines, np.array(pairs.scores))
    return found


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Correlation of the ranks; equal values share the mean of their ranks. Where all are equal nothing is ranked: 0."""
    if len(np.unique(a)) < 2 or len(np.unique(b)) < 2:
        return 0.0
    return float(np.corrcoef(ranks(a), ranks(b))[0, 1])


def ranks(values: np.ndarray) -> np.ndarray:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[inverse]


def sts_table(results: dict[str, dict[str, Any]]) -> str:
    """One row per model and pooling: Spearman correlation per file and the mean."""
    files = list(next(iter(results.values()))["per_file"])
    width = max(len("model"), *map(len, results))
    titles = [*(Path(name).stem[-16:] for name in files), "mean"]
    lines = ["semantic textual similarity, Spearman correlation"]
    lines.append(f"{'model':<{width}}  {'pooled from':<12}" + "".join(f"{title:>18}" for title in titles))
    for name, result in results.items():
        for pooling in POOLINGS:
            figures = [*(result["per_file"][file][pooling] for file in files), result["mean"][pooling]]
            lines.append(f"{name:<{width}}  {pooling:<12}" + "".join(f"{figure:18.3f}" for figure in figures))
    return "\n".join(lines)
