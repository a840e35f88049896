"""The command that makes the shards of a run, for the error messages of runs without the right shards.

In: a tokenizer (directory or hub name), the output directory of the shards, and the directory of the text. Out: a sentence
with a command that works when it is pasted.
"""

from __future__ import annotations

import shlex
from pathlib import Path

from data_prep.command_line import module_command, program_command
from data_prep.shards import ShardSet
from pipeline.distillation.models.model_files import looks_like_path

SAMPLES = Path("samples/cc100")
UNKNOWN_TEXT = "TEXT"  # the user replaces it


def how_to_prepare(tokenizer: str, output: str | Path, text: str | Path = SAMPLES) -> str:
    """`Make them: COMMAND`. A tokenizer of the Hub is downloaded first, because `data_prep` does not use the network."""
    directory, fetch = Path(tokenizer).expanduser(), ""
    if not directory.exists() and looks_like_path(tokenizer):
        return f"No tokenizer found at {tokenizer} to make them with"
    if not directory.exists():
        directory = Path("artifacts/tokenizers") / tokenizer.replace("/", "--")
        files = ["--include", "*.model", "--include", "tokenizer*", "--include", "config.json"]
        words = ["download", tokenizer, *files, "--local-dir", str(directory)]
        fetch = f"{program_command('hf')} {shlex.join(words)} && "
    prepare = module_command("data_prep", "prepare", "--input", text, "--tokenizer", directory, "--output", output)
    return f"Make them: {fetch}{prepare}"


def text_of(shards: ShardSet) -> str:
    """The sample corpus if the shards were made from it, by the file names in their manifest; else `TEXT`."""
    sources = [source["name"] for entry in shards.manifest["languages"].values() for source in entry["sources"]]
    return str(SAMPLES) if all((SAMPLES / name).is_file() for name in sources) else UNKNOWN_TEXT
