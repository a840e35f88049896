"""A tokenizer.json (WordPiece, byte-level BPE, BPE with byte fallback, ...) whose rows are one begin token, text, one end token.

In: lines of UTF-8. Out: the ids that `tokenizers` gives each line, with the end token after every line. Two things make them in a
fraction of the time, where they are known to give the same ids: the engine of `kitoken_engine.py`, and encoding each different
word of a block once (`words.py`). Both are compared with `tokenizers` before use, and on every `CHECKED_EVERY`-th line.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data_prep.names import one_line
from data_prep.shard_layout import TOKEN_DTYPE
from data_prep.shards import DataError

if TYPE_CHECKING:
    from data_prep.kitoken_engine import KitokenEngine
    from data_prep.words import WordEncoder

CHECKED_EVERY = 10_000
SHOWN_IDS = 8


def opened(content: bytes, path: Path) -> Any:
    """The library's tokenizer of a `tokenizer.json`. Raises `DataError` if the library cannot read it."""
    import tokenizers

    try:
        return tokenizers.Tokenizer.from_buffer(content)
    except BaseException as error:
        # The library raises plain Exception for files that it cannot read. Its panics are no Exception.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise DataError(
            f"{path} is not a valid tokenizer.json ({one_line(error)}). Copy it again from the origin of the model."
        ) from error


class FastTokenizer:
    """A `tokenizer.json` whose rows are one begin token, text, one end token.

    Args:
        path: the file.
        engine: `tokenizers`: that library encodes line by line. `auto`: kitoken encodes if its ids are known to be the same,
            else `tokenizers`, and a line is encoded by its words if its ids are those of its words. `kitoken`: as `auto`, but
            raise `DataError` if kitoken cannot be used.
    """

    unit = "line"

    def __init__(self, path: str | Path, engine: str = "tokenizers") -> None:
        # Each tokenising process has one thread. The library is imported here because only this kind needs it.
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        import tokenizers

        self.path = Path(path)
        content = self.path.read_bytes()
        self.sha256 = hashlib.sha256(content).hexdigest()
        self.library: Mapping[str, str] = {"tokenizers": tokenizers.__version__}
        self._tokenizer = opened(content, self.path)
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        parsed = json.loads(content)
        begin, self._end = self._row_ends()
        self.special_ids: Mapping[str, int] = {"bos": begin, "eos": self._end}
        # A literal "</s>" in web text is text. Some models also have it as a piece: its id is left out.
        self._tokenizer.encode_special_tokens = True
        added = self._tokenizer.get_added_tokens_decoder()
        self.num_pieces = self._tokenizer.get_vocab_size(with_added_tokens=False)
        # Ids may have gaps, so the largest id decides.
        self.vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        self._is_text = np.ones(self.vocab_size, dtype=bool)
        self._is_text[[number for number, token in added.items() if token.special]] = False
        self.unk_id: int | None = self._unknown_id(parsed["model"])
        if self.unk_id is not None and not self._is_text[self.unk_id]:
            # An unknown word is part of the text, like XLM-R's <unk>. The manifest names the id, because earlier versions left
            # it out: such shards are not continued.
            self._is_text[self.unk_id] = True
            self.special_ids = {**self.special_ids, "unk": self.unk_id}

        self._engine: KitokenEngine | None = None
        self.note = ""  # why the engine does not encode
        self._undivided = ""  # a regular expression for lines that are not encoded by their words
        self._words: WordEncoder | None = None
        self._num_lines = 0
        if engine != "tokenizers":
            self._prepare_speed(parsed, engine)

    def _prepare_speed(self, parsed: dict[str, Any], engine: str) -> None:
        # imported here, because other kinds of tokenizer and the checks of a run do not need them
        from data_prep.kitoken_engine import EngineUnusable, KitokenEngine, added_texts, any_of, starts_of
        from data_prep.word_boundaries import MARKER, pieces_across, why_not_json
        from data_prep.words import WordEncoder

        try:
            self._engine = KitokenEngine(parsed, self._tokenizer)
        except EngineUnusable as error:
            if engine == "kitoken":
                raise DataError(f"{self.path}: {error}. Prepare it with --engine tokenizers or auto.") from error
            self.note = str(error)
        if why_not_json(parsed) is None:
            added = added_texts(parsed, self._tokenizer.normalizer)
            with suppress(EngineUnusable):  # too many texts to search for
                self._undivided = any_of(["  ", MARKER, *starts_of(added), *pieces_across(parsed)])
                self._words = WordEncoder(self._encode)

    @property
    def engine(self) -> str:
        """Name and version of the engine that makes the ids; empty if `tokenizers` makes them."""
        return self._engine.version if self._engine is not None else ""

    def _row_ends(self) -> tuple[int, int]:
        """The ids of the tokens before and after a text."""
        around_nothing = self._tokenizer.encode("").ids
        if len(around_nothing) != 2:
            raise DataError(
                f"{self.path} puts {len(around_nothing)} special tokens around a text; an encoder's puts two, one at "
                "each end ([CLS] and [SEP], or <s> and </s>). Give the tokenizer of an encoder."
            )
        begin, end = around_nothing
        around_text = self._tokenizer.encode("x").ids
        if (around_text[0], around_text[-1]) != (begin, end) or len(around_text) < 3:
            raise DataError(
                f"{self.path} does not put one special token at each end of a text ({around_text} is its row for 'x'; "
                "mBART and XLNet put both at the end). Give the tokenizer of an encoder ([CLS] and [SEP], or <s> and </s>)."
            )
        return begin, end

    def _unknown_id(self, model: dict[str, Any]) -> int | None:
        """The id of unknown words. WordPiece and BPE name the token, Unigram gives the id; None if there is none."""
        if model.get("unk_id") is not None:
            return int(model["unk_id"])
        return self._tokenizer.token_to_id(model["unk_token"]) if model.get("unk_token") else None

    def encode_lines(self, lines: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
        """As in `Tokenizer`. Raises `DataError` if the ids of a line that is compared are not those of `tokenizers`."""
        ids, lengths = self._encode_by_words(lines) or self._encode(lines)
        if self._engine is not None or self._words is not None:
            first = -self._num_lines % CHECKED_EVERY
            self._num_lines += len(lines)
            ends = np.cumsum(lengths)
            for number in range(first, len(lines), CHECKED_EVERY):
                ours = ids[ends[number] - lengths[number] : ends[number]]
                self._compare(lines[number], ours, f"line {self._num_lines - len(lines) + number + 1} of this process")
        return ids, lengths

    def judge(self, lines: list[str], where: str) -> None:
        """Compare all ways in which a line may be encoded with `tokenizers`. Raises `DataError` with the first that differs."""
        encoded = [line.encode("utf-8", "replace") for line in lines]
        ways = [self._encode(encoded), self._encode_by_words(encoded, always=True)] if encoded else []
        for ids, lengths in filter(None, ways):
            for line, ours in zip(encoded, np.split(ids, np.cumsum(lengths)[:-1]), strict=True):
                self._compare(line, ours, where)

    def _encode_by_words(self, lines: list[bytes], always: bool = False) -> tuple[np.ndarray, np.ndarray] | None:
        """The ids by way of the different words; None if that is not known to be right, or not worth the search."""
        if self._words is None:
            return None
        from data_prep.kitoken_engine import holds_any
        from data_prep.words import have_short_words, words_of

        if not (always or have_short_words(lines)):
            return None
        words = words_of(lines, holds_any(self._undivided, lines))
        return self._words.encode(words) if always or words.are_worth_it else None

    def _encode(self, lines: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
        """The ids of texts, each with the end token: uint32 [total]; the number of ids of each: int64 [lines]."""
        texts = [line.decode("utf-8", "replace") for line in lines]
        of_engine: dict[int, list[int]] = {}
        if self._engine is not None:
            safe = np.flatnonzero(~self._engine.unsafe(texts)).tolist()
            found = self._engine.encode([texts[number] for number in safe])
            of_engine = {number: ids for number, ids in zip(safe, found, strict=True) if ids is not None}
        left = [number for number in range(len(texts)) if number not in of_engine]
        encodings = self._by_tokenizers([texts[number] for number in left])
        of_library = {number: encoding.ids for number, encoding in zip(left, encodings, strict=True)}
        per_line = [of_engine[number] if number in of_engine else of_library[number] for number in range(len(texts))]
        counts = np.fromiter(map(len, per_line), np.int64, len(per_line))
        flat = np.fromiter(chain.from_iterable(per_line), TOKEN_DTYPE, counts.sum())
        spelled = self._is_text[flat]
        if not spelled.all():
            line_of = np.repeat(np.arange(len(per_line)), counts)
            flat, counts = flat[spelled], np.bincount(line_of[spelled], minlength=len(per_line))
        return np.insert(flat, np.cumsum(counts), self._end).astype(TOKEN_DTYPE), counts + 1

    def _by_tokenizers(self, texts: list[str]) -> list[Any]:
        return self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)

    def _compare(self, line: bytes, ours: np.ndarray, where: str) -> None:
        text = line.decode("utf-8", "replace")
        encoded = np.array(self._by_tokenizers([text])[0].ids, TOKEN_DTYPE)
        theirs = np.append(encoded[self._is_text[encoded]], self._end)
        if np.array_equal(ours, theirs):
            return
        same = min(len(ours), len(theirs))
        start = next((n for n in range(same) if ours[n] != theirs[n]), same)
        here = slice(start, start + SHOWN_IDS)
        raise DataError(
            f"{self.engine or 'Encoding by words'} gives other ids than tokenizers for {where}: {text[:200]!r} from token "
            f"{start} on is {ours[here].tolist()} and not {theirs[here].tolist()}. Shards that it made may hold such "
            "lines: the manifest names it in their records. Prepare them again with --engine tokenizers and another --output."
        )
