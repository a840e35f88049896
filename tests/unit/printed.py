"""Take a fix out of a printed message and apply it: run a command in a shell, or give the values of its `--set` options."""

from __future__ import annotations

import re
import shlex
import subprocess

from tests.conftest import REPO

SHELL_WORD = r"""(?:'[^']*'|"[^"]*"|[^\s'"(),;`])+"""


def paste(command: str) -> str:
    """Run the command in a shell, in the root of the repository. It must succeed. Returns its output."""
    done = subprocess.run(["/bin/bash", "-c", command], cwd=REPO, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, f"{command}\n{done.stdout[-1000:]}{done.stderr[-2000:]}"
    return done.stdout


def error_of(command: str) -> str:
    """Run the command in a shell. It must end with the error of a user. Returns what it printed to stderr."""
    done = subprocess.run(["/bin/bash", "-c", command], cwd=REPO, capture_output=True, text=True, timeout=240)
    assert done.returncode == 2, done.stdout + done.stderr
    return done.stderr


def settings_in(message: str) -> list[str]:
    """The values of all `--set` options in a message, as a shell passes them."""
    found = re.findall(rf"--set ({SHELL_WORD})", message)
    return [shlex.split(word.rstrip("."))[0] for word in found]


def setting_in(message: str, key: str) -> str:
    """The value of `--set` for this key in a message, as a shell passes it."""
    return next(setting for setting in settings_in(message) if setting.startswith(key))
