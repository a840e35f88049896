"""Cuts questions and contexts into windows of tokens, and converts token positions back to answers.

A context that is too long is read in windows that start `stride` tokens apart (BERT's convention: the step, not the
overlap). An answer counts in the window where its first token has the most context around it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import numpy as np
import torch

from data_prep.command_line import module_command
from pipeline.errors import UserError
from pipeline.evaluation.finetuning.batches import TokenRows
from pipeline.evaluation.finetuning.squad_data import Question

MAX_QUESTION_TOKENS = 64
MAX_ANSWER_TOKENS = 30
NUM_CANDIDATES = 20  # the best starts and ends of a window, which are combined
QUESTIONS_PER_CALL = 256
COMPLETE_WINDOWS_SINCE = "0.23.3"  # of tokenizers: 0.23.1 and 0.23.2 drop windows without an error


@dataclass(frozen=True)
class Window:
    """Positions of a row's context tokens: in the row from `first` on, in the context at `offsets` `[tokens, 2]`."""

    question: int  # number in the list of questions
    first: int
    offsets: np.ndarray
    most_context: np.ndarray  # bool per context token: no other window has more context around it


@dataclass
class WindowedQuestions:
    """Rows for the model, one window each, in the order of the questions; `rows.targets` are the answers' positions."""

    questions: Sequence[Question]
    rows: TokenRows
    windows: list[Window]

    def rows_of_each(self) -> list[list[int]]:
        """Row numbers per question."""
        rows: list[list[int]] = [[] for _ in self.questions]
        for number, window in enumerate(self.windows):
            rows[window.question].append(number)
        return rows


def cut_windows(tokenizer: Any, questions: Sequence[Question], max_length: int, stride: int) -> WindowedQuestions:
    """All windows of all questions. Targets are the tokens of the first answer, or token 0 where it is not in the window.

    Args:
        max_length: tokens per window, question and special tokens included
        stride: context tokens between the starts of two windows

    Raises:
        UserError: slow tokenizer, no space for a context, or a tokenizer library that drops windows
    """
    if not tokenizer.is_fast:
        raise UserError("this tokenizer does not give the characters of a token; MLQA needs a fast tokenizer")
    texts = [_shortened(tokenizer, question.question) for question in questions]
    by_space: dict[int, list[int]] = defaultdict(list)
    specials = tokenizer.num_special_tokens_to_add(pair=True)
    for number, encoded in enumerate(tokenizer(texts, add_special_tokens=False)["input_ids"]):
        by_space[max_length - specials - len(encoded)].append(number)
    if min(by_space) < 1:
        raise UserError(f"mlqa.max_length is {max_length}: a question leaves no space for its context. Set it higher")
    found: dict[int, list[tuple]] = {}
    for space, numbers in by_space.items():
        for start in range(0, len(numbers), QUESTIONS_PER_CALL):
            some = numbers[start : start + QUESTIONS_PER_CALL]
            contexts = [questions[n].context for n in some]
            uncut = tokenizer(contexts, add_special_tokens=False, verbose=False)["input_ids"]
            num_tokens = dict(zip(some, map(len, uncut), strict=True))
            encoded = tokenizer(
                [texts[n] for n in some],
                contexts,
                truncation="only_second",
                max_length=max_length,
                stride=max(0, space - stride),
                return_overflowing_tokens=True,
                return_offsets_mapping=True,
            )
            step = min(stride, space)
            for number, windows in _by_question(encoded, some).items():
                check_last_window([len(offsets) for *_, offsets in windows], step, num_tokens[number])
                found[number] = _with_most_context(windows, step)
    return _assemble(questions, found)


def check_last_window(lengths: Sequence[int], step: int, num_tokens: int) -> None:
    """Raise a UserError if the last window does not end at the context's end: an answer there would never be found.

    Args:
        lengths: context tokens of each window
        step: context tokens between the starts of two windows
        num_tokens: tokens of the complete context
    """
    end = (len(lengths) - 1) * step + lengths[-1]
    if end != num_tokens:
        raise UserError(
            f"tokenizers {metadata.version('tokenizers')} cut a context of {num_tokens} tokens into {len(lengths)} windows "
            f"that end at token {end}: it drops windows, and the scores of MLQA would be too low. "
            f"Install a version that returns all of them: {module_command('pip', 'install', f'tokenizers~={COMPLETE_WINDOWS_SINCE}')}"
        )


def _shortened(tokenizer: Any, text: str) -> str:
    """A question of at most 64 tokens."""
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    return text[: offsets[MAX_QUESTION_TOKENS - 1][1]] if len(offsets) > MAX_QUESTION_TOKENS else text


def _by_question(encoded: Any, numbers: list[int]) -> dict[int, list[tuple]]:
    """Question -> its windows: (ids, segments or None, first context token, offsets)."""
    segments = encoded.get("token_type_ids")
    windows: dict[int, list[tuple]] = defaultdict(list)
    for row, sample in enumerate(encoded["overflow_to_sample_mapping"]):
        of_context = np.array([part == 1 for part in encoded.sequence_ids(row)])
        offsets = np.array(encoded["offset_mapping"][row], dtype=np.int32)[of_context]
        kinds = None if segments is None else np.array(segments[row], dtype=np.int8)
        first = int(of_context.argmax()) if len(offsets) else 0
        windows[numbers[sample]].append((np.array(encoded["input_ids"][row], dtype=np.int32), kinds, first, offsets))
    return windows


def _with_most_context(windows: list[tuple], step: int) -> list[tuple]:
    """Add to every window a mask of the tokens around which no other window has more context."""
    lengths = [len(offsets) for *_, offsets in windows]
    num_tokens = max(number * step + length for number, length in enumerate(lengths))
    around = np.full((len(windows), num_tokens), -1.0)
    for number, length in enumerate(lengths):
        place = np.arange(length)
        around[number, number * step : number * step + length] = np.minimum(place, length - 1 - place) + 0.01 * length
    best = around.argmax(axis=0)
    return [
        (*window, best[number * step : number * step + length] == number)
        for number, (window, length) in enumerate(zip(windows, lengths, strict=True))
    ]


def _assemble(questions: Sequence[Question], found: dict[int, list[tuple]]) -> WindowedQuestions:
    ids, segments, windows, targets = [], [], [], []
    for number, question in enumerate(questions):
        for row_ids, kinds, first, offsets, most_context in found[number]:
            ids.append(row_ids)
            segments += [] if kinds is None else [kinds]
            windows.append(Window(number, first, offsets, most_context))
            targets.append(target_tokens(question, first, offsets))
    return WindowedQuestions(questions, TokenRows(ids, segments, torch.tensor(targets)), windows)


def target_tokens(question: Question, first: int, offsets: np.ndarray) -> tuple[int, int]:
    """First and last token of the first answer in a row; (0, 0) where the window does not contain all of it."""
    text = question.answers[0]
    begin = question.starts[0] + len(text) - len(text.lstrip())
    end = question.starts[0] + len(text.rstrip())
    if not len(offsets) or begin < offsets[0, 0] or end > offsets[-1, 1]:
        return 0, 0
    start_token = int(np.searchsorted(offsets[:, 0], begin, side="right")) - 1
    end_token = int(np.searchsorted(offsets[:, 1], end, side="left"))
    return first + start_token, first + max(start_token, end_token)


def best_answers(
    context: str, windows: Sequence[Window], starts: Sequence[np.ndarray], ends: Sequence[np.ndarray], most: int = 20
) -> list[tuple[float, str]]:
    """(score, text) of the `most` best spans over all windows of a question, best first.

    A span starts at a token for which its window has the most context, and has at most 30 tokens. Its score is the sum
    of two logits.

    Args:
        starts, ends: per window, the logits of its context tokens
    """
    spans: list[tuple[float, str]] = []
    for window, start_logits, end_logits in zip(windows, starts, ends, strict=True):
        first_tokens = np.argsort(-start_logits, kind="stable")[:NUM_CANDIDATES]
        last_tokens = np.argsort(-end_logits, kind="stable")[:NUM_CANDIDATES]
        length = last_tokens[None, :] - first_tokens[:, None] + 1
        fits = (length >= 1) & (length <= MAX_ANSWER_TOKENS) & window.most_context[first_tokens][:, None]
        scores = start_logits[first_tokens][:, None] + end_logits[last_tokens][None, :]
        for i, j in zip(*np.nonzero(fits), strict=True):
            text = context[window.offsets[first_tokens[i], 0] : window.offsets[last_tokens[j], 1]].strip()
            spans.append((float(scores[i, j]), text))
    spans.sort(key=lambda span: -span[0])
    return spans[:most] or [(float("-inf"), "")]
