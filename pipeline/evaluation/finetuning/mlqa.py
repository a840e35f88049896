"""MLQA: fine-tune on English SQuAD v1.1, then evaluate zero-shot in every language.

In: encoders, SQuAD and MLQA in their official layouts. Out: per model F1 and exact match on each test language and their
means, for the learning rate and epoch with the best F1 on the development questions of all languages together (`grid.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoModelForQuestionAnswering

from data_prep.progress import progress
from pipeline.errors import UserError
from pipeline.evaluation.encoder import Encoder, batches_by_length
from pipeline.evaluation.finetuning.batches import known_segments
from pipeline.evaluation.finetuning.grid import run_grids
from pipeline.evaluation.finetuning.loop import FinetuneConfig, FinetuneTask, Scores, load_with_head
from pipeline.evaluation.finetuning.scores import score_card, score_panel, score_table
from pipeline.evaluation.finetuning.squad_data import QaData, read_qa
from pipeline.evaluation.finetuning.squad_metrics import MLQA_LANGUAGES, exact_match, f1, mlqa_words, squad_words
from pipeline.evaluation.finetuning.squad_windows import WindowedQuestions, best_answers, cut_windows
from pipeline.evaluation.languages import language_notes
from pipeline.evaluation.tables import sentence
from pipeline.evaluation.task import OnHub, Results, Task
from pipeline.recipe.ranges import LONGEST_ROW, check_ranges
from pipeline.runtime.dist import Launch


@dataclass
class MlqaConfig(FinetuneConfig):
    """Where SQuAD and MLQA are. The defaults of the grid are those of the paper."""

    epochs: int = 3
    batch: int = 32
    micro_batch: int = 8
    max_length: int = 512
    stride: int = 128  # tokens between the starts of two windows
    train: str = ""  # SQuAD v1.1's train-v1.1.json, or datasets:rajpurkar/squad
    data: str = ""  # directory with MLQA's dev and test files
    rule: Literal["mlqa", "squad"] = "mlqa"  # how answers are compared; squad: as in SQuAD v1.1 and XQuAD

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.languages == []:
            raise UserError("mlqa.languages must name at least one language")
        check_ranges(self, "mlqa", {"stride": (1, LONGEST_ROW)})


def read(config: MlqaConfig) -> QaData:
    """Read all questions that the task needs."""
    languages = list(config.languages or MLQA_LANGUAGES)
    return read_qa(config.train, config.data, languages, config.max_train, config.max_evaluation)


def evaluate_mlqa(encoders: list[Encoder], config: MlqaConfig, ranks: Launch, directory: Path) -> Results:
    """Per model, F1 and exact match of the chosen learning rate in per cent. All ranks call it together."""
    return run_grids(encoders, read(config), make_task, config, directory, ranks)


def make_task(encoder: Encoder, data: QaData, config: MlqaConfig, ranks: Launch) -> FinetuneTask:
    """Cut all windows once, for all grid points."""

    def windows_of(questions: Any) -> WindowedQuestions:
        windowed = cut_windows(encoder.tokenizer, questions, config.max_length, config.stride)
        windowed.rows.segments = known_segments(windowed.rows.segments, encoder.model.config)
        return windowed

    windowed, pad_id = data.convert(windows_of), encoder.pad_id

    def score(model: Any, split: str) -> Scores:
        parts = progress(getattr(windowed, split).items(), f"scoring {split}", "language", ranks.is_main)
        return {x: answer_scores(model, of, x, pad_id, config, ranks) for x, of in parts}

    return FinetuneTask(
        load=lambda: load_with_head(AutoModelForQuestionAnswering, encoder),
        rows=windowed.train.rows,
        loss=span_loss,
        score=score,
        pad_id=pad_id,
    )


def span_loss(outputs: Any, inputs: dict[str, torch.Tensor], targets_B2: torch.Tensor) -> torch.Tensor:
    """Mean of the cross-entropies of start and end over positions, summed over rows.

    Padding is masked; otherwise the loss of a row would depend on the other rows of its batch.

    Args:
        targets_B2: first and last token of each answer
    """
    padding_BL = inputs["attention_mask"] == 0
    losses = [
        torch.nn.functional.cross_entropy(
            logits_BL.float().masked_fill(padding_BL, float("-inf")), targets_B2[:, side], reduction="sum"
        )
        for side, logits_BL in enumerate((outputs.start_logits, outputs.end_logits))
    ]
    return (losses[0] + losses[1]) / 2


def answer_scores(
    model: Any, windowed: WindowedQuestions, language: str, pad_id: int, config: MlqaConfig, ranks: Launch
) -> dict[str, float]:
    """F1 and exact match in per cent. Rank r of n answers every n-th question, starting with question r, from all its windows."""
    rows_of = dict(list(enumerate(windowed.rows_of_each()))[ranks.rank :: ranks.world_size])
    logits = _span_logits(
        model, windowed, [row for rows in rows_of.values() for row in rows], pad_id, config.micro_batch
    )
    totals = torch.zeros(2, dtype=torch.float64, device=model.device)
    for number, rows in rows_of.items():
        question = windowed.questions[number]
        windows = [windowed.windows[row] for row in rows]
        starts, ends = zip(*(logits[row] for row in rows), strict=True)
        answer = words_of(best_answers(question.context, windows, starts, ends)[0][1], language, config.rule)
        truths = [words_of(text, language, config.rule) for text in question.answers]
        totals += torch.tensor([max(f1(answer, t) for t in truths), max(exact_match(answer, t) for t in truths)]).to(
            totals
        )
    f1_sum, exact_sum = (100.0 * ranks.sum(totals) / len(windowed.questions)).tolist()
    return {"f1": f1_sum, "exact_match": exact_sum}


def words_of(text: str, language: str, rule: str) -> list[str]:
    """The words that are compared under `rule` ("mlqa" or "squad")."""
    return squad_words(text) if rule == "squad" else mlqa_words(text, language)


def _span_logits(model: Any, windowed: WindowedQuestions, rows: list[int], pad_id: int, size: int) -> dict[int, tuple]:
    """Row -> logits of start and of end over its context tokens."""
    logits = {}
    for batch in batches_by_length([windowed.rows.ids[row] for row in rows], size):
        chunk = [rows[number] for number in batch]
        outputs = model(**windowed.rows.inputs(chunk, pad_id, model.device))
        starts_BL, ends_BL = (x.float().cpu().numpy() for x in (outputs.start_logits, outputs.end_logits))
        for place, row in enumerate(chunk):
            window = windowed.windows[row]
            context = slice(window.first, window.first + len(window.offsets))
            logits[row] = (starts_BL[place, context], ends_BL[place, context])
    return logits


def mlqa_table(results: Results) -> str:
    """One row per model: F1 / exact match per language and the average, and the chosen grid point."""
    first = next(iter(results.values()))
    title = f"MLQA, F1 / exact match in per cent, trained on {first['train_questions']} English questions"
    notes = [moved_line(first), *language_notes(results)]
    return score_table(title, "dev F1", results, lambda x: f"{x['f1']:7.1f} /{x['exact_match']:5.1f}", notes)


def moved_line(result: dict[str, Any]) -> str:
    """How many answers were not at the position that their file gives; empty if none."""
    count = result.get("moved_answers", 0)
    return f"{count} answer(s) were found near their `answer_start`, not at it, and read there" if count else ""


def _card(results: Results) -> str:
    first = next(iter(results.values()))
    about = f"In per cent, after fine-tuning on {first['train_questions']:,} English questions."
    return "\n\n".join(filter(None, [about, score_card(results, MEASURES), sentence(moved_line(first))]))


MEASURES = {"f1": "F1", "exact_match": "exact match"}
TASK = Task(
    name="mlqa",
    settings=MlqaConfig,
    check=read,
    evaluate=evaluate_mlqa,
    table=mlqa_table,
    panels=lambda results: [score_panel(f"MLQA, {x} in per cent", results, key) for key, x in MEASURES.items()],
    card=_card,
    on_hub=OnHub("question-answering", "MLQA, in per cent", {"f1": "f1", "exact_match": "exact_match"}),
    shared=True,
    place=50,
)
