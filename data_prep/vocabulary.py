"""A smaller vocabulary: a tokenizer with only the pieces that some languages use, and the map to the old ids.

In: a tokenizer in XLM-R's layout and a `TokenCounts`. Out: a directory with the SentencePiece model, the files that
`AutoTokenizer` loads, and `vocabulary.json`: the old id of every new id, hashes of both tokenizers, loss of each language.

Why ids map one to one: a unigram tokenizer chooses the best-scoring split of a text into pieces. Removing pieces that the best
split does not use leaves it the best split without `<unk>`. A split with `<unk>` can gain: the score of `<unk>` is the lowest
score of a piece minus 10, and rises when that piece is removed. So a sample of every language is split again and must agree.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2

from data_prep.json_files import read_json_object
from data_prep.outputs import check_output_place, replaced_directory
from data_prep.shards import EOS_ID, UNK_ID, DataError, UnreadableError
from data_prep.token_counts import TokenCounts
from data_prep.tokenizer import SentencePieceTokenizer, ids_of
from data_prep.tokenizer_ids import FAST_TOKENIZER_NAME, SENTENCEPIECE_NAMES, SPM_CONTROL_PIECES, TOKENIZER_CONFIG_NAME

protobuf: Any = sentencepiece_model_pb2  # generated code without types
FORMAT_NAME, FORMAT_VERSION = "minilmv2-vocabulary", 1
MAP_FILE = "vocabulary.json"
MODEL_FILE = SENTENCEPIECE_NAMES[0]
PRODUCTS = (MAP_FILE, MODEL_FILE, TOKENIZER_CONFIG_NAME, FAST_TOKENIZER_NAME)  # files that trim-vocab writes
NUM_LEADING_SPECIALS = 4  # <s> <pad> </s> <unk>; the last id is <mask>
WORD_START = "▁"
DEFAULT_MAX_LENGTH = 512


@dataclass(frozen=True)
class TrimOptions:
    """Which pieces are kept."""

    languages: Sequence[str]  # keep pieces that occur in their text
    min_count: int = 1  # occurrences in all these languages together
    coverage: float = 1.0  # share of each language's tokens that its most frequent pieces must make up

    def __post_init__(self) -> None:
        if self.min_count < 1:
            raise DataError(f"--min-count is {self.min_count}; it must be at least 1.")
        if not 0 < self.coverage <= 1:
            raise DataError(f"--coverage is {self.coverage}; it is a share of the tokens, above 0 and at most 1.")


def trim_vocabulary(
    tokenizer: SentencePieceTokenizer, counts: TokenCounts, options: TrimOptions, output: Path
) -> dict[str, Any]:
    """Write the smaller vocabulary to `output`, completely or not at all.

    Returns:
        The content of `vocabulary.json`, except the ids.

    Raises:
        DataError: a language has no text, the output is something else, or a line is split differently afterwards.
    """
    missing = [language for language in options.languages if language not in counts.counts]
    if missing:
        raise DataError(f"There is no text of {', '.join(missing)}, only of {', '.join(sorted(counts.counts))}.")
    if output.exists() and (not (output / MAP_FILE).is_file() or (output / "config.json").is_file()):
        raise DataError(
            f"{output} exists and is not an earlier vocabulary, so it is not replaced. Name another --output."
        )
    model = protobuf.ModelProto()
    model.ParseFromString(tokenizer.path.read_bytes())
    pieces = pieces_by_id(model)
    kept = kept_ids(counts.counts, options, pieces)
    check_output_place(output, "--output", {"the tokenizer": tokenizer.path})
    with replaced_directory(output, PRODUCTS) as temporary:
        write_tokenizer(tokenizer.path, model, pieces, kept, temporary)
        smaller = SentencePieceTokenizer(temporary / MODEL_FILE)
        about = {
            "format": FORMAT_NAME,
            "version": FORMAT_VERSION,
            "source_sha256": tokenizer.sha256,
            "source_vocab_size": len(pieces),
            "tokenizer_sha256": smaller.sha256,
            "vocab_size": len(kept),
            "languages": list(options.languages),
            "min_count": options.min_count,
            "coverage": options.coverage,
            "loss": losses(tokenizer, smaller, counts, kept),
        }
        (temporary / MAP_FILE).write_text(json.dumps({**about, "old_ids": kept.tolist()}) + "\n", encoding="utf-8")
    return about


def kept_ids(counts: dict[str, np.ndarray], options: TrimOptions, pieces: list[str]) -> np.ndarray:
    """Old ids to keep, ascending: int64.

    These are the special tokens, every piece that the languages use often enough, and the single characters of these pieces, so
    that no text in known characters becomes unknown.
    """
    chosen = [counts[language] for language in options.languages]
    used = np.any([_most_frequent(total, options.coverage) for total in chosen], axis=0)
    used &= np.sum(chosen, axis=0) >= options.min_count
    used[:NUM_LEADING_SPECIALS] = used[-1] = True
    characters = {character for piece, is_used in zip(pieces, used, strict=True) if is_used for character in piece}
    single = np.array([len(piece.lstrip(WORD_START)) <= 1 for piece in pieces])
    known = np.array([set(piece) <= characters for piece in pieces])
    return np.flatnonzero(used | (single & known))


def _most_frequent(total: np.ndarray, coverage: float) -> np.ndarray:
    """Whether each id is one of the fewest that make up `coverage` of all occurrences: bool. Lower ids come first in ties."""
    if coverage == 1:
        return total > 0
    order = np.argsort(-total, kind="stable")
    before = np.cumsum(total[order]) - total[order]
    used = np.zeros(len(total), dtype=bool)
    used[order] = (before < coverage * total.sum()) & (total[order] > 0)
    return used


def pieces_by_id(model: Any) -> list[str]:
    """The text of every id from `<s>` to `<mask>`; special tokens have none."""
    pieces = [piece.piece for piece in model.pieces[SPM_CONTROL_PIECES:]]
    return [""] * NUM_LEADING_SPECIALS + pieces + [""]


def write_tokenizer(model_path: Path, model: Any, pieces: list[str], kept: np.ndarray, directory: Path) -> None:
    """Write the SentencePiece model, its config, and a `tokenizer.json` if the source has one, with the kept ids only."""
    inner = kept[(kept >= NUM_LEADING_SPECIALS) & (kept <= len(model.pieces))] - 1
    kept_pieces = [model.pieces[i] for i in [*range(SPM_CONTROL_PIECES), *inner.tolist()]]
    trimmed = protobuf.ModelProto()
    trimmed.CopyFrom(model)
    del trimmed.pieces[:]
    trimmed.pieces.extend(kept_pieces)
    trimmed.trainer_spec.vocab_size = len(kept_pieces)
    (directory / MODEL_FILE).write_bytes(trimmed.SerializeToString(deterministic=True))
    settings = _read_json(model_path.with_name(TOKENIZER_CONFIG_NAME))
    short = {
        "tokenizer_class": "XLMRobertaTokenizer",
        "model_max_length": settings.get("model_max_length", DEFAULT_MAX_LENGTH),
    }
    (directory / TOKENIZER_CONFIG_NAME).write_text(json.dumps(short, indent=2) + "\n", encoding="utf-8")
    fast = model_path.with_name(FAST_TOKENIZER_NAME)
    if tree := _read_json(fast):
        cut = cut_fast_tokenizer(tree, pieces, kept, fast)
        (directory / fast.name).write_text(json.dumps(cut, ensure_ascii=False), encoding="utf-8")


def cut_fast_tokenizer(tree: dict[str, Any], pieces: list[str], kept: np.ndarray, path: Path) -> dict[str, Any]:
    """The content of a `tokenizer.json` with the kept ids only. Raises `DataError` if it is not the model's vocabulary."""
    try:
        vocab, added = tree["model"]["vocab"], tree["added_tokens"]
        inner = slice(NUM_LEADING_SPECIALS, len(pieces) - 1)
        same = [piece for piece, _ in vocab][inner] == pieces[inner] and len(vocab) == len(pieces)
    except (KeyError, TypeError, ValueError):
        same = False
    if not same or any(token["id"] >= len(pieces) for token in added):
        raise DataError(
            f"{path} does not have the vocabulary of the SentencePiece model in its directory. Move it out of the directory "
            "(transformers makes it again from the model) and run the same command."
        )
    new_id = {old: new for new, old in enumerate(kept.tolist())}
    return {
        **tree,
        "model": {**tree["model"], "vocab": [vocab[i] for i in kept]},
        "added_tokens": [{**token, "id": new_id[token["id"]]} for token in added if token["id"] in new_id],
    }


def losses(
    old: SentencePieceTokenizer, new: SentencePieceTokenizer, counts: TokenCounts, kept: np.ndarray
) -> dict[str, dict[str, float | int]]:
    """The effect of the smaller vocabulary on a sample of the lines of each language.

    Returns:
        For each language: `kept`, share of tokens whose piece is kept; `longer`, tokens after / before; `unknown`, share of
        `<unk>`; `lines`, number of lines; `lines_equal`, number of lines whose pieces are all kept.

    Raises:
        DataError: a line whose pieces are all kept is split differently than before.
    """
    new_id = np.full(counts.vocab_size, -1, dtype=np.int64)
    new_id[kept] = np.arange(len(kept))
    found = {}
    for language, total in counts.counts.items():
        texts = _lines(old.processor, counts.samples[language])
        before, after, unknown, equal = 0, 0, 0, 0
        for text, old_ids, new_ids in zip(texts, ids_of(old, texts), ids_of(new, texts), strict=True):
            before += len(old_ids)
            after += len(new_ids)
            unknown += int((new_ids == UNK_ID).sum())
            if (new_id[old_ids] >= 0).all():
                if not np.array_equal(new_id[old_ids], new_ids):
                    raise DataError(
                        f"{language}: {text[:60]!r} is split differently after trimming; nothing was written."
                    )
                equal += 1
        found[language] = {
            "kept": float(total[kept].sum() / max(total.sum(), 1)),
            "longer": after / max(before, 1),
            "unknown": unknown / max(after, 1),
            "lines": len(texts),
            "lines_equal": equal,
        }
    return found


def _lines(processor: SentencePieceProcessor, sample: np.ndarray) -> list[str]:
    """The lines of a stream of ids. Lines with `<unk>` cannot be decoded and are left out."""
    known = (line for line in np.split(sample, np.flatnonzero(sample == EOS_ID) + 1) if UNK_ID not in line)
    lines = [line[line >= NUM_LEADING_SPECIALS] - 1 for line in known]
    return [text for text in processor.decode([line.tolist() for line in lines if len(line)]) if text]


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file of the tokenizer; empty if there is no such file."""
    if not path.is_file():
        return {}
    try:
        return read_json_object(path)
    except UnreadableError:
        raise
    except ValueError as error:
        raise DataError(
            f"{path} is not a JSON object ({error}). Copy it again from the origin of the tokenizer."
        ) from error


def trimming_table(about: dict[str, Any]) -> str:
    """A table of both sizes and of the losses of every language."""
    lines = [
        f"pieces: {about['source_vocab_size']:,} -> {about['vocab_size']:,}",
        f"{'language':<10}{'tokens kept':>12}{'longer':>9}{'unknown':>9}   lines split as before",
    ]
    for language, loss in sorted(about["loss"].items(), key=lambda item: -item[1]["kept"]):
        mark = "  requested" if language in about["languages"] else ""
        lines.append(
            f"{language:<10}{loss['kept']:>12.4f}{loss['longer']:>8.3f}x{loss['unknown']:>9.4f}   "
            f"{loss['lines_equal']} of {loss['lines']}{mark}"
        )
    return "\n".join(lines)
