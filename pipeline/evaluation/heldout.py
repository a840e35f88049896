"""Held-out relation loss of finished students against a teacher: measures what was distilled, without fine-tuning.

In: encoders, a teacher and the shards. Out: per model the mean loss per language on rows that its training never saw.
Row length, rows per language and languages determine these rows. By default they, the teacher's layer and the relations
are those of the students' `lineage.json`.
"""

from __future__ import annotations

import json
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from data_prep.command_line import module_command
from data_prep.progress import Progress
from data_prep.shards import ShardSet
from pipeline.data.batches import BatchOptions, BatchSource
from pipeline.data.heldout import heldout_losses, num_turns
from pipeline.data.tokenizer_hash import deciding_file, tokenizer_sha256
from pipeline.distillation.config import RelationsConfig
from pipeline.distillation.distiller import DistillModule, Hooks
from pipeline.distillation.models.model_files import read_model
from pipeline.distillation.models.teacher import FrozenTeacher, check_vocabulary
from pipeline.distillation.tap import tap
from pipeline.errors import UserError
from pipeline.evaluation.encoder import Encoder, load_encoder, split_name
from pipeline.evaluation.languages import choose_languages, language_notes, marked
from pipeline.evaluation.tables import markdown_table
from pipeline.evaluation.task import Panel, Results, Task
from pipeline.evaluation.training_metadata import DEFAULTS, training_metadata
from pipeline.recipe.ranges import LARGEST_BATCH, LARGEST_WEIGHT, LONGEST_ROW, check_ranges
from pipeline.runtime.dist import Launch
from pipeline.runtime.text_tables import figures_table
from pipeline.training.identity import WEIGHTS, weights_hash


@dataclass
class HeldoutConfig:
    """Whose relations are compared on which text. None: as the students were trained, else `DEFAULTS`."""

    teacher: str = ""  # DIR_OR_HUB_NAME or DIR_OR_HUB_NAME@LAYER; without a layer, the layer that was distilled
    data: str = "artifacts/shards"  # output directory of `python -m data_prep prepare`
    heads: int | None = None  # relation heads
    pairs: dict[str, float] | None = None  # relations and their weights, as the recipe's relations.pairs
    after_rotary: bool | None = None  # as the recipe's relations.after_rotary
    seq_len: int | None = None  # tokens per row
    heldout_rows: int | None = None  # per language, at most a tenth of the language
    languages: list[str] | None = None
    documents: Literal["joined", "separate"] | None = None  # separate: as the recipe's key
    positions: Literal["continue", "restart"] | None = None  # of separate documents, as the recipe's key
    batch_size: int = 8  # rows per forward

    def __post_init__(self) -> None:
        limits = {"heads": (1, 2**16), "pairs": (0, LARGEST_WEIGHT), "heldout_rows": (1, 10**9)}
        check_ranges(self, "heldout", {**limits, "batch_size": (1, LARGEST_BATCH), "seq_len": (3, LONGEST_ROW)})


def check_input(config: HeldoutConfig) -> None:
    """Raise a `UserError` for what is wrong before any model is loaded."""
    if not config.teacher:
        raise UserError(
            "the task heldout compares with a teacher: add --teacher artifacts/teacher (or another, or NAME@19)"
        )
    if not Path(config.data).is_dir():
        raise UserError(
            f"shards not found at {config.data}. Name the shards of the students: --data SHARDS, or make them: "
            f"{module_command('data_prep', 'prepare', '--input', 'samples/cc100', '--tokenizer', config.teacher, '--output', config.data)}"
        )


def evaluate_heldout(encoders: list[Encoder], config: HeldoutConfig, ranks: Launch) -> dict[str, dict[str, Any]]:
    """Per model: loss per language and its mean over languages. All ranks call it together; each does a share of the rows."""
    chosen = settings_of(encoders, config)
    shards = ShardSet(Path(config.data))
    languages = choose_languages(shards.languages, config.languages, encoders, "heldout.languages", "shards")
    chosen["languages"] = languages.chosen
    options = BatchOptions(
        seq_len=chosen["seq_len"],
        alpha=1.0,  # the held-out rows do not depend on how training mixes languages
        seed=0,
        heldout_rows=chosen["heldout_rows"],
        languages=chosen["languages"],
        documents=chosen["documents"],
    )
    source = BatchSource(shards, options)
    teacher = _load_teacher(config.teacher, chosen["teacher_layer"])
    for encoder in [teacher, *encoders]:
        _check_fit(encoder, source, config.data)
    if ranks.is_main:
        warn_of_other_teachers(encoders, teacher)
    relations = RelationsConfig(**{key: chosen[key] for key in ("heads", "pairs", "after_rotary")}, backend="chunked")
    frozen = FrozenTeacher(tap(teacher.model, teacher.values_layer, after_rotary=relations.after_rotary))
    hooks = Hooks(restart_positions=chosen["positions"] == "restart")
    num_rows = sum(len(source.heldout(language)) for language in source.languages)
    results = {}
    for encoder in encoders:
        student = tap(encoder.model, encoder.values_layer, after_rotary=relations.after_rotary)
        distiller = DistillModule(frozen, student, relations, hooks=hooks)
        turns = num_turns(source, config.batch_size, ranks)
        bar = Progress(f"held-out loss of {encoder.name}", turns, "batch", is_shown=ranks.is_main)
        (losses,) = heldout_losses(
            *([distiller.losses_by_row], source, config.batch_size, ranks),
            progress=lambda bar=bar: bar.update(),  # type: ignore[misc]
        )
        bar.close()
        mean = sum(losses.values()) / len(losses)
        results[encoder.name] = {
            **{"mean": mean, "per_language": losses, "values_layer": encoder.values_layer, "teacher": teacher.name},
            **{**chosen, "teacher_layer": teacher.values_layer, "rows": num_rows, **languages.about()},
        }
    return results


def warn_of_other_teachers(encoders: list[Encoder], teacher: Encoder) -> None:
    """Warn where a student was trained with another teacher than the one that it is compared with."""
    own = {encoder.name: training_metadata(encoder.path).get("identity", {}).get(WEIGHTS) for encoder in encoders}
    if not any(own.values()):
        return
    given = weights_hash(read_model(teacher.path))
    others = [f"{name} ({hash_own[:12]})" for name, hash_own in own.items() if hash_own and hash_own != given]
    if others:
        print(
            f"warning: {', '.join(others)} learned from a teacher with other weights than {teacher.name} ({given[:12]}): "
            "this held-out loss compares with a model that was not their teacher",
            file=sys.stderr,
            flush=True,
        )


def settings_of(encoders: list[Encoder], config: HeldoutConfig) -> dict[str, Any]:
    """What is measured on which rows: as set, else as all students with a lineage were trained.

    Raises:
        UserError: the students were trained with different values and none is set
    """
    trained = {encoder.name: found for encoder in encoders if (found := training_metadata(encoder.path))}
    named = {**{key: getattr(config, key, None) for key in DEFAULTS}, "teacher_layer": split_name(config.teacher)[1]}
    settings = {}
    for key, default in DEFAULTS.items():
        values = [found[key] for found in trained.values()] or [default]
        settings[key] = values[0] if named[key] is None else named[key]
        if named[key] is None and any(value != values[0] for value in values):
            value = next(value for value in values if value is not None)  # null would choose nothing
            setting = shlex.quote(f"heldout.{key}={json.dumps(value)}")
            teacher = shlex.quote(f"{split_name(config.teacher)[0]}@{value}")
            how = f"--teacher {teacher}" if key == "teacher_layer" else f"--set {setting}"
            raise UserError(
                f"{', '.join(trained)} were trained with different `{key}`, so their held-out losses cannot be "
                f"compared. Evaluate them one by one, or choose with {how} (other rows may include some that training saw)"
            )
    if settings["documents"] == "joined":
        if config.positions == "restart":
            raise UserError(
                "heldout.positions is restart, which separate documents have. Set heldout.documents: separate too "
                "(--set heldout.documents=separate), or leave heldout.positions out"
            )
        settings["positions"] = "continue"
    return settings


def _load_teacher(name: str, layer: int | None) -> Encoder:
    """Load the teacher and read its layer `layer`; None: its last layer."""
    teacher = load_encoder(name, layer)
    if layer is None:
        teacher.values_layer = teacher.model.config.num_hidden_layers
    return teacher


def _check_fit(encoder: Encoder, source: BatchSource, data: str) -> None:
    """Raise a `UserError` unless the model has the tokenizer that the shards were made with."""
    check_vocabulary(encoder.model, source.shards.vocab_size, data)
    if tokenizer_sha256(encoder.path) != source.shards.tokenizer_sha256:
        raise UserError(
            f"the shards in {data} were made with another tokenizer than {deciding_file(encoder.path)}. Prepare shards with "
            "this tokenizer, or leave the model out"
        )
    encoder.check_max_length(source.seq_len, "heldout.seq_len")


def heldout_table(results: Results) -> str:
    """Relation loss of each model per language, and the mean."""
    first = next(iter(results.values()))
    title = (
        f"held-out relation loss against {first['teacher']}, layer {first['teacher_layer']}, {first['heads']} heads "
        "(lower is better)"
    )
    header = ["model", *marked(first["per_language"], results), "mean"]
    return figures_table(title, header, _rows(results, 4), [">9"], language_notes(results))


def _rows(results: Results, digits: int) -> list[list[str]]:
    """Model, loss per language, mean."""
    return [
        [name, *(f"{loss:z.{digits}f}" for loss in (*result["per_language"].values(), result["mean"]))]
        for name, result in results.items()
    ]


def _card(results: Results) -> str:
    languages = marked(next(iter(results.values()))["per_language"], results)
    return markdown_table(["relation loss, lower is better", *languages, "mean"], _rows(results, 3))


def _panels(results: Results) -> list[Panel]:
    values = {model: {**result["per_language"], "mean": result["mean"]} for model, result in results.items()}
    return [Panel("held-out relation loss (lower is better)", values)]


TASK = Task(
    name="heldout",
    settings=HeldoutConfig,
    check=check_input,
    evaluate=lambda encoders, settings, ranks, directory: evaluate_heldout(encoders, settings, ranks),
    table=heldout_table,
    panels=_panels,
    card=_card,
    options={
        "teacher": ("MODEL", "the teacher that heldout compares with"),
        "data": ("SHARDS", "the shards that heldout reads"),
    },
    shared=True,
    place=10,
)
