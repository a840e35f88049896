"""A few lines of languages that have no sentence pairs, for the check of the ONNX files.

In: a directory with `LANG.txt` or `LANG.txt.xz`, as CC-100 has them, and the languages that are checked anyway. Out: the
first lines of each other language. Used by `pipeline export --onnx`.
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
    """Language -> at most `most` lines that are not empty."""
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
                    f"{path} cannot be read as text ({error}). Mend it or name another --check-text."
                ) from None
    if not found:
        raise UserError(
            f"{directory} has no LANG.txt or LANG.txt.xz to check ONNX files on. Name another --check-text."
        )
    return dict(sorted(found.items()))
