"""Reads the JSON that a run, an export or an evaluation wrote. In: a path. Out: its content, or a `UserError` that names it.

Users edit and copy such files, so any of them may hold anything. Files with a format of their own (checkpoints, shards,
DeepSpeed's JSON, a model's config.json) have their own readers, which report more.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pipeline.errors import UserError

RESTORE = "Restore it from a copy, or move it away"
_WORDS: dict[type, str] = {dict: "an object with keys", list: "a list"}


def read_json(path: Path, kind: type = dict, advice: str = RESTORE) -> Any:
    """The content of `path`.

    Args:
        kind: dict or list, the type that the content must have
        advice: the end of the error message, without a full stop
    Raises:
        UserError: the file cannot be read or parsed, or its content is not a `kind`
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))  # some editors write a byte order mark
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}). {advice}.") from None
    except RecursionError:
        raise UserError(f"{path} nests its values too deeply to be read. {advice}.") from None
    except ValueError as error:
        raise UserError(f"{path} cannot be read as JSON ({error}). {advice}.") from None
    if not isinstance(content, kind):
        raise UserError(f"{path} must hold {_WORDS[kind]}, not {type(content).__name__}. {advice}.")
    return content


def read_json_if_there(path: Path, kind: type = dict) -> Any:
    """Like `read_json`; an empty `kind` where the file does not exist."""
    return read_json(path, kind) if path.is_file() else kind()


def read_points(path: Path, needed: tuple[str, ...] = ("step", "time_s")) -> list[dict[str, Any]]:
    """The points of a `metrics.jsonl`. An incomplete last line, still being written or cut by a kill, is left out.

    Args:
        needed: keys that every point must have
    Raises:
        UserError: a line is not a point with a step and numbers; names the line's number
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error}). {RESTORE}.") from None
    points = []
    for number, line in enumerate(lines, start=1):
        if not line.endswith("}"):
            continue
        try:
            point = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}, line {number}: not JSON ({str(error)[:200]}). Remove that line.") from None
        if not _is_point(point) or not all(key in point for key in needed):
            raise UserError(
                f"{path}, line {number}: not a point with numbers for {', '.join(needed)}. Remove that line."
            )
        points.append(point)
    return points


def _is_point(point: Any) -> bool:
    if not isinstance(point, dict):
        return False
    numbers = [value for key, value in point.items() if key != "step"]
    step = point.get("step")
    are_numbers = all((type(value) in (int, float) and abs(value) < 1e300) or value != value for value in numbers)
    return type(step) is int and 0 <= step < 2**63 and are_numbers
