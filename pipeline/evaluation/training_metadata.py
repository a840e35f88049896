"""How a student was trained, from the `lineage.json` that lies beside it: an evaluation's defaults.

In: a model's directory. Out: which layers were matched and how, and what decides over its held-out rows; nothing for a
model without lineage. Used by encoder.py (the layer whose values are pooled) and heldout_task.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.distillation.config import RelationsConfig
from pipeline.errors import UserError

_RELATIONS = RelationsConfig()
# What models without lineage are measured with; no layer stands for the last.
DEFAULTS: dict[str, Any] = {
    "seq_len": 128,
    "heldout_rows": 16,
    "languages": None,
    "documents": "joined",
    "teacher_layer": None,
    "heads": _RELATIONS.heads,
    "pairs": _RELATIONS.pairs,
    "after_rotary": _RELATIONS.after_rotary,
}


def trained_as(model: str | Path) -> dict[str, Any]:
    """`DEFAULTS` with the values of the model's recipe, and `student_layer`, `steps`, `identity` (teacher by content),
    `longest` (`longest_of`); empty without lineage."""
    with _lineage_of(model) as lineage:
        recipe = lineage.get("recipe")
        relations = dict(recipe.get("relations", {})) if recipe else {}
        # of several matched pairs the one highest in the student, which stands nearest to what a user gets
        one = {side: relations.get(f"{side}_layer") for side in ("teacher", "student")}
        matched = max(relations.get("layers") or [one], key=lambda pair: pair["student"] or 0)
        layers = {f"{side}_layer": matched[side] for side in ("teacher", "student")}
    if not recipe:  # trimmed, never trained here
        return {}
    found = {key: recipe.get(key, relations.get(key, default)) for key, default in DEFAULTS.items()}
    about = {
        "steps": lineage.get("steps"),
        "identity": lineage.get("identity") or {},
        "longest": longest_of(recipe),
    }
    return {**found, **layers, **about}


def languages_of(model: str | Path) -> list[str] | None:
    """What a student was trained on, of this what a trimmed vocabulary was kept for. None: the model says nothing of it."""
    with _lineage_of(model) as lineage:
        trained = (lineage.get("recipe") or {}).get("languages") or lineage.get("languages")
        kept = (lineage.get("trimmed") or {}).get("languages")
        if trained is None or kept is None:
            return trained or kept
        return [language for language in trained if language in kept]


@contextmanager
def _lineage_of(model: str | Path) -> Iterator[dict[str, Any]]:
    """A model's `lineage.json`, empty without one; whatever it lacks where it is read is a `UserError`."""
    path = Path(model) / "lineage.json"
    try:
        yield json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} is damaged ({type(error).__name__}: {error}). Export the model again.") from None


def longest_of(recipe: dict[str, Any]) -> int | None:
    """Up to how many tokens a student was trained, where it has nothing else for longer inputs: its position embeddings
    began at random, and no row touched those behind `seq_len`. None: they began as the teacher's."""
    return recipe["seq_len"] if (recipe.get("student") or {}).get("init") == "random" else None
