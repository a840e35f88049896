"""Check the numbers of a recipe before anything is built.

In: a dataclass of a recipe or an evaluation, and a range for each key. Out: nothing, or a `UserError`. The upper limits are
far above those of any real run. A larger number would end in an overflow, a loop over its divisors, or terabytes of memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.errors import UserError

LARGEST_INT = 2**63 - 1  # of a tensor, a file and a seed
LONGEST_S = 1e8  # three years; the limit of the system's timers is slightly higher
LARGEST_BATCH = 2**24
LONGEST_ROW = 2**20
LARGEST_WEIGHT = 1e9


def check_ranges(section: object, name: str, limits: Mapping[str, tuple[float, float]]) -> None:
    """Raises where the value of a key, or a number in its list or mapping, is outside its range. None is not checked.

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
                raise UserError(f"`{where}` is {_shown(value)}; it must be between {_shown(least)} and {_shown(most)}")


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
