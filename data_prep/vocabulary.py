"""A smaller vocabulary: a tokenizer with only the pieces that some languages use, and the map to the old ids.

In: a tokenizer and a `TokenCounts`. Out: a directory with the tokenizer's files and `vocabulary.json`: the old id of every new
id, hashes of both tokenizers, loss of each language.

Why ids map one to one on text whose pieces are all kept: a unigram tokenizer chooses the best-scoring split. It stays the best
one, as no split is added but those with `<unk>` for a dropped character, which scores lower than the character. WordPiece
chooses the longest piece that matches; it stays the longest. BPE: see `merge_table.py`. A sample of every language is split
again and must agree.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from data_prep.fast_pieces import ADDED_MAP, SPECIAL_MAP, FastPieces
from data_prep.id_check import check_tokenizer
from data_prep.outputs import check_output_place, replaced_directory
from data_prep.sentencepiece_pieces import MODEL_FILE, SentencePiecePieces
from data_prep.shards import DataError
from data_prep.token_counts import TokenCounts
from data_prep.tokenizer import SentencePieceTokenizer, Tokenizer, ids_of, open_tokenizer
from data_prep.tokenizer_ids import FAST_TOKENIZER_NAME, TOKENIZER_CONFIG_NAME, tokenizer_file

FORMAT_NAME, FORMAT_VERSION = "minilmv2-vocabulary", 1
MAP_FILE = "vocabulary.json"
# files that trim-vocab writes
PRODUCTS = (MAP_FILE, MODEL_FILE, TOKENIZER_CONFIG_NAME, FAST_TOKENIZER_NAME, SPECIAL_MAP, ADDED_MAP)


class Pieces(Protocol):
    """The pieces of a tokenizer, whatever its kind."""

    file: str  # name of the written file that determines ids
    facts: dict[str, Any]  # what `vocabulary.json` says about this kind
    texts: list[str]  # of every id; empty where the id has none
    unknown_may_change: bool  # whether text with unknown words can be split differently afterwards

    def with_parts(self, used: np.ndarray) -> np.ndarray:
        """`used`, ids that are kept in any case, what these are made from, and the characters of `used`: bool [ids]."""

    def lines(self, streams: list[list[int]]) -> list[str]:
        """The text of each list of ids."""

    def write(self, kept: np.ndarray, directory: Path) -> None:
        """Write the tokenizer's files with the kept ids, ascending, which become 0, 1, 2, ..."""


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


def open_pieces(path: Path) -> tuple[Pieces, Tokenizer]:
    """The pieces of a tokenizer, and the tokenizer. Raises `DataError`: pieces cannot be dropped from it."""
    file = tokenizer_file(path)
    if file.suffix == ".json":
        pieces = FastPieces(file)  # first: its messages are more precise
        return pieces, open_tokenizer(file)
    tokenizer = SentencePieceTokenizer(file)
    return SentencePiecePieces(tokenizer), tokenizer


def trim_vocabulary(
    pieces: Pieces, tokenizer: Tokenizer, counts: TokenCounts, options: TrimOptions, output: Path
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
    kept = kept_ids(counts.counts, options, pieces)
    check_output_place(output, "--output", {"the tokenizer": tokenizer.path})
    with replaced_directory(output, PRODUCTS) as temporary:
        pieces.write(kept, temporary)
        smaller = open_tokenizer(temporary / pieces.file)
        about = {
            "format": FORMAT_NAME,
            "version": FORMAT_VERSION,
            **pieces.facts,
            "source_sha256": tokenizer.sha256,
            "source_vocab_size": len(pieces.texts),
            "tokenizer_sha256": smaller.sha256,
            "vocab_size": len(kept),
            "languages": list(options.languages),
            "min_count": options.min_count,
            "coverage": options.coverage,
            "loss": losses(pieces, (tokenizer, smaller), counts, kept),
        }
        if pieces.file == FAST_TOKENIZER_NAME:
            _check_class(temporary, smaller)
        (temporary / MAP_FILE).write_text(json.dumps({**about, "old_ids": kept.tolist()}) + "\n", encoding="utf-8")
    return about


def _check_class(directory: Path, smaller: Tokenizer) -> None:
    """Check that AutoTokenizer gives the ids of the written tokenizer.json.

    Some classes build their tokenizer themselves. Where the model's config.json made AutoTokenizer read the file instead, the
    class is set to the one that reads it.
    """
    try:
        check_tokenizer(directory, smaller)
    except DataError:
        path = directory / TOKENIZER_CONFIG_NAME
        settings = {**json.loads(path.read_text(encoding="utf-8")), "tokenizer_class": "PreTrainedTokenizerFast"}
        path.write_text(json.dumps(settings, ensure_ascii=False) + "\n", encoding="utf-8")
        check_tokenizer(directory, smaller)


def kept_ids(counts: dict[str, np.ndarray], options: TrimOptions, pieces: Pieces) -> np.ndarray:
    """Old ids to keep, ascending: int64.

    These are special tokens, every piece that the languages use often enough, what these pieces are made from, and their single
    characters, so that no text in known characters becomes unknown.
    """
    chosen = [counts[language] for language in options.languages]
    used = np.any([_most_frequent(total, options.coverage) for total in chosen], axis=0)
    used &= np.sum(chosen, axis=0) >= options.min_count
    return np.flatnonzero(pieces.with_parts(used))


def _most_frequent(total: np.ndarray, coverage: float) -> np.ndarray:
    """Whether each id is one of the fewest that make up `coverage` of all occurrences: bool. Lower ids come first in ties."""
    if coverage == 1:
        return total > 0
    order = np.argsort(-total, kind="stable")
    before = np.cumsum(total[order]) - total[order]
    used = np.zeros(len(total), dtype=bool)
    used[order] = (before < coverage * total.sum()) & (total[order] > 0)
    return used


def losses(
    pieces: Pieces, both: tuple[Tokenizer, Tokenizer], counts: TokenCounts, kept: np.ndarray
) -> dict[str, dict[str, float | int]]:
    """The effect of the smaller vocabulary on a sample of the lines of each language.

    Args:
        both: the tokenizer and the smaller one

    Returns:
        For each language: `kept`, share of tokens whose piece is kept; `longer`, tokens after / before; `unknown`, share of
        unknown tokens; `lines`, number of lines; `lines_equal`, number of lines whose pieces are all kept.

    Raises:
        DataError: a line whose pieces are all kept is split differently than before.
    """
    old, new = both
    new_id = np.full(counts.vocab_size, -1, dtype=np.int64)
    new_id[kept] = np.arange(len(kept))
    if pieces.unknown_may_change and old.unk_id is not None:
        new_id[old.unk_id] = -1
    found = {}
    for language, total in counts.counts.items():
        texts = _lines(pieces, old, counts.samples[language], counts.end_id)
        before, after, unknown, equal = 0, 0, 0, 0
        for text, old_ids, new_ids in zip(texts, ids_of(old, texts), ids_of(new, texts), strict=True):
            before += len(old_ids)
            after += len(new_ids)
            unknown += int((new_ids == new.unk_id).sum()) if new.unk_id is not None else 0
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


def _lines(pieces: Pieces, tokenizer: Tokenizer, sample: np.ndarray, end_id: int) -> list[str]:
    """The lines of a stream of ids. Lines with unknown tokens cannot be decoded and are left out."""
    streams = [line[line != end_id] for line in np.split(sample, np.flatnonzero(sample == end_id) + 1)]
    known = [line.tolist() for line in streams if len(line) and tokenizer.unk_id not in line]
    return [text for text in pieces.lines(known) if text]


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
