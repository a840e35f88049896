"""What `state.json` of a checkpoint must hold before anything is read by it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def state_problem(state: Mapping[str, Any]) -> str | None:
    """Why the shapes of the parameters cannot be used, or None."""
    shapes = state.get("parameters", {})
    if not isinstance(shapes, dict):
        return "`parameters` is no object"
    for name, shape in shapes.items():
        if not isinstance(shape, list) or not all(type(size) is int and 0 <= size < 2**31 for size in shape):
            return f"`parameters` has no shape for {name[:80]!r}"
    return None
