"""Numbers of a recipe that are too small or too large to be meant, refused before anything is made.

A huge number is no setting of a run: it ends in an overflow, in a loop over its divisors or in a request for terabytes.
The upper limits are far above what anybody trains with. Used by the dataclasses of a recipe and of an evaluation.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.errors import UserError

LARGEST_INT = 2**63 - 1  # of a tensor, a file and a seed
LONGEST_S = 1e8  # three years; the system's timers end somewhat above
LARGEST_BATCH = 2**24
LONGEST_ROW = 2**20
LARGEST_WEIGHT = 1e9


def check_ranges(section: object, name: str, limits: Mapping[str, tuple[float, float]]) -> None:
    """Every value of `limits`' keys (each number of a list or mapping) lies in its range; None is not looked at.

    Args:
        section: a dataclass
        name: its key in the recipe, "" for the recipe itself
        limits: key -> smallest and largest value
    Raises:
        UserError: with key, value and range
    """
    for key, (least, most) in limits.items():
        for where, value in _numbers(f"{name}.{key}" if name else key, getattr(section, key)):
            if not least <= value <= most:
                raise UserError(f"`{where}` is {_shown(value)}; it must lie between {_shown(least)} and {_shown(most)}")


def _numbers(where: str, value: Any) -> list[tuple[str, float]]:
    if value is None:
        return []
    if isinstance(value, Mapping):
        return [(f"{where}.{key}", item) for key, item in value.items()]
    if isinstance(value, list | tuple):
        return [(f"{where}[{number}]", item) for number, item in enumerate(value)]
    return [(where, value)]


def _shown(number: float) -> str:
    text = str(number) if not isinstance(number, float) or abs(number) < 1e15 else f"{number:g}"
    return text if len(text) <= 25 else f"{text[:12]}... ({len(text)} digits)"
