"""Cross-lingual retrieval: how often a sentence's nearest neighbour in the other language is its translation.

In: encoders and a directory of `en-XX.tsv` files (columns English, XX, source, key) or of `tatoeba.xxx-eng.*` files.
Out: accuracy in both directions per language pair and their mean, for each pooling.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from pipeline.errors import UserError
from pipeline.evaluation.encoder import POOLINGS, Encoder, sentence_vectors
from pipeline.evaluation.languages import Languages, among, choose_languages, language_notes, marked
from pipeline.evaluation.tables import markdown_table, pooling_rows
from pipeline.evaluation.task import OnHub, Panel, Results, Task
from pipeline.evaluation.tatoeba import SHORT_CODES, read_line_pairs, read_text, tatoeba_files
from pipeline.recipe.ranges import LARGEST_BATCH, LARGEST_INT, LONGEST_ROW, check_ranges
from pipeline.runtime.text_tables import figures_table

Pairs = list[tuple[str, str]]
HEADER_NAMES = ("en", "eng", "english", "source", "src", "sentence1", "text1")


@dataclass
class RetrievalConfig:
    """Which sentence pairs are compared, and how they are encoded."""

    pairs: str = "samples/parallel"  # directory with en-XX.tsv or tatoeba.xxx-eng.* files
    languages: list[str] | None = None  # None: every file of the directory; de and deu name the same Tatoeba files
    max_pairs: int = 120  # at most this many pairs of each file, from its start
    max_length: int = 128  # tokens; longer sentences are cut
    batch_size: int = 32  # sentences per forward
    prefix: str = ""  # put before every sentence, for encoders that were trained with one

    def __post_init__(self) -> None:
        limits = {"max_pairs": (2, LARGEST_INT), "max_length": (3, LONGEST_ROW), "batch_size": (1, LARGEST_BATCH)}
        check_ranges(self, "retrieval", limits)


def read_pairs(config: RetrievalConfig) -> dict[str, Pairs]:
    """Read the pairs of all chosen languages: language -> (English, other) sentences."""
    files = pair_files(config)
    languages = [x if x in files else SHORT_CODES.get(x, x) for x in config.languages or files]
    if missing := [language for language in languages if language not in files]:
        raise UserError(
            f"{config.pairs} has no pairs for {', '.join(missing)}; it has {', '.join(files)}. "
            f"{among('retrieval.languages', languages, files)}"
        )
    return {language: _pairs_in(files[language], config.max_pairs) for language in languages}


def pair_files(config: RetrievalConfig) -> dict[str, tuple[Path, ...]]:
    """Language -> its `en-XX.tsv`, or else its two Tatoeba files. Sorted by language."""
    directory = Path(config.pairs)
    tables = {path.stem.removeprefix("en-"): (path,) for path in directory.glob("en-*.tsv")}
    if found := {**tatoeba_files(directory), **tables}:
        return dict(sorted(found.items()))
    raise UserError(_nothing_in(directory))


def _pairs_in(files: tuple[Path, ...], max_pairs: int) -> Pairs:
    if len(files) == 1:
        return read_pairs_file(*files, max_pairs)
    english, other = files
    return _enough(read_line_pairs(english, other, max_pairs), other)


def _nothing_in(directory: Path) -> str:
    if list(directory.glob("*-en.en")):
        return (
            f"{directory} holds Tatoeba as XTREME distributes it: the English lines are sorted, so line n is no longer the "
            "translation of line n. Name the directory of the tatoeba.xxx-eng.xxx files that XTREME's script "
            "downloads (LASER, data/tatoeba/v1): --set retrieval.pairs=DIR"
        )
    return (
        f"{directory} has no en-XX.tsv and no tatoeba.xxx-eng.xxx files. Name a directory that has: "
        "--set retrieval.pairs=DIR"
    )


def read_pairs_file(path: Path, max_pairs: int) -> Pairs:
    """Read the first `max_pairs` pairs of one `en-XX.tsv` file."""
    pairs: Pairs = []
    lines = read_text(path).rstrip("\n").split("\n")
    width = lines[0].count("\t") + 1
    for number, line in enumerate(lines[:max_pairs], start=1):
        columns = [column.strip() for column in line.split("\t")]
        if number == 1 and columns[0].casefold() in HEADER_NAMES:
            raise UserError(
                f"{path}, line 1, looks like a header: {line[:60]!r}. These files have no header: English, a tab, the "
                "translation, further columns. Delete that line."
            )
        if len(columns) > width:
            raise UserError(
                f"{path}, line {number}: {len(columns)} column(s), line 1 has {width}: {line[:60]!r}. A tab within a sentence "
                "moves the columns after it. Correct or delete that line."
            )
        if len(columns) < 2 or not columns[0] or not columns[1]:
            raise UserError(
                f"{path}, line {number}: expected an English sentence, a tab and its translation, "
                f"got {len(columns)} column(s): {line[:60]!r}. Correct or delete that line."
            )
        pairs.append((columns[0], columns[1]))
    return _enough(pairs, path)


def _enough(pairs: Pairs, path: Path) -> Pairs:
    if len(pairs) < 2:
        raise UserError(f"{path} holds {len(pairs)} pair(s); retrieval needs at least 2.")
    return pairs


def evaluate_retrieval(encoder: Encoder, config: RetrievalConfig) -> dict[str, Any]:
    """Evaluate one encoder.

    Returns:
        `per_pair`: language -> pooling -> `to_english`, `from_english` and their `mean`, as shares of 1; `mean`: pooling
        -> mean over the languages; and what was measured how
    """
    known = list(pair_files(config))
    about = _chosen(known, list(config.languages or known), [encoder]).about()
    encoder.check_max_length(config.max_length, "retrieval.max_length")
    started = time.perf_counter()
    pairs_of = read_pairs(config)
    texts = sorted({text for pairs in pairs_of.values() for pair in pairs for text in pair})
    row_of = {text: row for row, text in enumerate(texts)}
    vectors, num_tokens = sentence_vectors(
        encoder, [config.prefix + text for text in texts], config.max_length, config.batch_size
    )
    per_pair: dict[str, dict[str, dict[str, float]]] = {}
    for language, pairs in pairs_of.items():
        english = [row_of[text] for text, _ in pairs]
        other = [row_of[text] for _, text in pairs]
        per_pair[language] = {pooling: both_directions(vectors[pooling], english, other) for pooling in POOLINGS}
    seconds = time.perf_counter() - started
    return {
        "mean": {p: sum(pair[p]["mean"] for pair in per_pair.values()) / len(per_pair) for p in POOLINGS},
        "per_pair": per_pair,
        "values_layer": encoder.values_layer,
        "sentence_pooling": encoder.pooling.name,
        "num_pairs": {language: len(pairs) for language, pairs in pairs_of.items()},
        "seconds": round(seconds, 3),
        "tokens_per_second": round(num_tokens / seconds, 1),
        **about,
    }


def evaluate_each(encoders: list[Encoder], config: RetrievalConfig) -> dict[str, dict[str, Any]]:
    """`evaluate_retrieval` of every model, by name, in the languages that all students were trained on."""
    languages = _chosen(list(pair_files(config)), config.languages, encoders)
    config = replace(config, languages=languages.chosen)
    return {encoder.name: {**evaluate_retrieval(encoder, config), **languages.about()} for encoder in encoders}


def _chosen(known: list[str], named: list[str] | None, encoders: list[Encoder]) -> Languages:
    """As `choose_languages`; English is in every pair, so it is never left out."""
    short = None if named is None else [x if x in known else SHORT_CODES.get(x, x) for x in named]
    found = choose_languages(known, short, encoders, "retrieval.languages", "pairs")
    return replace(found, left_out={x: why for x, why in found.left_out.items() if x != "en"})


def both_directions(vectors: torch.Tensor, english: list[int], other: list[int]) -> dict[str, float]:
    """Share of sentences whose nearest neighbour by cosine is their translation.

    Args:
        vectors: unit vectors, `[text, width]`
        english, other: row of each pair's two sentences; rows may repeat, and any copy of the right text counts
    """
    cosine = vectors[english] @ vectors[other].T
    english_rows, other_rows = torch.tensor(english), torch.tensor(other)
    from_english = (other_rows[cosine.argmax(dim=1)] == other_rows).float().mean().item()
    to_english = (english_rows[cosine.argmax(dim=0)] == english_rows).float().mean().item()
    return {"to_english": to_english, "from_english": from_english, "mean": (to_english + from_english) / 2}


def retrieval_table(results: Results) -> str:
    """Accuracy of each model and pooling per language pair, both directions averaged, and the mean."""
    header = ["model", "pooled from", *marked(next(iter(results.values()))["per_pair"], results), "mean"]
    rows = pooling_rows(results, "per_pair", lambda pair: pair["mean"])
    return figures_table(
        "retrieval accuracy, both directions averaged", header, rows, ["<12", ">9"], language_notes(results)
    )


def _card(results: Results) -> str:
    languages = marked(next(iter(results.values()))["per_pair"], results)
    rows = [
        [f"{name}, {pooling}", *cells]
        for name, pooling, *cells in pooling_rows(results, "per_pair", lambda pair: pair["mean"])
    ]
    return markdown_table(["model, pooled from", *languages, "mean"], rows)


def _panels(results: Results) -> list[Panel]:
    """One panel per pooling."""
    return [
        Panel(
            f"retrieval accuracy, pooled from {pooling}",
            {
                model: {x: pair[pooling]["mean"] for x, pair in result["per_pair"].items()}
                | {"mean": result["mean"][pooling]}
                for model, result in results.items()
            },
        )
        for pooling in next(iter(results.values()))["mean"]
    ]


TASK = Task(
    name="retrieval",
    settings=RetrievalConfig,
    check=read_pairs,
    evaluate=lambda encoders, settings, ranks, directory: evaluate_each(encoders, settings),
    table=retrieval_table,
    panels=_panels,
    card=_card,
    on_hub=OnHub("text-retrieval", "Cross-lingual retrieval of translations", {"output": "accuracy"}),
    place=20,
)
