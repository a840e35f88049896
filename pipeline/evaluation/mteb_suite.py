"""Runs tasks of the installed `mteb` package on the encoders: STS, retrieval, classification, clustering and others.

In: encoders and names of tasks or of a benchmark. Out: mteb's main score per task and their mean. mteb downloads the data, and
the package is optional (`pip install mteb`). Its own result files are in the task's directory of the output.
"""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import torch

from data_prep.command_line import module_command
from pipeline.errors import UserError
from pipeline.evaluation.encoder import Encoder, sentence_vectors
from pipeline.evaluation.library_data import library_errors
from pipeline.evaluation.tables import markdown_table
from pipeline.evaluation.task import Panel, Results, Task
from pipeline.provenance import fingerprint
from pipeline.recipe.ranges import LARGEST_BATCH, LONGEST_ROW, check_ranges
from pipeline.runtime.text_tables import text_table

MAJOR_VERSION = "2"  # of mteb, whose interface of encoders this is


@dataclass
class MtebConfig:
    """Which of mteb's tasks are run, and how texts are encoded."""

    tasks: list[str] = field(default_factory=list)  # mteb's names: STS17, SciFact, MassiveIntentClassification, ...
    benchmark: str | None = None  # all tasks of one of mteb's benchmarks: "MTEB(Multilingual, v2)"
    languages: list[str] | None = None  # three letters (deu, swh); None: all languages of the tasks
    pooling: Literal["output", "last_input", "values"] = "output"
    max_length: int = 256  # tokens; longer texts are cut
    batch_size: int = 32  # texts per forward
    query_prefix: str = ""  # put before every text that is not a document, for encoders that were trained with one
    document_prefix: str = ""  # put before every document

    def __post_init__(self) -> None:
        check_ranges(self, "mteb", {"max_length": (3, LONGEST_ROW), "batch_size": (1, LARGEST_BATCH)})


class MtebEncoder:
    """An encoder as mteb calls it. Vectors have length 1, so their similarity is the cosine."""

    def __init__(self, encoder: Encoder, config: MtebConfig) -> None:
        from mteb.models.model_meta import ModelMeta

        self.encoder, self.config = encoder, config
        name = re.sub(r"[^A-Za-z0-9.-]+", "_", encoder.path).strip("_")[-60:]
        settings = [
            config.pooling,
            encoder.pooling.content,
            config.max_length,
            config.query_prefix,
            config.document_prefix,
            encoder.values_layer,
        ]
        revision = fingerprint([encoder.content, settings])
        # a kept result of mteb is of this revision; other weights or settings are another one
        self.mteb_model_meta = ModelMeta.create_empty({"name": f"student/{name}", "revision": revision})

    def encode(self, inputs: Iterable[Any], *, prompt_type: Any = None, **about: Any) -> torch.Tensor:
        """Unit vectors `[text, width]` of the texts in mteb's batches. `about`: what mteb says about task and split."""
        is_document = prompt_type is not None and prompt_type.value == "document"
        prefix = self.config.document_prefix if is_document else self.config.query_prefix
        texts = [prefix + text for batch in inputs for text in batch["text"]]
        vectors, _ = sentence_vectors(self.encoder, texts, self.config.max_length, self.config.batch_size)
        return vectors[self.config.pooling]

    def similarity(self, one: Any, other: Any) -> torch.Tensor:
        """Cosines of all pairs."""
        return torch.as_tensor(one) @ torch.as_tensor(other).T

    def similarity_pairwise(self, one: Any, other: Any) -> torch.Tensor:
        """Cosine of each vector with the vector of the same number."""
        return (torch.as_tensor(one) * torch.as_tensor(other)).sum(dim=-1)


def chosen_tasks(config: MtebConfig) -> list[Any]:
    """mteb's task objects. Raises `UserError` where mteb is missing, or does not know a name or has no texts in the languages."""
    try:
        import mteb
    except ImportError as error:
        raise UserError(
            f"the task mteb needs the package mteb, which cannot be imported ({error}). Install it: {module_command('pip', 'install', 'mteb>=2,<3')}   "
            "(without it, `beir`, `retrieval` and `sts` read data sets from files)"
        ) from None
    if (version := metadata.version("mteb")).partition(".")[0] != MAJOR_VERSION:
        install = module_command("pip", "install", "mteb>=2,<3")
        raise UserError(f"mteb {version} has another interface. Install version 2: {install}")
    if not config.tasks and not config.benchmark:
        raise UserError("mteb has more than a thousand tasks. Name some: --set 'mteb.tasks=[STS17, SciFact]'")
    try:
        # `get_tasks` leaves out a task that has none of the languages; `get_task` raises
        found = [mteb.get_task(name, languages=config.languages) for name in config.tasks]
        if config.benchmark:
            found += _of_benchmark(config.benchmark, config.languages)
    except (KeyError, ValueError) as error:
        raise UserError(
            f"mteb {version}: {' '.join(str(error).split())[:300]}. Correct mteb.tasks, mteb.benchmark or mteb.languages"
        ) from None
    if unsafe := [task.metadata.name for task in found if task.metadata.dataset.get("trust_remote_code")]:
        raise UserError(
            f"{', '.join(unsafe)}: mteb would run code from the data set's repository, which is never done here. Leave these out: "
            "--set 'mteb.tasks=[...]'"
        )
    return found


def _of_benchmark(name: str, languages: list[str] | None) -> list[Any]:
    """The tasks of a benchmark that have one of the languages, in these languages. Raises `ValueError` where none has."""
    import mteb

    tasks = list(mteb.get_benchmark(name).tasks)
    if languages is None:
        return tasks
    found = []
    for task in tasks:
        with contextlib.suppress(ValueError):  # it has none of the languages
            found.append(task.filter_languages(languages, hf_subsets=task.hf_subsets))
    if not found:
        raise ValueError(f"no task of {name} has the languages {', '.join(languages)}")
    return found


def evaluate_mteb(encoders: list[Encoder], config: MtebConfig, directory: Path) -> Results:
    """Per model: mteb's main score of each task, and their mean. Scores that are in `directory` are not computed again."""
    return {encoder.name: run_mteb(encoder, chosen_tasks(config), config, directory) for encoder in encoders}


def run_mteb(encoder: Encoder, tasks: list[Any], config: MtebConfig, directory: Path) -> dict[str, Any]:
    """The scores of one encoder."""
    import mteb

    encoder.check_max_length(config.max_length, "mteb.max_length")
    logging.getLogger("mteb").setLevel(logging.WARNING)
    with library_errors(
        "the data of mteb's tasks", "choose tasks whose data is in the cache: --set 'mteb.tasks=[...]'"
    ):
        model: Any = MtebEncoder(encoder, config)
        found = mteb.evaluate(model, tasks, cache=mteb.ResultCache(directory))
    of_name = {task.metadata.name: task for task in tasks}
    # a kept file may also hold other languages and parts than this evaluation asks for
    asked = [result.validate_and_filter_scores(of_name[result.task_name]) for result in found.task_results]
    per_task = {result.task_name: float(result.get_score()) for result in asked}
    return {
        "mean": sum(per_task.values()) / len(per_task),
        "per_task": per_task,
        "main_score": {task.metadata.name: task.metadata.main_score for task in tasks},
        "pooling": config.pooling,
        "mteb_version": metadata.version("mteb"),
    }


def mteb_table(results: Results) -> str:
    """One row per task, one column per model: mteb's main score, and the mean."""
    rows = _rows(results)
    return text_table(_title(results), ["task", "measure", *results], rows, ["<18", *[">12"] * len(results)])


def _card(results: Results) -> str:
    return f"{_title(results)}.\n\n{markdown_table(['task', 'measure', *results], _rows(results))}"


def _title(results: Results) -> str:
    first = next(iter(results.values()))
    return f"Main scores by mteb {first['mteb_version']}, pooled from {first['pooling']}"


def _rows(results: Results) -> list[list[str]]:
    first = next(iter(results.values()))
    rows = [
        [task, first["main_score"][task], *(f"{result['per_task'][task]:.3f}" for result in results.values())]
        for task in first["per_task"]
    ]
    return [*rows, ["mean", "", *(f"{result['mean']:.3f}" for result in results.values())]]


def _panels(results: Results) -> list[Panel]:
    return [Panel("mteb, main scores", {model: {**r["per_task"], "mean": r["mean"]} for model, r in results.items()})]


TASK = Task(
    name="mteb",
    settings=MtebConfig,
    check=chosen_tasks,
    evaluate=lambda encoders, settings, ranks, directory: evaluate_mteb(encoders, settings, directory),
    table=mteb_table,
    panels=_panels,
    card=_card,
    place=35,
)
