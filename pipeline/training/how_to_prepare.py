"""The command that makes the shards of a run, to be pasted as it stands: what a run without the right shards is told.

In: a tokenizer (directory or hub name), where the shards should go, and where the text is. Used by assembly.py.
"""

from __future__ import annotations

import shlex
from pathlib import Path

from data_prep.command_line import module_command
from data_prep.shards import ShardSet
from pipeline.distillation.models.model_files import looks_like_path

SAMPLES = Path("samples/cc100")
UNKNOWN_TEXT = "TEXT"  # a directory that only the user knows


def how_to_prepare(tokenizer: str, output: str | Path, text: str | Path = SAMPLES) -> str:
    """`Make them: ...`; a tokenizer of the Hub is fetched first, since `data_prep` does not use the network."""
    directory, fetch = Path(tokenizer).expanduser(), ""
    if not directory.exists() and looks_like_path(tokenizer):
        return f"Nor is there a tokenizer at {tokenizer} to make them with"
    if not directory.exists():
        directory = Path("artifacts/tokenizers") / tokenizer.replace("/", "--")
        files = ["--include", "*.model", "--include", "tokenizer*", "--include", "config.json"]
        fetch = shlex.join(["hf", "download", tokenizer, *files, "--local-dir", str(directory)]) + " && "
    words = ["--input", text, "--tokenizer", directory, "--output", output]
    return f"Make them: {fetch}{module_command('data_prep', 'prepare', *words)}"


def text_of(shards: ShardSet) -> str:
    """The sample corpus where the shards were made from it, which their manifest tells by file names; else `TEXT`."""
    sources = [source["name"] for entry in shards.manifest["languages"].values() for source in entry["sources"]]
    return str(SAMPLES) if all((SAMPLES / name).is_file() for name in sources) else UNKNOWN_TEXT
