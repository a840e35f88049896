"""The files that belong to the code: recipes and DeepSpeed configs, of a checkout or of an installed wheel.

In: the name of such a file, or of the command that trains. Out: the path or the command that works from any directory.
"""

from __future__ import annotations

import shlex
from pathlib import Path

from data_prep.command_line import program_command

ROOT = Path(__file__).resolve().parent.parent  # of the checkout, or of the installed packages
IS_CHECKOUT = (ROOT / "pyproject.toml").is_file()
FILES = ROOT if IS_CHECKOUT else ROOT / "minilmv2"  # a wheel has recipes/ and ds_configs/ there
SHIPPED = ("recipes", "ds_configs")


def shipped_file(given: str) -> Path:
    """The path as given; or, if there is no such file and the code has one of that name (`recipes/quickstart.yaml`), that one."""
    path = Path(given)
    is_shipped = path.parts[:1] in [(name,) for name in SHIPPED] and ".." not in path.parts
    return FILES / path if is_shipped and not path.exists() and (FILES / path).is_file() else path


def training_command() -> str:
    """The command that starts a training: `deepspeed pipeline/train.py`, or `minilmv2 train` of an installed wheel."""
    if not IS_CHECKOUT:
        return f"{program_command('minilmv2')} train"
    return f"{program_command('deepspeed')} {shlex.quote(str(training_script()))}"


def training_script() -> Path:
    """pipeline/train.py, relative to the current directory if it is below it."""
    script = ROOT / "pipeline" / "train.py"
    return script.relative_to(Path.cwd()) if script.is_relative_to(Path.cwd()) else script
