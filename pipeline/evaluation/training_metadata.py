"""How a student was trained, from the `lineage.json` in its directory: the defaults of an evaluation.

In: a model's directory. Out: which layers were matched and how, and what determines its held-out rows; nothing for a
model without lineage.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.distillation.config import RelationsConfig
from pipeline.distillation.models.sentence_files import MODES
from pipeline.distillation.models.student import STARTS
from pipeline.errors import UserError
from pipeline.runtime.json_files import read_json
from pipeline.training.student_start import trained_length_of

EXPORT_AGAIN = "Export the model again"
_RELATIONS = RelationsConfig()
# What models without lineage are measured with. A layer of None is the last layer.
DEFAULTS: dict[str, Any] = {
    "seq_len": 128,
    "heldout_rows": 16,
    "languages": None,
    "documents": "joined",
    "positions": "continue",
    "teacher_layer": None,
    "heads": _RELATIONS.heads,
    "pairs": _RELATIONS.pairs,
    "after_rotary": _RELATIONS.after_rotary,
}


def training_metadata(model: str | Path) -> dict[str, Any]:
    """The training settings of a model; empty without lineage.

    Returns:
        the keys of `DEFAULTS` with the values of the model's recipe; `student_layer`, `steps`, `identity` (the teacher by
        content), `longest`, the number of tokens beyond which position embeddings are untrained (None: none of them is), and
        `pooling`, with which its sentence vectors are made (None: the lineage does not say, so mean)
    """
    with _lineage_of(model) as lineage:
        if not (recipe := lineage.get("recipe")):  # a trimmed model that was not trained here
            return {}
        relations = recipe.get("relations", {})
        # of several matched pairs, the highest in the student: it is nearest to the output that users read
        one = {side: relations.get(f"{side}_layer") for side in ("teacher", "student")}
        matched = max(relations.get("layers") or [one], key=lambda pair: pair["student"] or 0)
        pooling = (lineage.get("sentences") or {}).get("pooling")
        _check_layers(matched)
        if pooling not in (None, *MODES.values()):
            raise ValueError(
                f"the pooling of sentence vectors is {str(pooling)[:40]!r}, not {', '.join(MODES.values())}"
            )
        return {
            **{key: recipe.get(key, relations.get(key, default)) for key, default in DEFAULTS.items()},
            **{f"{side}_layer": matched[side] for side in ("teacher", "student")},
            "steps": lineage.get("steps"),
            "identity": lineage.get("identity") or {},
            "longest": trained_length_of(lineage),
            "pooling": pooling,
            "started_from": "teacher"
            if (recipe.get("student") or {}).get("init") in STARTS
            else "encoder that it began from",
        }


def languages_of(model: str | Path) -> list[str] | None:
    """The languages that a student was trained on and, if trimmed, has the vocabulary for. None: the model does not say."""
    with _lineage_of(model) as lineage:
        trained = (lineage.get("recipe") or {}).get("languages") or lineage.get("languages")
        kept = (lineage.get("trimmed") or {}).get("languages")
        if not all(names is None or isinstance(names, list) for names in (trained, kept)):
            raise TypeError("`languages` is not a list")
        if trained is None or kept is None:
            return trained or kept
        return [language for language in trained if language in kept]


def _check_layers(matched: dict[str, Any]) -> None:
    for side in ("teacher", "student"):
        if matched[side] is not None and type(matched[side]) is not int:
            raise TypeError(f"the matched layer of the {side} is {str(matched[side])[:40]!r}, not a number")


@contextmanager
def _lineage_of(model: str | Path) -> Iterator[dict[str, Any]]:
    """A model's `lineage.json`; empty without one. An error while the caller reads it becomes a `UserError`."""
    path = Path(model) / "lineage.json"
    try:
        yield read_json(path, advice=EXPORT_AGAIN) if path.is_file() else {}
    except UserError:
        raise
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise UserError(f"{path} is corrupt ({type(error).__name__}: {error}). {EXPORT_AGAIN}.") from None
