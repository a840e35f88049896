"""A student that starts from an encoder other than its teacher (`student.init: DIR_OR_HUB_NAME`): checks before the run.

In: the recipe and the config of its teacher. Out: the encoder's files, with the shape and the tokenizer of the recipe's
student; or a `UserError`. Only headers of weights are read here; build_student reads the weights and checks that all are
finite.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from transformers import PretrainedConfig

from data_prep.command_line import module_command
from data_prep.shards import DataError
from pipeline.config import Recipe
from pipeline.data.tokenizer_hash import tokenizer_sha256
from pipeline.distillation.models.loading import check_weights, load_config
from pipeline.distillation.models.model_config import CONFIG_FILE
from pipeline.distillation.models.model_files import ModelFiles, find_directory, read_model
from pipeline.distillation.models.student import student_hf_config
from pipeline.distillation.models.student_init import START_ENCODER, check_start_shape
from pipeline.distillation.models.vocabulary import read_vocabulary
from pipeline.errors import UserError
from pipeline.runtime.json_files import read_json_if_there
from pipeline.runtime.run_paths import is_run_directory, students_of
from pipeline.training.identity import Identity, start_identity


def read_start(name: str) -> ModelFiles:
    """Config and tensor table of the encoder. Raises `UserError`; that of a run directory names the command that exports it."""
    directory = find_directory(name, START_ENCODER)
    if not (directory / CONFIG_FILE).exists() and is_run_directory(directory):
        names, output = students_of(directory), str(directory / "student")
        one = ["--student", names[0]] if names else []
        export = module_command("pipeline", "export", directory, *one, "--output", output)
        raise UserError(
            f"`student.init` is {name}, which is a run directory. Export the student and start from that: {export}   (then "
            f"--set {shlex.quote(f'student.init={output}')})"
        )
    return read_model(name, START_ENCODER)


def start_hashes(recipe: Recipe) -> Identity:
    """Of the encoder that the student starts from: reads all its weights. Empty where the student starts from its teacher."""
    name = recipe.student.start_encoder
    return {} if name is None else start_identity(read_start(name))


def check_start(recipe: Recipe, teacher: PretrainedConfig) -> str:
    """Check the encoder that the recipe's student starts from.

    Args:
        teacher: the teacher's config, with the vocabulary of the recipe

    Returns:
        what it is, in one line

    Raises:
        UserError: its files are not complete, or its shape or tokenizer is not the student's
    """
    name = str(recipe.student.start_encoder)
    files, config = read_start(name), load_config(name, START_ENCODER)
    check_weights(files, config)
    _check_tokenizer(recipe, name)
    check_start_shape(name, config, student_hf_config(teacher, recipe.student, []))
    return f"starts from {name}: {config.num_hidden_layers} layers x {config.hidden_size}, tokenizer as the teacher's"


def _check_tokenizer(recipe: Recipe, name: str) -> None:
    """The encoder's ids are those of the recipe's tokenizer: its embedding would have other pieces in its rows."""
    try:
        sha256 = tokenizer_sha256(name)
    except DataError as error:
        fix = f"Copy the tokenizer files of the model that it was made from into {name}"
        raise UserError(f"the {START_ENCODER} {name!r} has no tokenizer to compare with: {error} {fix}") from None
    needed = tokenizer_sha256(recipe.tokenizer)
    if sha256 == needed:
        return
    fix = "Start from an encoder with that tokenizer, or use another `student.init`"
    if recipe.vocabulary is not None and read_vocabulary(recipe.vocabulary).source_sha256 == sha256:
        output = name.rstrip("/") + "-trimmed"
        trim = module_command("pipeline", "trim", name, "--vocabulary", recipe.vocabulary, "--output", output)
        fix = f"Cut it to the same vocabulary: {trim}   (then --set {shlex.quote(f'student.init={output}')})"
    role = "the teacher's" if recipe.vocabulary is None else "that of `vocabulary`"
    raise UserError(
        f"the {START_ENCODER} {name!r} has another tokenizer (sha256 {sha256[:12]}) than {role} (sha256 {needed[:12]} in "
        f"{recipe.tokenizer}), so the rows of its embedding are other pieces. {fix}"
    )


def trained_length(recipe: Recipe) -> int | None:
    """Tokens after which the student's position embeddings will be untrained, as they began at random; None: no such ones."""
    start = recipe.student.start_encoder
    if start is None:
        return recipe.seq_len if recipe.student.init == "random" else None
    path = read_start(start).directory / "lineage.json"
    try:
        before = trained_length_of(read_json_if_there(path))
    except (TypeError, AttributeError, KeyError) as error:
        raise UserError(f"{path} is corrupt ({type(error).__name__}: {error}). Export that student again.") from None
    return None if before is None else max(before, recipe.seq_len)


def trained_length_of(lineage: Mapping[str, Any]) -> int | None:
    """`trained_length` of a finished student, from the content of its lineage.json. Raises `TypeError`, `KeyError` and so on."""
    if "trained_length" in lineage:
        length = lineage["trained_length"]
    else:
        recipe = lineage.get("recipe") or {}  # of an earlier version
        length = recipe["seq_len"] if (recipe.get("student") or {}).get("init") == "random" else None
    if length is not None and type(length) is not int:
        raise TypeError(f"the trained length is {str(length)[:40]!r}, not a number of tokens")
    return length
