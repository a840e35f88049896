"""Reads lines of languages that have no sentence pairs, for the check of the ONNX files.

In: a directory with `LANG.txt` or `LANG.txt.xz`, as in CC-100, and the languages that have pairs. Out: the first lines of
each other language.
"""

from __future__ import annotations

import itertools
import lzma
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from pipeline.errors import UserError

SUFFIXES: dict[str, Callable[..., Any]] = {".txt": open, ".txt.xz": lzma.open}


def read_check_lines(directory: Path, without: Collection[str], most: int) -> dict[str, list[str]]:
    """Language -> its first lines that are not empty, at most `most`.

    Args:
        without: languages that are skipped
    """
    found = {}
    for suffix, opened in SUFFIXES.items():
        for path in sorted(directory.glob(f"*{suffix}")):
            language = path.name.removesuffix(suffix)
            if language in without:
                continue
            try:
                with opened(path, "rt", encoding="utf-8") as text:
                    found[language] = list(itertools.islice(filter(None, map(str.strip, text)), most))
            except (OSError, EOFError, UnicodeDecodeError, lzma.LZMAError) as error:
                raise UserError(
                    f"{path} cannot be read as text ({error}). Correct it or name another --check-text."
                ) from None
    if not found:
        raise UserError(
            f"{directory} has no LANG.txt or LANG.txt.xz to check ONNX files on. Name another --check-text."
        )
    return dict(sorted(found.items()))
