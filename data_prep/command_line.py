"""The parser behind every command line of this project."""

from __future__ import annotations

import argparse
import sys
from typing import Any, NoReturn

EXIT_USER = 2


class CommandLine(argparse.ArgumentParser):
    """Takes options by their whole names only, and says what is wrong before it says what it would take."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**{"allow_abbrev": False, "formatter_class": argparse.RawDescriptionHelpFormatter, **settings})

    def error(self, message: str) -> NoReturn:
        print(f"error: {message}\n{self.format_usage()}", file=sys.stderr, flush=True)
        sys.exit(EXIT_USER)
