"""Figures of `bench_prepare.py` about what is encoded at a time: the engine of a tokenizer.json, and SentencePiece's unit `word`.

In: text by language. Out: CPU seconds of two ways, measured block by block in turns in one process, so that the ratio is also
valid on a busy machine; and how many ids differ.
"""

from __future__ import annotations

import lzma
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.json_tokenizers import KINDS, make_tokenizer_json
from data_prep.blocks import cut_blocks
from data_prep.clean import CleanOptions, split_documents
from data_prep.encode import Encoded, encode_block
from data_prep.shard_layout import TOKEN_DTYPE
from data_prep.shards import EOS_ID
from data_prep.tokenizer import Tokenizer, open_tokenizer

TRAINED_PIECES = 30_000
HELD_OUT = 10  # every tenth line trains the tokenizers, the others are measured
WITHOUT_SPACES = ("ja", "km", "lo", "my", "th", "zh", "zh-Hans", "zh-Hant", "zh-cn", "zh-tw")


def texts_of(directory: Path) -> dict[str, bytes]:
    """The text of every LANG.txt and LANG.txt.xz in a directory."""
    texts = {}
    for path in sorted(directory.glob("*.txt*")):
        opened = lzma.open(path) if path.suffix == ".xz" else open(path, "rb")
        with opened as file:
            texts[path.name.split(".")[0]] = file.read()
    return texts


def in_turns(texts: dict[str, bytes], one: Tokenizer, other: Tokenizer) -> dict[str, Any]:
    """For each language: CPU seconds of both ways, ids that differ, and ids. Blocks are encoded once, as by `prepare`.

    The characters and words that a tokenizer remembers are those of the blocks before, as in a worker of `prepare`.
    """
    found = {}
    for language, text in texts.items():
        seconds, differing, num_ids = [0.0, 0.0], 0, 0
        for block in cut_blocks(iter([text])):
            ways = [_timed(way, block.text) for way in (one, other)]
            seconds = [total + timed[0] for total, timed in zip(seconds, ways, strict=True)]
            ids = [np.frombuffer(timed[1].tokens, TOKEN_DTYPE) for timed in ways]
            differing += _num_differing(*ids, end=one.special_ids.get("eos", EOS_ID))
            num_ids += len(ids[0])
        found[language] = {"seconds": seconds, "differing": differing, "ids": num_ids}
    return found


def _timed(tokenizer: Tokenizer, text: bytes) -> tuple[float, Encoded]:
    start = time.process_time()
    encoded = encode_block(tokenizer, text, "xx", CleanOptions())
    return time.process_time() - start, encoded


def _num_differing(one: np.ndarray, other: np.ndarray, end: int) -> int:
    """Ids of the lines that differ, from the first different id of each line to the last."""
    if np.array_equal(one, other):
        return 0
    lines = [np.split(ids, np.flatnonzero(ids == end) + 1) for ids in (one, other)]
    assert len(lines[0]) == len(lines[1])
    differing = 0
    for a, b in zip(*lines, strict=True):
        if not np.array_equal(a, b):
            least = min(len(a), len(b))
            unequal = np.flatnonzero(a[:least] != b[:least])
            first = int(unequal[0]) if len(unequal) else least
            back = np.flatnonzero(a[::-1][:least] != b[::-1][:least])
            last = len(a) - (int(back[0]) if len(back) else least)
            differing += max(1, last - first)
    return differing


def tokenizer_json(texts: dict[str, bytes], work: Path, given: dict[str, Path], rounds: int) -> dict[str, Any]:
    """For each kind, how many times as fast `--engine auto` is as `--engine tokenizers`. Raises if an id differs."""
    held_out, training = {}, []
    for language, text in texts.items():
        lines, _ = split_documents(text)
        training += [line.decode("utf-8", "replace") for line in lines[::HELD_OUT]]
        held_out[language] = b"\n\n".join(line for number, line in enumerate(lines) if number % HELD_OUT) + b"\n"
    figures = {}
    for kind in KINDS:
        path = given.get(kind) or make_tokenizer_json(kind, work / kind, training, TRAINED_PIECES)
        opened = [[open_tokenizer(path, engine=engine) for engine in ("tokenizers", "auto")] for _ in range(rounds)]
        found = [in_turns(held_out, *pair) for pair in opened]
        if wrong := {name: about["differing"] for name, about in found[0].items() if about["differing"]}:
            raise AssertionError(f"{kind}: ids differ in {wrong}")
        figures[kind] = {"engine": opened[0][1].engine, **_ratios(found)}
    return figures


def unit_word(texts: dict[str, bytes], model: Path, rounds: int) -> dict[str, Any]:
    """How many times as fast `--unit word` is as `--unit line`, and the share of equal ids."""
    pairs = [[open_tokenizer(model, unit=unit) for unit in ("line", "word")] for _ in range(rounds)]
    found = [in_turns(texts, *pair) for pair in pairs]
    equal = 1 - sum(about["differing"] for about in found[0].values()) / sum(
        about["ids"] for about in found[0].values()
    )
    return {**_ratios(found), "equal_ids": equal, "languages_without_spaces": sorted(set(texts) & set(WITHOUT_SPACES))}


def _ratios(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over the rounds: of all languages together, and by language."""
    totals = [[sum(about["seconds"][way] for about in found.values()) for way in (0, 1)] for found in rounds]
    by_language = {
        name: statistics.median(found[name]["seconds"][0] / found[name]["seconds"][1] for found in rounds)
        for name in rounds[0]
    }
    return {"times": statistics.median(one / other for one, other in totals), "by_language": by_language}
