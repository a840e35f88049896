"""The parser behind every command line of this project."""

from __future__ import annotations

import argparse
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any, NoReturn

EXIT_USER = 2


def module_command(*words: object) -> str:
    """`python -m WORDS` to be pasted into a shell: quoted, with the Python that runs this where `python` is another one."""
    this, named = Path(sys.executable), shutil.which("python")
    # Two virtual environments may link to one binary: the directory decides, not where the link leads.
    is_this = named is not None and Path(named).parent == this.parent and Path(named).resolve() == this.resolve()
    python = this.relative_to(Path.cwd()) if this.is_relative_to(Path.cwd()) else this
    return shlex.join(["python" if is_this else str(python), "-m", *map(str, words)])


class CommandLine(argparse.ArgumentParser):
    """Takes options by their whole names only, and says what is wrong before it says what it would take."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**{"allow_abbrev": False, "formatter_class": argparse.RawDescriptionHelpFormatter, **settings})

    def error(self, message: str) -> NoReturn:
        print(f"error: {message}\n{self.format_usage()}", file=sys.stderr, flush=True)
        sys.exit(EXIT_USER)
