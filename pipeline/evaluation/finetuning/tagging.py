"""Tagging: fine-tune on the words of one language, then evaluate zero-shot in every language.

In: encoders, UD treebanks or named entities in an official layout. Out: per model, UPOS accuracy, or F1 of the entities by
seqeval's rules, on each test language and their average, for the learning rate and epoch that are best on the development
sentences of all languages together (`grid.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForTokenClassification

from data_prep.progress import progress
from pipeline.evaluation.encoder import Encoder, batches_by_length
from pipeline.evaluation.finetuning.entities import OUTSIDE, entity_counts, f1_of
from pipeline.evaluation.finetuning.grid import run_grids
from pipeline.evaluation.finetuning.loop import FinetuneTask, Scores, load_with_head
from pipeline.evaluation.finetuning.scores import score_card, score_panel, score_table
from pipeline.evaluation.finetuning.tagging_data import TaggingConfig, TaggingData, read_tagging
from pipeline.evaluation.finetuning.tagging_files import TaggedSentences
from pipeline.evaluation.finetuning.word_rows import NO_TARGET, WordRows, word_rows
from pipeline.evaluation.languages import language_notes
from pipeline.evaluation.tables import sentence
from pipeline.evaluation.task import OnHub, Panel, Results, Task
from pipeline.runtime.dist import Launch

MEASURES = {"upos": {"accuracy": "accuracy"}, "entities": {"f1": "F1", "precision": "precision", "recall": "recall"}}


def evaluate_tagging(encoders: list[Encoder], config: TaggingConfig, ranks: Launch, directory: Path) -> Results:
    """Per model, the test scores of the chosen learning rate in per cent. All ranks call it together."""
    return run_grids(encoders, read_tagging(config), make_task, config, directory, ranks)


def make_task(encoder: Encoder, data: TaggingData, config: TaggingConfig, ranks: Launch) -> FinetuneTask:
    """Tokenize everything once, for all grid points."""
    number_of = {tag: number for number, tag in enumerate(data.tags)}

    def rows_of(part: TaggedSentences) -> WordRows:
        targets = [[number_of.get(tag, NO_TARGET) for tag in tags] for tags in part.tags]  # scores compare texts
        return word_rows(encoder, part.words, targets, config.max_length, after_markers=config.piece == "text")

    rows, pad_id = data.convert(rows_of), encoder.pad_id
    words_per_row = float((rows.train.rows.targets != NO_TARGET).sum()) / len(rows.train.rows)

    def loss(outputs: Any, inputs: dict[str, torch.Tensor], targets_BL: torch.Tensor) -> torch.Tensor:
        return word_loss(outputs, targets_BL) / max(words_per_row, 1.0)

    def score(model: Any, split: str) -> Scores:
        parts: dict[str, TaggedSentences] = getattr(data, split)
        found: Scores = {}
        for language, of in progress(getattr(rows, split).items(), f"scoring {split}", "language", ranks.is_main):
            guesses = guessed_tags(model, of, pad_id, config.micro_batch, ranks)
            found[language] = tag_scores(parts[language].tags, guesses, data.tags, ranks)
        return found

    lost = {
        x: (of.words_without_piece, data.test[x].num_words) for x, of in rows.test.items() if of.words_without_piece
    }
    return FinetuneTask(
        load=lambda: load_with_head(AutoModelForTokenClassification, encoder, num_labels=len(data.tags)),
        rows=rows.train.rows,
        loss=loss,
        score=score,
        pad_id=pad_id,
        about={"words_without_piece": lost},
    )


def word_loss(outputs: Any, targets_BL: torch.Tensor) -> torch.Tensor:
    """Cross-entropy, summed over the first pieces of all words of the batch.

    Args:
        targets_BL: may be longer than the batch's rows
    """
    logits_BLC = outputs.logits.float()
    targets_BL = targets_BL[:, : logits_BLC.shape[1]]
    return torch.nn.functional.cross_entropy(
        logits_BLC.flatten(0, 1), targets_BL.flatten(), ignore_index=NO_TARGET, reduction="sum"
    )


def guessed_tags(model: Any, of: WordRows, pad_id: int, size: int, ranks: Launch) -> dict[int, np.ndarray]:
    """Sentence -> number of the tag of each word, -1 for words without a piece. Rank r of n has every n-th sentence."""
    mine = range(ranks.rank, len(of.places), ranks.world_size)
    numbers = sorted({row for sentence in mine for row in of.places[sentence][:, 0].tolist() if row >= 0})
    best: dict[int, np.ndarray] = {}
    for batch in batches_by_length([of.rows.ids[row] for row in numbers], size):
        chunk = [numbers[place] for place in batch]
        best_BL = model(**of.rows.inputs(chunk, pad_id, model.device)).logits.argmax(dim=-1).cpu().numpy()
        best |= dict(zip(chunk, best_BL, strict=True))
    return {
        sentence: np.array(
            [best[row][token] if row >= 0 else -1 for row, token in of.places[sentence].tolist()], dtype=int
        )
        for sentence in mine
    }


def tag_scores(
    truth: Sequence[Sequence[str]], guesses: dict[int, np.ndarray], tags: list[str], ranks: Launch
) -> dict[str, float]:
    """Scores in per cent. A word without a piece has the tag `O` in entity tasks; in others it is wrong.

    Args:
        guesses: of this rank's sentences, as `guessed_tags` returns them
    """
    counts = np.zeros(3)
    for number, guess in guesses.items():
        texts = [tags[one] if one >= 0 else OUTSIDE for one in guess.tolist()]
        if OUTSIDE in tags:
            counts += entity_counts(truth[number], texts)
        else:
            counts += (sum(one == other for one, other in zip(truth[number], texts, strict=True)), len(texts), 0)
    correct, true, guessed = ranks.sum(torch.from_numpy(counts).to(ranks.device)).tolist()
    return f1_of(correct, true, guessed) if OUTSIDE in tags else {"accuracy": 100.0 * correct / true}


def tagging_table(results: Results) -> str:
    """One row per model: the first measure per language and the average, and the chosen grid point."""
    first = next(iter(results.values()))
    key, name = next(iter(MEASURES[first["labels"]].items()))
    of = "UPOS" if first["labels"] == "upos" else "entity"
    title = f"tagging, {of} {name} in per cent, trained on {first['train_sentences']} sentences of {first['train_language']}"
    notes = [*notes_on(results), *language_notes(results)]
    return score_table(title, "dev", results, lambda scores: f"{scores[key]:8.1f}", notes)


def notes_on(results: Results) -> list[str]:
    """What the figures do not show: zero-shot means, schemes that were converted, and words and types that count as wrong."""
    first = next(iter(results.values()))
    key = next(iter(MEASURES[first["labels"]]))
    zero_shot = {name: _zero_shot(result, key) for name, result in results.items()}
    notes = []
    if all(zero_shot.values()):
        means = ", ".join(f"{name} {mean:.2f}" for name, mean in zero_shot.items())
        shares = [mean / next(iter(zero_shot.values())) for mean in list(zero_shot.values())[1:]]
        times = f" ({', '.join(f'{share:.3f}' for share in shares)} of the first)" if shares else ""
        notes.append(f"mean of the languages that were not trained on: {means}{times}")
    if first["without_dev"]:
        notes.append(f"tested without development sentences: {', '.join(first['without_dev'])}")
    if first["schemes"]:
        notes.append(f"tags that were not IOB2: {', '.join(f'{x} {y}' for x, y in first['schemes'].items())}")
    if first["types_not_trained"]:
        kinds = "; ".join(f"{x} {', '.join(y)}" for x, y in first["types_not_trained"].items())
        notes.append(f"types that the training sentences do not have, so they count as missed: {kinds}")
    for name, result in results.items():
        if lost := result["words_without_piece"]:
            parts = ", ".join(f"{x} {count} of {total}" for x, (count, total) in lost.items())
            counted = "wrong" if first["labels"] == "upos" else "O"
            notes.append(f"words that give no piece with {name}, counted as {counted}: {parts}")
    return notes


def _zero_shot(result: dict[str, Any], key: str) -> float:
    """Mean over the languages other than that of training; 0 if there are none."""
    trained = result["train_language"].partition("_")[0]
    found = [scores[key] for language, scores in result["test"].items() if language.partition("_")[0] != trained]
    return sum(found) / len(found) if found else 0.0


def _card(results: Results) -> str:
    first = next(iter(results.values()))
    about = f"In per cent, after fine-tuning on {first['train_sentences']:,} sentences of {first['train_language']}."
    return "\n\n".join([about, score_card(results, MEASURES[first["labels"]]), *map(sentence, notes_on(results))])


def _panels(results: Results) -> list[Panel]:
    key, name = next(iter(MEASURES[next(iter(results.values()))["labels"]].items()))
    return [score_panel(f"tagging, {name} in per cent, zero-shot but for the language of training", results, key)]


TASK = Task(
    name="tagging",
    settings=TaggingConfig,
    check=read_tagging,
    evaluate=evaluate_tagging,
    table=tagging_table,
    panels=_panels,
    card=_card,
    on_hub=OnHub("token-classification", "Tagging of words, in per cent", {"accuracy": "accuracy", "f1": "f1"}),
    shared=True,
    place=55,
)
