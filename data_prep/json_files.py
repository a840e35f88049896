"""Reading JSON files of shard directories and tokenizer directories.

In: a path. Out: the object that the file holds.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from data_prep.unreadable import read_again


def read_json_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file in UTF-8.

    Raises:
        OSError: there is no regular file at `path`.
        UnreadableError: the file exists, and several attempts to read it failed.
        ValueError: the content is not JSON in UTF-8, is nested too deeply, or is not an object.
    """
    try:
        content = json.loads(read_again(path, path.read_bytes).decode("utf-8-sig"))
    except RecursionError as error:
        raise ValueError("values are nested too deeply") from error
    if not isinstance(content, dict):
        raise ValueError(f"it holds {type(content).__name__}, not an object")
    return content


def read_optional_json_object(path: Path) -> dict[str, Any]:
    """As `read_json_object`; an empty object if the file is missing or cannot be read as one."""
    try:
        return read_json_object(path)
    except (OSError, ValueError):
        return {}
