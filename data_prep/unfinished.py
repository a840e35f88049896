"""The error text for a directory without a manifest.

In: the directory. Out: whether its shards are unfinished, not merged or missing, and the next command.
"""

from __future__ import annotations

import shlex
from pathlib import Path

from data_prep.command_line import module_command


def why_no_manifest(path: Path, manifest_name: str, run_name: str) -> str:
    """One paragraph about the directory `path`, which holds no `manifest_name`."""
    parts = path.with_name(path.name + ".parts")  # where tasks of a Slurm array prepare their languages
    if (path / run_name).is_file():
        return (
            f"The shards at {path} are unfinished: `{module_command('data_prep', 'prepare')}` began them and has not reached the end. Run "
            "the same prepare command again; it continues after the last finished shard. (To use the finished languages "
            f"alone: {module_command('data_prep', 'merge', path, '--partial')})"
        )
    if parts.is_dir():
        return (
            f"The shards at {path} are unfinished: their languages in {parts} have not been merged. When all of them are "
            f"done: {module_command('data_prep', 'merge', path, '--from')} {shlex.quote(str(parts))}/*"
        )
    command = module_command("data_prep", "prepare", "--input", "TEXT", "--tokenizer", "MODEL_OR_DIR", "--output", path)
    return f"No shards at {path}: {path / manifest_name} is missing. Make them with `{command}`."
