"""Proofs that the ids of a line are the ids of its words, one word after the other, as `words.py` cuts them.

In: a SentencePiece model, or the content of a tokenizer.json. Out: nothing or the reason why it does not hold. A word starts at a
space. The ids of words follow each other in the ids of the line if normalisation maps no text across a space, and if no piece
reaches from one word into the next.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator
from typing import Any

import numpy as np
from sentencepiece import sentencepiece_model_pb2

MARKER = "▁"  # U+2581: a space in pieces
SPACE = ord(" ")
NORMAL, USER_DEFINED = 1, 4  # types of pieces in SentencePiece models
UNIGRAM = 1
# Normalisers that map one character at a time, or compose a character with the marks after it. None of them composes a space.
PER_CHARACTER = frozenset(
    {"NFC", "NFD", "NFKC", "NFKD", "Lowercase", "StripAccents", "BertNormalizer", "Nmt", "Precompiled"}
)
# Pre-tokenizers that begin a new part at every space between two words, and those that may come before them.
CUT_AT_SPACES = frozenset({"BertPreTokenizer", "Whitespace", "WhitespaceSplit"})
MOST_PIECES_ACROSS = 100  # Gemma has one, ">▁</"
CUT_ELSEWHERE = frozenset({"Digits", "Punctuation", "UnicodeScripts"})


def why_not_sentencepiece(model: bytes) -> str | None:
    """Why the best split of a line need not be that of its words; None if it is, up to rounding.

    A unigram model chooses the split with the largest sum of scores. Where every word begins with the marker, and no piece holds the
    marker after its start, each split of a line cuts before each word. The largest sum is then the sum of the words' largest.
    """
    proto: Any = sentencepiece_model_pb2
    parsed = proto.ModelProto()
    parsed.ParseFromString(model)
    normalizer, trainer = parsed.normalizer_spec, parsed.trainer_spec
    if trainer.model_type != UNIGRAM:
        return "its model is not a unigram model, so its pieces are not chosen by the sum of their scores"
    for name in ("add_dummy_prefix", "remove_extra_whitespaces", "escape_whitespaces"):
        if not getattr(normalizer, name):
            return f"its normalizer has {name} off, so a word that is encoded alone is not what it is in a line"
    if trainer.treat_whitespace_as_suffix:
        return "its pieces hold the space after a word, not the one before it"
    if inside := next((piece.piece for piece in parsed.pieces if MARKER in piece.piece[1:]), None):
        return f"its piece {inside!r} holds a space after its start, so it may reach from one word into the next"
    if not any(piece.piece == MARKER and piece.type == NORMAL for piece in parsed.pieces):
        return "it has no piece for a space alone, so a word may be joined with an unknown character before it"
    if user := next((piece.piece for piece in parsed.pieces if piece.type == USER_DEFINED), None):
        return f"its piece {user!r} is found in the text before it is split into words"
    if maps_across_spaces(normalizer.precompiled_charsmap):
        return "its normalizer has a rule for a text with a space, which may reach from one word into the next"
    return None


def maps_across_spaces(charsmap: bytes) -> bool:
    """Whether a SentencePiece normalizer maps a text of several characters with a space among them.

    The map begins with the size of a double-array trie, whose nodes are of 32 bits: the byte that leads to a node in bits 0 to 7,
    whether a text ends there in bit 8, the offset of its children from bit 10 on, times 256 if bit 9 is set (darts-clone).
    """
    if not charsmap:
        return False
    size = int(np.frombuffer(charsmap, "<u4", 1)[0])
    nodes = np.frombuffer(charsmap, "<u4", size // 4, 4)
    offsets = (nodes >> 10) << ((nodes & 512) >> 6)
    inner = np.flatnonzero(nodes < 1 << 31)  # the others hold values
    parents = inner ^ (nodes[inner] & 255)
    order = np.argsort(parents, kind="stable")
    inner, parents = inner[order], parents[order]
    level, with_space, length = offsets[:1].astype(np.int64), np.zeros(1, bool), 0
    while len(level):
        length += 1
        first, last = np.searchsorted(parents, level, "left"), np.searchsorted(parents, level, "right")
        counts = last - first
        children = inner[np.repeat(first - np.cumsum(counts) + counts, counts) + np.arange(counts.sum())]
        with_space = np.repeat(with_space, counts) | (nodes[children] & 255 == SPACE)
        if length > 1 and (with_space & (nodes[children] & 256 > 0)).any():
            return True
        level = children ^ offsets[children]
    return False


def why_not_json(content: dict[str, Any]) -> str | None:
    """Why the ids of a line need not be those of its words, by a tokenizer.json; None if they are.

    Not meant are lines with two spaces in a row, with the marker itself, with an added token, or with one of `pieces_across`.
    """
    model, normalizers = content["model"], list(parts_of(content.get("normalizer"), "normalizers"))
    if model.get("dropout"):
        return "its model drops merges at random"
    marks_spaces = False
    for normalizer in normalizers:
        if replaces_spaces(normalizer):
            marks_spaces = True
        elif normalizer["type"] not in PER_CHARACTER:
            return f"its normalizer {normalizer['type']} may reach from one word into the next"
        elif maps_across_spaces(base64.b64decode(normalizer.get("precompiled_charsmap") or "")):
            return "its normalizer has a rule for a text with a space"
    for token in content.get("added_tokens", []):
        across = token["lstrip"] or token["rstrip"] or " " in token["content"]
        if across and token["normalized"] and not _is_found_before_normalising(token["content"], normalizers):
            return f"its added token {token['content']!r} may reach from one word into the next"
    for part in parts_of(content.get("pre_tokenizer"), "pretokenizers"):
        if _cuts_at_spaces(part, marks_spaces):
            return None
        if part["type"] not in CUT_ELSEWHERE and not (marks_spaces and _is_split_at(part, " ")):
            return f"its pre-tokenizer {part['type']} is not known to cut at every space"
    return _why_merges_reach_across(content, normalizers) if marks_spaces else "nothing in it cuts at spaces"


def kind_of(model: dict[str, Any]) -> str:
    """The type of the model of a tokenizer.json. Older files do not name it; then its keys tell."""
    if model.get("type") is not None:
        return model["type"]
    if "merges" in model:
        return "BPE"
    if "max_input_chars_per_word" in model:
        return "WordPiece"
    return "Unigram" if isinstance(model.get("vocab"), list) else "an unnamed kind"


def parts_of(part: dict[str, Any] | None, key: str) -> Iterator[dict[str, Any]]:
    """The steps of a normalizer, pre-tokenizer or post-processor, whose sequences hold the steps under `key`."""
    if part and key in part:
        for inner in part[key]:
            yield from parts_of(inner, key)
    elif part:
        yield part


def steps_before_model(content: dict[str, Any]) -> list[dict[str, Any]]:
    """All normalizers and pre-tokenizers of a tokenizer.json."""
    return [
        *parts_of(content.get("normalizer"), "normalizers"),
        *parts_of(content.get("pre_tokenizer"), "pretokenizers"),
    ]


def replaces_spaces(normalizer: dict[str, Any]) -> bool:
    """Whether it writes the marker for every space."""
    is_replace = normalizer["type"] == "Replace" and normalizer["pattern"] == {"String": " "}
    return is_replace and normalizer["content"] == MARKER


def _is_found_before_normalising(text: str, normalizers: list[dict[str, Any]]) -> bool:
    """Whether no other text becomes this one. Composing makes three ASCII characters of others: K, semicolon and grave accent."""
    composing = all(normalizer["type"] in ("NFC", "NFD") for normalizer in normalizers)
    return not normalizers or (composing and text.isascii() and not set(text) & set("K;`"))


def _cuts_at_spaces(part: dict[str, Any], marks_spaces: bool) -> bool:
    kind = part["type"]
    if kind == "Metaspace":  # its default is to split
        return part.get("split", True) and part.get("replacement") == MARKER
    if marks_spaces:  # no space is left
        return False
    if kind == "ByteLevel":  # its expression takes a space only at the start of a part, except in a run of spaces
        return part.get("use_regex", True)
    if kind == "Split":
        return _is_split_at(part, " ") and part["behavior"] in ("Removed", "Isolated", "MergedWithNext")
    return kind in CUT_AT_SPACES


def _is_split_at(part: dict[str, Any], text: str) -> bool:
    return part["type"] == "Split" and part["pattern"] == {"String": text} and not part.get("invert")


def pieces_across(content: dict[str, Any]) -> list[str]:
    """Pieces of a tokenizer that writes the marker for spaces, which hold a space after another character: as text.

    A line that holds none of them has no merge across the start of a word.
    """
    if kind_of(content["model"]) != "BPE":
        return []
    across = [piece for piece in content["model"]["vocab"] if MARKER in piece.lstrip(MARKER)]
    return [piece.replace(MARKER, " ") for piece in across]


def _why_merges_reach_across(content: dict[str, Any], normalizers: list[dict[str, Any]]) -> str | None:
    """Merges join neighbours only, so the merges of a word do not depend on other words if no merge crosses its start."""
    model = content["model"]
    if kind_of(model) != "BPE":
        return "nothing in it cuts at spaces"
    if MARKER not in model["vocab"]:
        return "it has no piece for a space alone"
    across = pieces_across(content)
    if len(across) > MOST_PIECES_ACROSS or (across and len(normalizers) > 1):
        return f"{len(across)} of its pieces hold a space after their start ({across[0]!r}), so they reach into the next word"
    return None
