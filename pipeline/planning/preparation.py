"""The cost of preparing the text before training: core-hours, tokens, and the size of the shards.

In: a recipe, the size of the corpus and the number of cores. Out: `Preparation`. Rates are those that
benchmarks/bench_prepare.py measured. Where the shards exist already, their tokens are counted instead.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from data_prep.shards import DataError, ShardSet
from pipeline.config import Recipe
from pipeline.planning.assumptions import Assumptions

CC100_TEXT_GB = 2500.0  # "2.5 TB", arXiv 1911.02116
CC100_FILES_GB = 550.0  # the .txt.xz files


@dataclass(frozen=True)
class Preparation:
    """`done`: the shards exist, so that nothing has to be prepared."""

    done: bool
    text_gb: float
    tokens: float
    core_hours: float
    wall_hours: float
    shard_gb: float
    tokens_needed: float

    @property
    def epochs(self) -> float:
        return self.tokens_needed / self.tokens


def preparation_of(recipe: Recipe, text_gb: float, cores: int, assumptions: Assumptions) -> Preparation:
    """From the shards in `recipe.data` where they exist, else from `text_gb` of text."""
    needed = float(recipe.steps) * recipe.global_batch * recipe.seq_len
    tokens = _tokens_prepared(Path(recipe.data), recipe.languages)
    if tokens:
        size_gb = tokens * assumptions.shard_bytes_per_token / 1e9
        return Preparation(True, tokens * assumptions.text_bytes_per_token / 1e9, tokens, 0.0, 0.0, size_gb, needed)
    tokens = text_gb * 1e9 / assumptions.text_bytes_per_token
    core_hours = text_gb * 1e3 / assumptions.tokenizer_mb_s / 3600
    size_gb = tokens * assumptions.shard_bytes_per_token / 1e9
    return Preparation(False, text_gb, tokens, core_hours, core_hours / cores, size_gb, needed)


def _tokens_prepared(path: Path, languages: list[str] | None) -> float:
    if not path.is_dir():
        return 0.0
    try:
        shards = ShardSet(path)
    except DataError:
        return 0.0
    return float(sum(shards.num_tokens(name) for name in shards.languages if languages is None or name in languages))
