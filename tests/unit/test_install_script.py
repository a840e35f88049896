"""install.sh on machines where it cannot work: the first line says what, the second how to fix it."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPO
from tests.versions.environments import NotBuiltError, find_python

VERSION = f"{sys.version_info.major}.{sys.version_info.minor}"
OTHER = "3.13" if VERSION != "3.13" else "3.12"


def first_of(*versions: str) -> tuple[str, str]:
    """A Python of one of these versions, and its version; skips if there is none."""
    for version in versions:
        with contextlib.suppress(NotBuiltError):
            return find_python(version), version
    pytest.skip(f"no Python {' or '.join(versions)} on this machine")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    for name in ("install.sh", "requirements.txt", "requirements-dev.txt"):
        shutil.copy(REPO / name, tmp_path)
    return tmp_path


def lines_of(checkout: Path, *words: str, **variables: str) -> list[str]:
    """The last two lines of what it prints to stderr. Without an index, so that nothing is downloaded."""
    environment = {**os.environ, "PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": os.devnull, **variables}
    words = words or (sys.executable,)
    done = subprocess.run(
        [checkout / "install.sh", *words], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2, done.stdout + done.stderr
    lines = done.stderr.splitlines()[-2:]
    assert lines[0].startswith("error: ")
    assert lines[1].startswith("fix: ")
    return lines


def test_no_python(checkout: Path) -> None:
    assert lines_of(checkout, "/nowhere/python")[0] == "error: /nowhere/python is not a Python that runs."
    assert not (checkout / ".venv").exists()


def test_a_python_that_is_too_old(checkout: Path) -> None:
    python, version = first_of("3.10", "3.9", "3.8")
    what, fix = lines_of(checkout, python)
    assert what == f"error: {python} is Python {version}; this project runs with 3.11, 3.12 and 3.13."
    assert fix == "fix: name another: make venv PYTHON=python3.11"


def test_no_disk(checkout: Path) -> None:
    what, fix = lines_of(checkout, NEEDED_MIB="999999999")
    assert what.endswith("and the packages need 999999999.")
    assert "NEEDED_MIB=3300" in fix
    assert not (checkout / ".venv").exists()


def test_no_network_and_then_again(checkout: Path) -> None:
    what, fix = lines_of(checkout, NEEDED_MIB="1")
    assert what == "error: the packages could not be installed (pip's messages are above)."
    assert "PIP_FIND_LINKS=wheels make venv" in fix
    assert (checkout / ".venv" / "bin" / "python").exists()
    assert not (checkout / ".venv" / ".installed").exists(), "the next call installs"
    lines_of(checkout, NEEDED_MIB="999999999")  # the environment is there: its disk is no longer asked for


def test_an_environment_of_another_python_is_replaced_if_one_is_named(checkout: Path) -> None:
    other, _ = first_of(OTHER)
    subprocess.run([other, "-m", "venv", "--without-pip", checkout / ".venv"], check=True)
    done = subprocess.run(
        [checkout / "install.sh", sys.executable],
        env={**os.environ, "PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": os.devnull, "NEEDED_MIB": "1"},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert f"replacing .venv (Python {OTHER}) by one of Python {VERSION}" in done.stdout
    assert f"version = {VERSION}" in (checkout / ".venv" / "pyvenv.cfg").read_text()


def test_a_link_is_not_replaced(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    place = tmp_path_factory.mktemp("shared")
    (place / "precious").touch()
    (checkout / ".venv").symlink_to(place)
    what, fix = lines_of(checkout)
    assert "is a link" in what
    assert (place / "precious").exists()
    (command,) = re.findall(r"remove the link \((.*?)\)", fix)
    subprocess.run(["/bin/bash", "-c", command], cwd=checkout, check=True)
    assert "is a link" not in lines_of(checkout, NEEDED_MIB="999999999")[0]
    assert (place / "precious").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_checkout_that_is_read_only(checkout: Path) -> None:
    checkout.chmod(0o555)
    try:
        assert lines_of(checkout)[0] == f"error: {checkout} cannot be written to, so .venv cannot be made in it."
    finally:
        checkout.chmod(0o755)


def test_a_checkout_on_a_full_or_read_only_file_system(checkout: Path) -> None:
    """As root too: a directory in the place of the probe cannot be touched over."""
    (checkout / ".venv-probe").symlink_to("/nowhere/file")
    assert "cannot be written to" in lines_of(checkout)[0]
