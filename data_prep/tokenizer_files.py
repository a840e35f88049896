"""What the files of a Hugging Face directory say of its tokenizer, and the command by which transformers completes them.

In: a directory. Out: names, commands and messages. Used by shards.py, which chooses the file that decides over ids, and by the
comparison with AutoTokenizer.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path

FAST_TOKENIZER_NAME, TOKENIZER_CONFIG_NAME, CONFIG_NAME = "tokenizer.json", "tokenizer_config.json", "config.json"
OTHER_VOCABULARY_NAMES = (
    "spm.model",
    "vocab.txt",
    "vocab.json",
    "bpe.codes",
    "tekken.json",
)  # AutoTokenizer reads these
GIVE_TOKENIZER = (
    "Give a SentencePiece .model file, a tokenizer.json, or a directory with one (XLM-R ships sentencepiece.bpe.model). From "
    "the Hub: hf download FacebookAI/xlm-roberta-large sentencepiece.bpe.model --local-dir DIR."
)


def no_tokenizer_in(path: Path, names: Sequence[str]) -> str:
    """What to do about a directory from which no ids can be read; the fix depends on what else it holds."""
    if not path.is_dir():
        return f"Tokenizer {path} does not exist. {GIVE_TOKENIZER}"
    other = [name for name in OTHER_VOCABULARY_NAMES if (path / name).is_file()]
    if not other:
        return f"Tokenizer {path} holds none of {', '.join(names)}. {GIVE_TOKENIZER}"
    first = (
        ""
        if named_architecture(path)
        else f"copy the model's config.json into {path}, which says whose tokenizer that is, then "
    )
    return (
        f"Tokenizer {path} holds {' and '.join(other)}, from which ids are not read here, and no tokenizer.json. Make one, "
        f"once: {first}{save_command(path)} and run the same command again."
    )


def save_command(directory: Path, superseded: str | None = None) -> str:
    """A shell command by which AutoTokenizer writes a `tokenizer.json`; a file that is `superseded` by it is renamed."""
    name = json.dumps(str(directory))  # double quotes: the shell's are single
    code = f"from transformers import AutoTokenizer; AutoTokenizer.from_pretrained({name}).save_pretrained({name})"
    if superseded is not None:
        file = str(directory / superseded)
        code += f"; import os; os.rename({json.dumps(file)}, {json.dumps(file + '.unused')})"
    return f"python -c {shlex.quote(code)}"


def named_architecture(directory: Path) -> str | None:
    """The class that `tokenizer_config.json` names, else what `config.json` says that the model is; None: neither does."""
    for name, keys in (
        (TOKENIZER_CONFIG_NAME, ("tokenizer_class",)),
        (CONFIG_NAME, ("tokenizer_class", "model_type")),
    ):
        try:
            content = json.loads((directory / name).read_bytes())
            named = next((content[key] for key in keys if isinstance(content.get(key), str)), None)
        except (OSError, ValueError, AttributeError):
            named = None
        if named:
            return named
    return None
