"""Comparing the ids of prepare's tokenizer with those of the model's tokenizer (`reference.py`).

In: the tokenizer that prepare opened, and a sample of lines of every language. Out: how many lines were compared and how many
differ, or a `DataError` with the first line that differs, its ids and the fix. `prepare` compares before anything is written. A
run compares again (`check_again`) if tokenizer or libraries are not the ones that the manifest names.
"""

from __future__ import annotations

import json
import shlex
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_prep.awkward import LINES, added_lines, composed, special_lines
from data_prep.child import in_child
from data_prep.line_sample import LineSample, sample_lines
from data_prep.reference import (
    XLMR_CONFIG,
    Reference,
    RowOfIds,
    describe_reference,
    directory_of,
    model_config,
    reference_of,
)
from data_prep.shards import BOS_ID, EOS_ID, UNK_ID, DataError
from data_prep.sources import Source
from data_prep.tokenizer import FastTokenizer, SentencePieceTokenizer, Tokenizer, ids_of, open_tokenizer
from data_prep.tokenizer_ids import (
    POSITIONS_FROM_PADDING,
    SENTENCEPIECE_NAMES,
    TOKENIZER_CONFIG_NAME,
    named_architecture,
    save_command,
)

RECORD = "ids_compared_with"  # in prepare.json and the manifest
COMPARED, DIFFERING = "lines_compared", "lines_compared_differing"  # in the counts of a language
# Share of a language's lines that may differ for no known reason. Real text has 0, and 0.02 to 0.05 % of near-ties.
MAX_UNEXPLAINED_SHARE = 0.01
MAX_UNEXPLAINED_FEW_LINES = 2  # lines, for a language with few of them
SHOWN_IDS = 8


@dataclass
class Comparison:
    """The result for some lines."""

    num_lines: int = 0
    differing: list[tuple[str, list[int], RowOfIds]] = field(default_factory=list)  # line, our ids, the reference's


def check_languages(given: Path, tokenizer: Tokenizer, languages: dict[str, list[Source]]) -> dict[str, Counter[str]]:
    """Compare the ids of a sample of lines of every language.

    This runs in a process of its own, because transformers loads torch and starts threads. This process must have no threads when
    it forks its tokenising processes, and should not keep torch in memory.

    Returns:
        For each language, the numbers of lines that were compared and that differ.

    Raises:
        DataError: ids differ, for a reason other than rounding.
    """
    if not languages:
        return {}
    found = in_child(lambda: _compare_languages(given, tokenizer, languages), f"comparing ids with those of {given}")
    return {language: Counter(counts) for language, counts in found.items()}


def check_tokenizer(given: Path, tokenizer: Tokenizer) -> None:
    """As `check_languages`, on the fixed lines only: for products of a tokenizer without text, such as a smaller vocabulary."""
    in_child(lambda: _compare_languages(given, tokenizer, {}), f"comparing ids with those of {given}")


def _compare_languages(
    given: Path, tokenizer: Tokenizer, languages: dict[str, list[Source]]
) -> dict[str, dict[str, int]]:
    with reference_of(given, tokenizer.path) as reference:
        check = _TokenizerCheck(given, tokenizer, reference)
        check.rows_and_awkward_lines()
        return {name: check.language(name, sample_lines(name, sources)) for name, sources in languages.items()}


def check_again(manifest: dict[str, Any], given: Path) -> tuple[str, list[str]]:
    """Check before a run that the tokenizer `given` has the ids of the shards.

    Returns:
        A sentence about what was compared, and warnings.

    Raises:
        DataError: the ids differ.
    """
    tokenizer = open_tokenizer(given)
    warnings = []
    if (unknown := tokenizer.special_ids.get("unk")) != manifest["tokenizer"].get("unk"):
        warnings.append(
            f"the shards were prepared by a version that left out unknown words ({given} gives them the id {unknown}). Rows "
            "of text with unknown words differ from what the model reads elsewhere. Prepare the shards again to include them"
        )
    if manifest.get(RECORD) == describe_reference(given, tokenizer.path):
        return "ids compared with AutoTokenizer's when the shards were prepared", warnings
    with reference_of(given, tokenizer.path) as reference:
        num_lines = _TokenizerCheck(given, tokenizer, reference).rows_and_awkward_lines()
    return f"ids compared with AutoTokenizer's on {num_lines} lines", warnings


class _TokenizerCheck:
    """One tokenizer and its reference."""

    def __init__(self, given: Path, tokenizer: Tokenizer, reference: Reference) -> None:
        self._given, self._tokenizer, self._reference = given, tokenizer, reference
        self._is_exact = isinstance(tokenizer, FastTokenizer)  # one library on both sides: no near-ties

    def rows_and_awkward_lines(self) -> int:
        """Check the special tokens and the fixed lines, without text of a language. Returns the number of lines."""
        self._check_rows()
        lines = [*LINES, *added_lines(self._reference.added)]
        self._judge_engine(lines, "a line that every tokenizer is checked on")
        comparison = self._compare(lines)
        if (left := self._less_near_ties(comparison)).differing:
            raise self._ids_differ(left, "a line that every tokenizer is checked on")
        self._check_end_ids()
        self._check_special_ids()
        self._check_padding_id()
        return comparison.num_lines

    def language(self, name: str, sample: LineSample) -> dict[str, int]:
        """Compare a sample of one language. Returns the counts for its journal."""
        self._judge_engine(sample.lines, f"a line of {name}")
        comparison = self._compare(sample.lines)
        unexplained = self._unexplained(comparison)
        allowed = (
            0 if self._is_exact else max(MAX_UNEXPLAINED_FEW_LINES, int(MAX_UNEXPLAINED_SHARE * comparison.num_lines))
        )
        if len(unexplained.differing) > allowed:
            raise self._ids_differ(unexplained, f"a line of {name}")
        counts = {COMPARED: comparison.num_lines, DIFFERING: len(comparison.differing)}
        return counts if sample.is_complete else {}  # a later run with valid files counts them

    def _judge_engine(self, lines: list[str], where: str) -> None:
        if isinstance(self._tokenizer, FastTokenizer):
            self._tokenizer.judge(lines, where)

    def _compare(self, lines: list[str]) -> Comparison:
        """Compare lines without the text of special tokens: the reference encodes it as the token, prepare as text."""
        lines = [text for line in lines if (text := _without(line, self._reference.special))]
        comparison = Comparison(num_lines=len(lines))
        for line, ids, row in zip(lines, ids_of(self._tokenizer, lines), self._reference.rows(lines), strict=True):
            if (ours := ids.tolist()) != row.ids:
                comparison.differing.append((line, ours, row))
        return comparison

    def _less_near_ties(self, comparison: Comparison) -> Comparison:
        """Drop lines with two equally good splits: the libraries round differently and choose either one."""
        tokenizer = self._tokenizer
        if not isinstance(tokenizer, SentencePieceTokenizer):
            return comparison
        left = [found for found in comparison.differing if not tokenizer.are_near_tie(found[1], found[2].ids)]
        return Comparison(comparison.num_lines, left)

    def _unexplained(self, comparison: Comparison) -> Comparison:
        """Drop near-ties, and lines whose `composed` form agrees."""
        left = self._less_near_ties(comparison)
        if self._is_exact or not left.differing:
            return left
        again = self._less_near_ties(self._compare([composed(line) for line, _, _ in left.differing]))
        still = {line for line, _, _ in again.differing}
        return Comparison(left.num_lines, [found for found in left.differing if composed(found[0]) in still])

    def _check_rows(self) -> None:
        """Rows of shards are one token, text, one token. Raise if the reference's rows have another form."""
        row = self._reference.rows(["a line"])[0]
        if (len(row.begin), len(row.end)) != (1, 1):
            raise DataError(
                f"AutoTokenizer of {self._given} ({self._reference.class_name}) puts {self._names(row.begin) or 'nothing'} "
                f"before a text and {self._names(row.end) or 'nothing'} after it; an encoder's puts one special token at each "
                "end ([CLS] and [SEP], or <s> and </s>). Give the tokenizer of an encoder."
            )

    def _check_end_ids(self) -> None:
        ends = [self._tokenizer.special_ids.get("bos", BOS_ID)], [self._tokenizer.special_ids.get("eos", EOS_ID)]
        row = self._reference.rows(["a line"])[0]
        if (row.begin, row.end) != ends:
            raise DataError(
                f"{self._tokenizer.path} begins and ends rows with the ids {ends[0]} and {ends[1]}; AutoTokenizer of "
                f"{self._given} ({self._reference.class_name}) puts {self._names(row.begin)} before a text and "
                f"{self._names(row.end)} after it. {self._fix()}"
            )

    def _check_special_ids(self) -> None:
        """Text that spells a special token must be encoded as text: the model would read the token's id as the token."""
        lines = special_lines(self._reference.special)
        not_text = self._reference.special_ids - {self._tokenizer.special_ids.get("unk", UNK_ID)}
        for line, ids in zip(lines, ids_of(self._tokenizer, lines), strict=True):
            if wrong := sorted(set(ids.tolist()) & not_text):
                raise DataError(
                    f"{self._tokenizer.path} turns the text {line!r} into ids with {self._names(wrong)}, a special token of "
                    f"{self._given}. {self._fix()}"
                )

    def _check_padding_id(self) -> None:
        """Some models count positions from the padding id. Another id there would move every position."""
        directory = directory_of(self._given, self._tokenizer.path)
        config = model_config(directory) if directory is not None else {}
        pad_id = config.get("pad_token_id", self._reference.pad_id)
        if config.get("model_type") in POSITIONS_FROM_PADDING and pad_id != self._reference.pad_id:
            raise DataError(
                f"{directory}/config.json has pad_token_id {pad_id}, the tokenizer's padding is "
                f"{self._reference.pad_id}; models of type {config['model_type']} count positions from it. Write "
                f'"pad_token_id": {self._reference.pad_id} there, or give the tokenizer that belongs to the model.'
            )

    def _ids_differ(self, comparison: Comparison, where: str) -> DataError:
        line, ours, row = comparison.differing[0]
        pairs = zip(ours, row.ids, strict=False)
        start = next((n for n, (one, other) in enumerate(pairs) if one != other), min(len(ours), len(row.ids)))
        here = slice(start, start + SHOWN_IDS)
        return DataError(
            f"Ids from {self._tokenizer.path} are not those of AutoTokenizer.from_pretrained({str(self._given)!r}) "
            f"({self._reference.class_name}), which the model is used with: {len(comparison.differing)} of "
            f"{comparison.num_lines} lines differ. The first, {where}: {line[:100]!r} from token {start} on is "
            f"{self._names(ours[here])} in shards and {self._names(row.ids[here])} for the model. "
            f"{self._fix()}"
        )

    def _names(self, ids: list[int]) -> str:
        return " ".join(f"{number} {piece!r}" for number, piece in zip(ids, self._reference.pieces(ids), strict=True))

    def _fix(self) -> str:
        directory = directory_of(self._given, self._tokenizer.path)
        if directory is None:
            return "Give the directory of the model's tokenizer instead, with its tokenizer_config.json."
        path = self._tokenizer.path
        architecture = named_architecture(directory) or ""
        is_kept = path.name == SENTENCEPIECE_NAMES[0] and architecture.startswith("XLMRoberta")
        if not self._is_exact and self._reference.num_ids < self._tokenizer.num_pieces // 2:
            config = shlex.quote(json.dumps(XLMR_CONFIG))
            return (
                f"AutoTokenizer finds no vocabulary of a {architecture} model there. If the model has XLM-R's tokenizer, name it: "
                f"echo {config} > {shlex.quote(str(directory / TOKENIZER_CONFIG_NAME))} and run the same command again; "
                "otherwise copy the model's tokenizer files there."
            )
        command = save_command(directory, path.name if is_kept else None)
        return (
            f"If AutoTokenizer is right, let it write a tokenizer.json that has its ids: {command} and run the same "
            "command again. If the directory names a wrong class or setting (such as do_lower_case), correct tokenizer_config.json."
        )


def _without(line: str, special: Iterable[str]) -> str:
    for text in special:
        if text in line:
            line = line.replace(text, " ")
    return line.strip()
