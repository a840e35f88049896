"""One reader for the JSON that a run, an export or an evaluation wrote: an object or a list, or a `UserError` with its name.

People edit such files, copy them half and pack them into archives, so any of them may hold anything. Readers of files with
a format of their own (checkpoints, shards, DeepSpeed's JSON, a model's config.json) say more and stand beside their format.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pipeline.errors import UserError

RESTORE = "Restore it from a copy, or move it away"
_WORDS: dict[type, str] = {dict: "an object with keys", list: "a list"}


def read_json(path: Path, kind: type = dict, advice: str = RESTORE) -> Any:
    """The content of `path`, which is a `kind`. Raises `UserError` where it cannot be read, parsed or is another kind."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
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
    """As `read_json`, and an empty `kind` where there is no such file."""
    return read_json(path, kind) if path.is_file() else kind()


def read_points(path: Path, needed: tuple[str, ...] = ("step", "time_s")) -> list[dict[str, Any]]:
    """The points of a `metrics.jsonl`. A last line that is still being written, or that a kill cut short, is left out.

    Raises:
        UserError: with the line's number, where a line is no point with a step and numbers
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
            raise UserError(f"{path}, line {number}: no JSON ({str(error)[:200]}). Remove that line.") from None
        if not _is_point(point) or not all(key in point for key in needed):
            raise UserError(f"{path}, line {number}: no point with numbers for {', '.join(needed)}. Remove that line.")
        points.append(point)
    return points


def _is_point(point: Any) -> bool:
    if not isinstance(point, dict):
        return False
    numbers = [value for key, value in point.items() if key != "step"]
    step = point.get("step")
    are_numbers = all((type(value) in (int, float) and abs(value) < 1e300) or value != value for value in numbers)
    return type(step) is int and 0 <= step < 2**63 and are_numbers
