"""The sentence vectors of a run with `relations.tail: pooled`: how they are pooled, and what the recipe makes a sentence.

In: a recipe, and the settings that its teacher's files name. Out: the relations with the pooling that `auto` means, the entry
of the run's identity, and warnings about what is compared.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from pipeline.config import Recipe
from pipeline.distillation.config import RelationsConfig
from pipeline.distillation.models.sentence_files import FoundSettings, SentenceSettings, sentence_settings
from pipeline.distillation.tail import POOLED, projection_shape
from pipeline.errors import UserError
from pipeline.provenance import POOLING


def settings_of(recipe: Recipe) -> FoundSettings | None:
    """How the run pools; None where it compares no sentence vectors. Raises `UserError` where the teacher's files do not say."""
    if POOLED not in recipe.relations.tail_terms:
        return None
    return sentence_settings(recipe.teacher, recipe.relations.pooling)


def resolved(relations: RelationsConfig, found: FoundSettings | None) -> RelationsConfig:
    """The relations with the pooling that `auto` means."""
    return relations if found is None else dataclasses.replace(relations, pooling=found.settings.pooling)


def sentence_identity(found: FoundSettings | None) -> dict[str, str]:
    """What must stay the same over all attempts of a run: `auto` must not mean another pooling."""
    return {} if found is None else {POOLING: found.settings.pooling}


def check_sentences(recipe: Recipe, found: FoundSettings, rows: int, teacher_width: int) -> tuple[str, list[str]]:
    """Check that there is something to compare.

    Args:
        rows: of one micro-batch on all ranks together

    Returns:
        one line about what is compared; and warnings

    Raises:
        UserError: `pooled_distance: similarity` on one sentence
    """
    relations, settings = recipe.relations, found.settings
    if relations.pooled_distance == "similarity" and rows < 2:
        raise UserError(
            "`relations.pooled_distance: similarity` compares each sentence with the others of the micro-batch of all ranks, and "
            "that is one row. Raise micro_batch_per_gpu, use more ranks, or set `relations.pooled_distance: cosine`"
        )
    shape = projection_shape(relations, teacher_width, recipe.student.hidden)
    projection = f", student's vectors projected from {shape[1]} to {shape[0]} channels" if shape else ""
    what = f"{settings.pooling} pooling ({found.origin}), compared by {relations.pooled_distance}{projection}"
    return what, [*found.warnings, *_about_units(recipe, settings), *_about_prompts(settings)]


def _about_units(recipe: Recipe, settings: SentenceSettings) -> list[str]:
    """What one sentence vector is of."""
    if recipe.documents == "joined":
        return [
            f"relations.tail: pooled compares one vector per row of {recipe.seq_len} tokens, which may hold parts of several "
            "documents. For one vector per document: --set documents=separate"
        ]
    if settings.pooling == "cls":
        return [
            "relations.tail: pooled with cls pooling compares one vector per row, that of its first document: the later "
            "documents of a row have no start token. With mean pooling every document counts: --set relations.pooling=mean"
        ]
    return []


def _about_prompts(settings: SentenceSettings) -> list[str]:
    if not settings.prompts:
        return []
    shown = ", ".join(f"{name} {text[:40]!r}" for name, text in list(settings.prompts.items())[:4])
    return [
        f"the teacher's users put a prefix before their text ({shown}). The rows of a run have none, so vectors of text without "
        "prefix are compared; the export has the teacher's prefixes in config_sentence_transformers.json"
    ]


def batch_warnings(state: Mapping[str, Any], recipe: Recipe, rows: int) -> list[str]:
    """A warning where sentences are compared with those of a larger or smaller micro-batch than a checkpoint's.

    Args:
        state: the checkpoint's `state.json`
        rows: of one micro-batch on all ranks together
    """
    relations = recipe.relations
    then = state.get("deepspeed", {}).get("train_micro_batch_size_per_gpu", 0) * state.get("world_size", 0)
    if POOLED not in relations.tail_terms or relations.pooled_distance != "similarity" or then in (0, rows):
        return []
    return [
        f"a micro-batch of all ranks has {rows} rows, and had {then}: `relations.pooled_distance: similarity` compares each sentence "
        "with others than before, so losses are not equal up to rounding"
    ]
