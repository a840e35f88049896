"""The file of a tokenizer directory that determines token ids, and the ids that it gives.

In: a Hugging Face directory. Out: the deciding file, the class that the directory names, ids by piece, or a `DataError` with
the command that adds a missing `tokenizer.json`. CamemBERT's files have the names of XLM-R's, and its pieces have ids that
are larger by three; so a directory that holds both kinds of file and names no class is judged by the ids themselves.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from data_prep.json_files import read_json_object, read_optional_json_object
from data_prep.shards import BOS_ID, EOS_ID, PAD_ID, UNK_ID, DataError

UNITS = ("line", "word")  # what a SentencePiece model encodes at a time
ENGINES = ("auto", "kitoken", "tokenizers")  # what encodes for a tokenizer.json
SENTENCEPIECE_NAMES = ("sentencepiece.bpe.model", "spiece.model", "tokenizer.model")
FAST_TOKENIZER_NAME, TOKENIZER_CONFIG_NAME, CONFIG_NAME = "tokenizer.json", "tokenizer_config.json", "config.json"
# AutoTokenizer reads these vocabularies; prepare does not.
OTHER_VOCABULARY_NAMES = ("spm.model", "vocab.txt", "vocab.json", "bpe.codes", "tekken.json")
SPM_CONTROL_PIECES = (
    3  # <unk>, <s>, </s> are the first pieces of the model; the id of every later piece is its index + 1
)
XLMR_SPECIAL_IDS = {"<s>": BOS_ID, "<pad>": PAD_ID, "</s>": EOS_ID, "<unk>": UNK_ID}
# Model types that count positions from the padding id on. Their tables have that many more rows than a text may have tokens.
POSITIONS_FROM_PADDING = ("roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "camembert", "mpnet")
GIVE_TOKENIZER = (
    "Give a SentencePiece .model file, a tokenizer.json, or a directory with one (XLM-R ships sentencepiece.bpe.model). From "
    "the Hub: hf download FacebookAI/xlm-roberta-large sentencepiece.bpe.model --local-dir DIR."
)


def tokenizer_file(path: Path) -> Path:
    """The one file that determines ids: `path` itself, or a file of the Hugging Face directory `path`.

    XLM-R's `sentencepiece.bpe.model` is preferred. `tokenizer.json`, which states its ids, is preferred to it if the directory
    names another tokenizer class, if `tokenizer.json` adds words, or if no class is named and `tokenizer.json` gives the pieces
    other ids. Other SentencePiece models come last. The manifest of the shards holds the SHA-256 of this file.

    Raises:
        DataError: the directory holds no file from which ids are read.
    """
    if path.is_file():
        return path
    names = [*SENTENCEPIECE_NAMES[:1], FAST_TOKENIZER_NAME, *SENTENCEPIECE_NAMES[1:]]
    if (path / FAST_TOKENIZER_NAME).is_file() and not _is_xlmr(path):
        names.sort(key=lambda name: name != FAST_TOKENIZER_NAME)
    for name in names:
        if (path / name).is_file():
            return path / name
    raise DataError(_no_tokenizer_in(path, names))


def _is_xlmr(directory: Path) -> bool:
    """Decided by the class in `tokenizer_config.json`; if there is none, by comparing the ids of the two files."""
    fast = directory / FAST_TOKENIZER_NAME
    if adds_words(fast):
        return False
    name = read_optional_json_object(directory / TOKENIZER_CONFIG_NAME).get("tokenizer_class")
    if isinstance(name, str):
        return name.startswith("XLMRoberta")
    model = directory / SENTENCEPIECE_NAMES[0]
    return model.is_file() and has_xlmr_ids(model, fast)


def has_xlmr_ids(model: Path, fast: Path) -> bool:
    """Whether `fast` gives every piece of the SentencePiece `model`, and each special token, the id that XLM-R gives it.

    False if either file cannot be read.
    """
    import sentencepiece  # not at the top: training reads shards and never opens a tokenizer

    try:
        ids = fast_ids(fast)
        pieces = sentencepiece.SentencePieceProcessor(model_file=str(model))
    except (OSError, ValueError, KeyError, TypeError, RuntimeError):
        return False
    if any(ids.get(piece) != number for piece, number in XLMR_SPECIAL_IDS.items()):
        return False
    numbers = range(SPM_CONTROL_PIECES, pieces.get_piece_size())
    return all(ids.get(pieces.id_to_piece(number)) == number + 1 for number in numbers)


def adds_words(fast: Path) -> bool:
    """Whether a tokenizer.json adds words to the pieces of its model, as after fine-tuning with added tokens."""
    try:
        status = fast.stat()
        return _adds_words(fast, status.st_mtime_ns, status.st_size)
    except (OSError, ValueError, KeyError, TypeError):
        return False


@lru_cache(maxsize=8)
def _adds_words(fast: Path, mtime_ns: int, size: int) -> bool:
    """Cached: a run asks several times, and parsing XLM-R's file of 17 MB costs 0.3 s."""
    return any(not token["special"] for token in read_json_object(fast)["added_tokens"])


def fast_ids(fast: Path) -> dict[str, int]:
    """Id of every piece of a tokenizer.json, whose vocabulary is an ordered list (Unigram) or a table (WordPiece, BPE)."""
    content = read_json_object(fast)
    vocabulary = content["model"]["vocab"]
    if isinstance(vocabulary, list):
        vocabulary = {piece: number for number, (piece, _) in enumerate(vocabulary)}
    return {**vocabulary, **{token["content"]: token["id"] for token in content["added_tokens"]}}


def named_architecture(directory: Path) -> str | None:
    """The tokenizer class that the directory names, or the model type of its `config.json`; None if it names neither."""
    for name, keys in ((TOKENIZER_CONFIG_NAME, ("tokenizer_class",)), (CONFIG_NAME, ("tokenizer_class", "model_type"))):
        content = read_optional_json_object(directory / name)
        if named := next((content[key] for key in keys if isinstance(content.get(key), str)), None):
            return named
    return None


def save_command(directory: Path, superseded: str | None = None) -> str:
    """A shell command by which AutoTokenizer writes a `tokenizer.json` and renames the file that it supersedes."""
    name = json.dumps(str(directory))  # double quotes: the shell's quotes are single
    code = f"from transformers import AutoTokenizer; AutoTokenizer.from_pretrained({name}).save_pretrained({name})"
    if superseded is not None:
        file = str(directory / superseded)
        code += f"; import os; os.rename({json.dumps(file)}, {json.dumps(file + '.unused')})"
    return f"python -c {shlex.quote(code)}"


def _no_tokenizer_in(path: Path, names: Sequence[str]) -> str:
    """The error text for a path from which no ids can be read; its fix depends on what else the directory holds."""
    if not path.is_dir():
        return f"Tokenizer {path} does not exist. {GIVE_TOKENIZER}"
    other = [name for name in OTHER_VOCABULARY_NAMES if (path / name).is_file()]
    if not other:
        return f"Tokenizer {path} holds none of {', '.join(names)}. {GIVE_TOKENIZER}"
    first = (
        ""
        if named_architecture(path)
        else f"copy the model's config.json into {path} (it names the tokenizer's class), then "
    )
    return (
        f"Tokenizer {path} holds {' and '.join(other)}, from which prepare does not read ids, and no tokenizer.json. Make one, "
        f"once: {first}{save_command(path)} and run the same command again."
    )
