"""kitoken, a faster engine for the ids of a tokenizer.json, and the texts that only `tokenizers` may encode.

In: the content of a tokenizer.json, and the `tokenizers` object made from it. Out: ids of texts, and whether a text is unsafe: its
ids could differ. Unsafe are texts with an added token; with a character that the two libraries treat differently (their Unicode
tables are of different versions), which is tried when the character is first met; and with a piece that no merges lead to.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterable, Sequence
from importlib import metadata
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import tokenizers

from data_prep.awkward import LINES, added_lines
from data_prep.command_line import module_command
from data_prep.names import one_line
from data_prep.word_boundaries import MARKER, PER_CHARACTER, kind_of, parts_of, replaces_spaces, steps_before_model

NAME = "kitoken"
UNSEEN, SAFE, UNSAFE = 0, 1, 2
# A character between letters, at both ends of a word, doubled, after an apostrophe, and among marks that are reordered: U+0334 has
# the lowest class of all marks, U+0345 the highest, and nothing composes with a digit. Letters without case, which are most of all
# characters, are tried at the ends of a word only.
CONTEXTS = "{1}{0} {0}{1} {0}{0}1 '{0} {1}\u0301{0}\u0323 {1}{0}\u0334 {1}\u0345{0} 1\u0301{0} 1{0}\u0323"
OF_CASELESS = "{1}{0} {0}1"
# Characters of an added token that are searched for. Tokens come in families with one start, such as <unused17>.
ANCHOR = 4
MOST_UNREACHED = 1000
MOST_SOUGHT_BYTES = 1 << 14  # of one pattern; from 20 kB on RE2 reads less than 1 MB/s, tokenizers encodes 3
TRIED_TOGETHER = 32  # characters in one text: a text costs as much as its bytes


class EngineUnusable(Exception):
    """Why the engine does not encode for a tokenizer."""


class KitokenEngine:
    """The engine for one tokenizer. Raises `EngineUnusable` if it is missing or its ids are not known to be the same."""

    def __init__(self, content: dict[str, Any], reference: Any) -> None:
        self._reference = reference  # a tokenizers.Tokenizer that encodes special tokens as text
        self._kitoken = _load(content)
        self.version = f"{NAME} {self.installed_version()}"
        normalizers = list(parts_of(content.get("normalizer"), "normalizers"))
        unreached = _unreached(content, reference)
        added = added_texts(content, reference.normalizer)
        normalized = [token["content"] for token in content.get("added_tokens", []) if token["normalized"]]
        self._aliased = (
            _characters_of_tokens([*normalized, *unreached], added, normalizers)
            if normalized or unreached
            else frozenset()
        )
        self._pattern = any_of([*starts_of(added), *unreached])
        self._letter = _known_letter(content["model"], reference)
        self._states = np.zeros(0x110000, np.uint8)
        self._try(content)

    @staticmethod
    def installed_version() -> str:
        return metadata.version(NAME)

    def encode(self, texts: list[str]) -> list[list[int] | None]:
        """The ids of each text, without special tokens; None where the engine has none."""
        try:
            return self._kitoken.encode_all(texts, False)
        except (KeyboardInterrupt, SystemExit, MemoryError):
            raise
        except BaseException:  # a character without an id, or a panic in Rust, which is no Exception
            half = len(texts) // 2
            return [*self.encode(texts[:half]), *self.encode(texts[half:])] if half else [None]

    def unsafe(self, texts: list[str]) -> np.ndarray:
        """Whether each text must be encoded by `tokenizers`: bool [texts]."""
        codes = np.frombuffer("".join(texts).encode("utf-32-le"), "<u4")
        states = self._states[codes]
        if not states.all():
            self._meet(np.unique(codes[states == UNSEEN]).tolist())
            states = self._states[codes]
        ends = np.cumsum(np.fromiter(map(len, texts), np.int64, len(texts)))
        found = np.zeros(len(texts), bool)
        found[np.searchsorted(ends, np.flatnonzero(states == UNSAFE), "right")] = True
        return found | holds_any(self._pattern, texts)

    def _meet(self, codes: list[int]) -> None:
        """Try characters that have not been seen before."""
        groups = [codes[start : start + TRIED_TOGETHER] for start in range(0, len(codes), TRIED_TOGETHER)]
        differing = {code for group in groups for code in self._differing(group)}
        for code in codes:
            is_safe = code not in differing and not _is_unassigned(code) and not self._is_alias(chr(code))
            self._states[code] = SAFE if is_safe else UNSAFE

    def _differing(self, codes: list[int]) -> list[int]:
        """The characters whose contexts have other ids; all of them if they differ together only."""
        if self._are_same([" ".join(map(self._in_contexts, codes))])[0]:
            return []
        half = len(codes) // 2
        return (self._differing(codes[:half]) + self._differing(codes[half:]) if half else []) or codes

    def _in_contexts(self, code: int) -> str:
        return (OF_CASELESS if _is_caseless(chr(code)) else CONTEXTS).format(chr(code), self._letter)

    def _are_same(self, texts: Iterable[str]) -> list[bool]:
        """Whether the engine gives each text the ids of `tokenizers`."""
        texts = list(texts)
        theirs = self._reference.encode_batch_fast(texts, add_special_tokens=False)
        return [ours == encoding.ids for ours, encoding in zip(self.encode(texts), theirs, strict=True)]

    def _is_alias(self, character: str) -> bool:
        """Whether normalising makes a character of an added token of another one, so that the text hides the token."""
        if not self._aliased or character == " ":  # spaces in tokens are searched for in both forms
            return False
        normal = self._reference.normalizer.normalize_str(character)
        return normal != character and not self._aliased.isdisjoint(normal)

    def _try(self, content: dict[str, Any]) -> None:
        """Compare the engine with `tokenizers` on lines that are difficult, and on all decomposed characters."""
        decomposed = [
            unicodedata.normalize("NFD", chr(code)) for code in range(0xC0, 0x20000) if _is_decomposable(code)
        ]
        for text, is_same in zip(decomposed, self._are_same(f"a{text}" for text in decomposed), strict=True):
            if not is_same:
                self._states[[ord(character) for character in text if not character.isascii()]] = UNSAFE
        added = [token["content"] for token in content.get("added_tokens", []) if not token["special"]]
        lines = [*LINES, *added_lines(added)]
        lines = [line for line, is_unsafe in zip(lines, self.unsafe(lines), strict=True) if not is_unsafe]
        for line, is_same in zip(lines, self._are_same(lines), strict=True):
            if not is_same:
                raise EngineUnusable(f"kitoken gives other ids than tokenizers for the line {line[:100]!r}")


def holds_any(pattern: str, texts: Sequence[str] | Sequence[bytes]) -> np.ndarray:
    """Whether each text matches a regular expression (RE2's): bool [texts]."""
    if not pattern or not texts:
        return np.zeros(len(texts), bool)
    array = pa.array(texts, pa.large_binary() if isinstance(texts[0], bytes) else pa.large_string())
    return pc.match_substring_regex(array, pattern).to_numpy(zero_copy_only=False)


def any_of(texts: Iterable[str]) -> str:
    """A regular expression that finds any of the texts. Texts that hold another one are left out.

    Raises `EngineUnusable` if they are so many that the search costs more than the engine saves.
    """
    shortest: list[str] = []
    size_bytes = 0
    for text in sorted(set(texts), key=lambda text: (len(text), text)):
        if not any(short in text for short in shortest):
            shortest.append(text)
            size_bytes += len(text.encode("utf-8", "surrogatepass"))
            if size_bytes > MOST_SOUGHT_BYTES:
                raise EngineUnusable("it has too many added tokens to search every line for them")
    return "|".join(map(re.escape, shortest))


def added_texts(content: dict[str, Any], normalizer: Any) -> list[str]:
    """What the added tokens are found by: their texts, and their normalised texts, with spaces and with markers for them."""
    texts = set()
    for token in content.get("added_tokens", []):
        normal = normalizer.normalize_str(token["content"]) if token["normalized"] and normalizer else token["content"]
        texts |= {token["content"], normal} - {""}
    return sorted({form for text in texts for form in (text, text.replace(MARKER, " "), text.replace(" ", MARKER))})


def starts_of(texts: Iterable[str]) -> list[str]:
    return [text[:ANCHOR] for text in texts]


def _load(content: dict[str, Any]) -> Any:
    try:
        import kitoken
    except ImportError as error:
        install = module_command("pip", "install", "kitoken>=0.11.1,<0.12")
        raise EngineUnusable(f"{NAME} is not installed ({install})") from error
    model = content["model"]
    if kind_of(model) not in ("BPE", "WordPiece"):
        raise EngineUnusable(f"{NAME} is used for BPE and WordPiece, and its model is of another kind")
    if kind_of(model) == "BPE" and (model.get("dropout") or model.get("continuing_subword_prefix")):
        raise EngineUnusable(f"its model has dropout or a prefix inside words, which {NAME} does not know")
    text = json.dumps({**content, "padding": None, "truncation": None}, ensure_ascii=False)
    try:
        return kitoken.Kitoken.from_tokenizers(text.encode())
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic in Rust is no Exception
        raise EngineUnusable(f"{NAME} cannot read it ({one_line(error)[:200]})") from error


def _unreached(content: dict[str, Any], reference: Any) -> list[str]:
    """The texts of pieces that no merges lead to, or that the engine does not have as pieces.

    The engine joins two neighbours if a piece spells both, `tokenizers` if a merge names both. The first such join that is not a
    merge makes a piece whose text alone `tokenizers` splits otherwise. So ids are equal on text that holds no such piece.
    """
    model = content["model"]
    if kind_of(model) != "BPE":
        return []
    bare = tokenizers.Tokenizer(reference.model)
    if model.get("ignore_merges"):
        bare = tokenizers.Tokenizer.from_str(
            json.dumps({"added_tokens": [], "model": {**model, "ignore_merges": False}})
        )
    pieces = list(model["vocab"])
    ids = bare.encode_batch_fast(pieces, add_special_tokens=False)
    added = {token["content"] for token in content.get("added_tokens", [])}
    unreached = [piece for piece, found in zip(pieces, ids, strict=True) if found.ids != [model["vocab"][piece]]]
    if len(unreached) > MOST_UNREACHED + len(added):
        raise EngineUnusable(f"no merges lead to {len(unreached)} of its pieces, which {NAME} would use")
    texts = [
        piece if piece in added else _text_of(piece, content) for piece in {*unreached, *added.intersection(pieces)}
    ]
    return [form for text in texts for form in _forms(text, content)]


def _text_of(piece: str, content: dict[str, Any]) -> str:
    """The text that becomes a piece: byte-level pieces are spelled with a character for each byte."""
    kinds = {part["type"] for part in steps_before_model(content)}
    if "ByteLevel" not in kinds:
        return piece
    try:
        return bytes(map(_byte_of().__getitem__, piece)).decode()
    except (KeyError, UnicodeDecodeError) as error:
        raise EngineUnusable(f"no merges lead to its piece {piece!r}, which is a part of a character") from error


def _byte_of() -> dict[str, int]:
    """The byte of each character of byte-level pieces: printable ones of Latin-1 are themselves, the others follow U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + number): byte for number, byte in enumerate(others)}


def _forms(text: str, content: dict[str, Any]) -> list[str]:
    """The text with spaces, with markers for them, and without the first if the tokenizer adds one to a line."""
    spaced = text.replace(MARKER, " ")
    forms = [text, spaced]
    if any(
        part.get("add_prefix_space") or part["type"] in ("Metaspace", "Prepend") for part in steps_before_model(content)
    ):
        forms += [form[1:] for form in forms if form.startswith((" ", MARKER)) and form.replace(MARKER, " ").strip()]
    return forms


def _known_letter(model: dict[str, Any], reference: Any) -> str:
    """A letter that has an id: a word of unknown characters is one unknown token for both libraries, whatever it holds."""
    unknown = reference.token_to_id(model["unk_token"]) if model.get("unk_token") else None
    letters = (piece for piece in model["vocab"] if len(piece) == 1 and piece.isalpha() and piece.isascii())
    others = (piece for piece in model["vocab"] if len(piece) == 1 and piece.isalpha())
    for letter in ("a", *letters, *others):
        ids = reference.encode(letter, add_special_tokens=False).ids
        if len(ids) == 1 and ids != [unknown]:
            return letter
    raise EngineUnusable("none of its pieces is a letter, so characters cannot be tried")


def _characters_of_tokens(texts: list[str], added: list[str], normalizers: list[dict[str, Any]]) -> frozenset[str]:
    """The characters of texts that are found after normalising; none if normalising changes nothing but spaces."""
    changing = [step for step in normalizers if step["type"] != "Prepend" and not replaces_spaces(step)]
    if not changing:
        return frozenset()
    texts = [*texts, *added]
    unknown = [step["type"] for step in changing if step["type"] not in PER_CHARACTER - {"Precompiled"}]
    composed = [text for text in texts if unicodedata.normalize("NFD", text) != text]
    if unknown or composed:
        raise EngineUnusable(
            f"its added token {(composed or texts)[0]!r} may be found in text that is spelled otherwise"
        )
    return frozenset("".join(texts))


def _is_decomposable(code: int) -> bool:
    """Whether a character is composed of others, without the syllables of Hangul, which follow a rule."""
    return not 0xAC00 <= code < 0xD7A4 and unicodedata.normalize("NFD", chr(code)) != chr(code)


def _is_caseless(character: str) -> bool:
    return unicodedata.category(character) == "Lo" and not unicodedata.decomposition(character)


def _is_unassigned(code: int) -> bool:
    """Whether a character is private or unknown to this Python: another Unicode version may compose it with its neighbours."""
    return unicodedata.category(chr(code)) in ("Cn", "Co", "Cs")
