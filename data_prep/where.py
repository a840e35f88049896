"""Filters on the columns of records: `--where 'language_score >= 0.8'`.

In: conditions `COLUMN OPERATOR VALUE`, joined by `and`. Out: a `Where`, which says of each record whether it is kept. A value is
a number, true, false or a text in quotes; nothing is evaluated as code. Null and NaN meet no condition.
"""

from __future__ import annotations

import json
import math
import operator
import re
import shlex
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from data_prep.shards import DataError

# Kinds of records that are left out, as counted
NOT_MET, NULL, MISMATCH = "records_where_not_met", "records_where_null", "records_where_mismatch"
OPERATORS: dict[str, Callable[[Any, Any], bool]] = {
    ">=": operator.ge, "<=": operator.le, "==": operator.eq, "!=": operator.ne, ">": operator.gt, "<": operator.lt,
}  # fmt: skip
EQUALITY = ("==", "!=")  # the operators for texts and true/false
_CONDITION = re.compile(
    r"""\s*(?P<column>`[^`]+`|[^\s<>=!"'`]+)\s*(?P<operator>[<>=!]+)\s*(?P<value>"[^"]*"|'[^']*'|[^\s"'<>=!`]+)\s*"""
)
_AND = re.compile(r"and\s", re.IGNORECASE)
_NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d{1,3})?")
GRAMMAR = (
    "Write COLUMN OPERATOR VALUE, with >=, >, <=, <, == or !=, and a number, true, false or a 'text' in quotes "
    "(--where 'language_score >= 0.8'). Several are joined by `and`. A column whose name has spaces is written in `backticks`"
)


@dataclass(frozen=True)
class Condition:
    """One comparison of a column with a fixed value."""

    column: str
    operator: str
    value: bool | int | float | str

    def __str__(self) -> str:
        return f"{self.column} {self.operator} {json.dumps(self.value, ensure_ascii=False)}"

    @property
    def kind(self) -> str:
        """What the column must hold: number, text, or true/false."""
        return {bool: "true/false", str: "text"}.get(type(self.value), "number")

    def problem(self, record: dict[str, Any]) -> str | None:
        """None if the record meets the condition, else `NOT_MET`, `NULL` or `MISMATCH`."""
        found = record.get(self.column, _ABSENT)
        if found is None or found != found:  # NaN differs from itself
            return NULL
        if isinstance(self.value, str):
            found = found.decode("utf-8", "replace") if isinstance(found, bytes) else found
            fits = isinstance(found, str)
        elif isinstance(self.value, bool):
            fits = isinstance(found, bool)
        else:
            fits = isinstance(found, int | float | Decimal) and not isinstance(found, bool)
        if not fits:
            return MISMATCH
        # a decimal is compared with the value as written: the float 0.8 is a little more than 0.8
        value = Decimal(repr(self.value)) if isinstance(found, Decimal) else self.value
        return None if OPERATORS[self.operator](found, value) else NOT_MET


_ABSENT = object()


@dataclass(frozen=True)
class Where:
    """Conditions that a record must meet, all of them. Without conditions every record is kept."""

    conditions: tuple[Condition, ...] = ()

    @classmethod
    def parse(cls, texts: Iterable[str]) -> Where:
        """The conditions of all `--where` options, sorted, so that equal filters are written the same.

        Raises:
            DataError: a text is not of the grammar.
        """
        return cls(tuple(sorted({one for text in texts for one in _conditions(text)}, key=str)))

    def __str__(self) -> str:
        return " and ".join(map(str, self.conditions))

    def problem(self, record: Any) -> str | None:
        """None if the record is kept, else the kind of the first condition that it does not meet."""
        if not isinstance(record, dict):
            return MISMATCH if self.conditions else None
        for condition in self.conditions:
            if (problem := condition.problem(record)) is not None:
                return problem
        return None


NO_CONDITION = Where()


def _conditions(text: str) -> list[Condition]:
    found, position = [], 0
    while True:
        match = _CONDITION.match(text, position)
        if match is None:
            raise DataError(f"--where {text!r}: cannot read {text[position:].strip()[:60]!r}. {GRAMMAR}.")
        found.append(_condition(match))
        position = match.end()
        if position == len(text):
            return found
        joined = _AND.match(text, position)
        if joined is None:
            raise DataError(f"--where {text!r}: expected `and`, found {text[position:][:60]!r}. {GRAMMAR}.")
        position = joined.end()


def _condition(match: re.Match[str]) -> Condition:
    text, column, sign, value = match.string, match["column"].strip("`"), match["operator"], match["value"]
    if sign not in OPERATORS:
        hint = f" For equality write ==: {_corrected(match)}." if sign == "=" else ""
        raise DataError(f"--where {text!r}: unknown operator {sign!r}.{hint} {GRAMMAR}.")
    parsed = _value(value)
    if parsed is None:
        advice = f"A text needs quotes: {_corrected(match)}." if sign in EQUALITY else f"{sign} compares numbers."
        raise DataError(f"--where {text!r}: {value!r} is no number. {advice}")
    if isinstance(parsed, float) and math.isinf(parsed):
        raise DataError(f"--where {text!r}: {value} is too large a number.")
    if isinstance(parsed, bool | str) and sign not in EQUALITY:
        raise DataError(f"--where {text!r}: {sign} compares numbers; texts and true/false have == and !=.")
    return Condition(column, sign, parsed)


def _value(value: str) -> bool | int | float | str | None:
    """The value of a condition; None where it is a text without quotes."""
    if value[0] in "\"'":
        return value[1:-1]
    if value.lower() in ("true", "false"):
        return value.lower() == "true"
    if not _NUMBER.fullmatch(value):
        return None
    number = float(value)
    if value.lstrip("+-").isdecimal() and math.isfinite(
        number
    ):  # an id may be larger than the integers that float64 holds
        return int(value)
    return int(number) if number.is_integer() and abs(number) < 2**53 else number


def _corrected(match: re.Match[str]) -> str:
    """The option with == or !=, and with quotes around a text, as it is pasted into a shell."""
    text, value = match.string, match["value"]
    sign = match["operator"] if match["operator"] in EQUALITY else "=="
    quoted = f'"{value}"' if _value(value) is None else value
    between = text[match.end("operator") : match.start("value")]
    return (
        f"--where {shlex.quote(text[: match.start('operator')] + sign + between + quoted + text[match.end('value') :])}"
    )
