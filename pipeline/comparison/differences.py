"""What differs between students, and whether their held-out losses measure the same thing.

In: `StudentRun` objects. Out: the keys of their recipes that differ, and a sentence where losses cannot be compared.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from pipeline.comparison.students import StudentRun
from pipeline.config import as_tree
from pipeline.provenance import OF_STUDENT

# The held-out loss is the weighted sum of the relation losses on the held-out rows: what decides both.
ROWS = ("seq_len", "documents", "positions", "languages", "heldout_rows")
TARGET = ("heads", "pairs", "after_rotary")
_REPORTING = ("students", "save_every", "eval_every", "checkpoint", "guard", "metrics")  # no student depends on them


def differing_keys(students: Sequence[StudentRun]) -> dict[str, list[Any]]:
    """Dotted key -> the value of each student, for the recipe keys whose values differ and that a student depends on."""
    flat = [_flat(as_tree(student.recipe)) for student in students]
    keys = dict.fromkeys(key for values in flat for key in values)
    found = {key: [values.get(key) for values in flat] for key in keys if key.partition(".")[0] not in _REPORTING}
    return {key: values for key, values in found.items() if any(value != values[0] for value in values)}


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def value_text(value: Any) -> str:
    """A value of a recipe on one line, as YAML has it."""
    if isinstance(value, float):
        return f"{value:g}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False).replace('"', "")


def heldout_differences(students: Sequence[StudentRun]) -> list[str]:
    """The keys because of which the held-out losses of these students measure different things; none where they compare."""
    facts = [_measured(student) for student in students]
    return [key for key in facts[0] if any(other[key] != facts[0][key] for other in facts)]


def _teacher(student: StudentRun) -> Any:
    """By content where run.json has it, without what only the student has."""
    identity = student.about.get("identity")
    if not isinstance(identity, dict) or not identity:
        return student.recipe.teacher
    return {key: value for key, value in identity.items() if key not in OF_STUDENT}


def _measured(student: StudentRun) -> dict[str, Any]:
    """Key of the recipe -> what this student's held-out loss is measured against, or on which rows."""
    recipe, relations = student.recipe, student.recipe.relations
    weights = [1.0] if relations.layers is None else [pair.weight for pair in relations.layers]
    return {
        "teacher": _teacher(student),
        "data": student.about.get("data_fingerprint") or recipe.data,
        "relations.teacher_layer": sorted(zip(map(str, student.teacher_layers), weights, strict=False)),
        **{f"relations.{name}": getattr(relations, name) for name in TARGET},
        **{name: getattr(recipe, name) for name in ROWS},
    }
