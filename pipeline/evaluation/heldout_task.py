"""Held-out relation loss of finished students against a teacher: what was distilled, measured without fine-tuning.

In: encoders, a teacher and the shards. Out: per model the mean loss per language on rows that its training never saw.
Which rows these are follows from row length, rows per language and languages; by default they are read from the
students' `lineage.json`. Used by `pipeline evaluate`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm

from data_prep.shards import ShardSet
from pipeline.data.batches import BatchSource
from pipeline.distillation.distiller import DistillModule, RelationsConfig
from pipeline.distillation.tap import tap
from pipeline.distillation.teacher import FrozenTeacher, check_vocabulary
from pipeline.errors import UserError
from pipeline.evaluation.encoder import Encoder, load_encoder
from pipeline.evaluation.heldout import heldout_losses
from pipeline.evaluation.ranks import Ranks
from pipeline.tokenizer_identity import deciding_file, tokenizer_sha256

DEFAULT_SPLIT: dict[str, Any] = {"seq_len": 128, "heldout_rows": 16, "languages": None, "documents": "joined"}


@dataclass
class HeldoutConfig:
    """Whose relations are compared on which text. None: as the students were trained, else 128 tokens, 16 rows, all."""

    teacher: str = ""  # DIR_OR_HUB_NAME, optionally @LAYER
    data: str = "artifacts/shards"  # output directory of `python -m data_prep prepare`
    heads: int = 48  # relation heads
    seq_len: int | None = None
    heldout_rows: int | None = None  # per language, at most a tenth of the language
    languages: list[str] | None = None
    documents: Literal["joined", "separate"] | None = None  # separate: as the recipe's key
    batch_size: int = 8

    def __post_init__(self) -> None:
        if self.batch_size < 1 or (self.heldout_rows or 1) < 1 or (self.seq_len or 3) < 3:
            raise UserError(
                "heldout.batch_size and heldout.heldout_rows must be at least 1, heldout.seq_len at least 3"
            )


def check_input(config: HeldoutConfig) -> None:
    """What can be known before any model is loaded."""
    if not config.teacher:
        raise UserError(
            "the task heldout compares with a teacher: add --teacher artifacts/teacher (or another, or NAME@19)"
        )
    if not Path(config.data).is_dir():
        raise UserError(
            f"there are no shards at {config.data}. Name the students' own: --data SHARDS, or make them: "
            f"python -m data_prep prepare --input samples/cc100 --tokenizer {config.teacher} --output {config.data}"
        )


def evaluate_heldout(encoders: list[Encoder], config: HeldoutConfig, ranks: Ranks) -> dict[str, dict[str, Any]]:
    """Per model: loss per language and its mean over languages. All ranks call it together and share the rows out."""
    split = split_of(encoders, config)
    source = BatchSource(
        ShardSet(Path(config.data)),
        seq_len=split["seq_len"],
        alpha=1.0,  # how training mixes languages; the held-out rows do not depend on it
        seed=0,
        heldout_rows_per_language=split["heldout_rows"],
        languages=split["languages"],
        documents=split["documents"],
    )
    teacher = load_encoder(config.teacher)
    for encoder in [teacher, *encoders]:
        _check_fit(encoder, source, config.data)
    frozen = FrozenTeacher(tap(teacher.model, teacher.values_layer))
    num_rows = sum(len(source.heldout(language)) for language in source.languages)
    results = {}
    for encoder in encoders:
        student = tap(encoder.model, encoder.values_layer)
        distiller = DistillModule(frozen, student, RelationsConfig(heads=config.heads, backend="chunked"))
        chunks = -(-num_rows // config.batch_size)
        bar = tqdm(
            total=-(-chunks // ranks.world_size), desc=f"held-out loss of {encoder.name}", unit="batch", disable=None
        )
        losses = heldout_losses(
            *(distiller.losses_by_row, source, config.batch_size, ranks.rank, ranks.world_size, ranks.device),
            progress=lambda bar=bar: bar.update(),  # type: ignore[misc]
            sum_over_ranks=ranks.sum,
        )
        bar.close()
        mean = sum(losses.values()) / len(losses)
        results[encoder.name] = {
            **{"mean": mean, "per_language": losses, "values_layer": encoder.values_layer, "teacher": teacher.name},
            **{"teacher_layer": teacher.values_layer, "heads": config.heads, "rows": num_rows, **split},
        }
    return results


def split_of(encoders: list[Encoder], config: HeldoutConfig) -> dict[str, Any]:
    """Row length, held-out rows, languages, documents: as set, else as all students with a lineage were trained."""
    trained: dict[str, dict[str, Any]] = {}
    for encoder in encoders:
        lineage = Path(encoder.path) / "lineage.json"
        recipe = json.loads(lineage.read_text(encoding="utf-8"))["recipe"] if lineage.is_file() else {}
        if recipe:
            trained[encoder.name] = {key: recipe.get(key, default) for key, default in DEFAULT_SPLIT.items()}
    split = next(iter(trained.values()), DEFAULT_SPLIT).copy()
    for key in DEFAULT_SPLIT:
        chosen = getattr(config, key)
        if chosen is not None:
            split[key] = chosen
        elif any(other[key] != split[key] for other in trained.values()):
            raise UserError(
                f"{', '.join(trained)} were trained with different `{key}`, so their held-out rows differ. Evaluate them one "
                f"by one, or choose with --set heldout.{key}=... and know that some may have seen the rows"
            )
    return split


def _check_fit(encoder: Encoder, source: BatchSource, data: str) -> None:
    """Shards hold token ids: every model must have been made for the very tokenizer behind them."""
    check_vocabulary(encoder.model, source.shards.vocab_size, data)
    if tokenizer_sha256(encoder.path) != source.shards.tokenizer_sha256:
        raise UserError(
            f"the shards in {data} were made with another tokenizer than {deciding_file(encoder.path)}. Prepare shards with "
            "this one, or leave the model out"
        )
    encoder.refuse_longer(source.seq_len, "heldout.seq_len")


def heldout_table(results: dict[str, dict[str, Any]]) -> str:
    """One row per model: relation loss per language and the mean."""
    first = next(iter(results.values()))
    width = max(len("model"), *map(len, results))
    titles = [*first["per_language"], "mean"]
    lines = [f"held-out relation loss against {first['teacher']}, layer {first['teacher_layer']} (lower is better)"]
    lines.append(f"{'model':<{width}}" + "".join(f"{title:>9}" for title in titles))
    for name, result in results.items():
        figures = [*result["per_language"].values(), result["mean"]]
        lines.append(f"{name:<{width}}" + "".join(f"{figure:z9.4f}" for figure in figures))
    return "\n".join(lines)
