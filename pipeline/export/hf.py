"""Writes a student as a Hugging Face directory: safetensors, config, the teacher's tokenizer files, model card, lineage.

In: fp32 weights by Hugging Face name, a config, the teacher's directory or hub name. Out: a directory that `AutoModel`
and `AutoTokenizer` load. It appears complete or not at all.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig

from data_prep.outputs import check_output_place, replaced_directory
from pipeline.config import tree_of_recipe
from pipeline.data.tokenizer_hash import tokenizer_directory
from pipeline.distillation.models.loading import blank_model, config_of
from pipeline.distillation.models.student import SENTENCE_PROJECTION
from pipeline.errors import UserError
from pipeline.evaluation.pooling import Dense
from pipeline.export.card import CARD_FILE, LINEAGE_FILE, VOCABULARY_FILE, lineage_of, write_card
from pipeline.export.card_metadata import license_of
from pipeline.export.handover import hand_over, limit_tokenizer, sentences_of
from pipeline.export.sentence_transformers_files import write_dense
from pipeline.runtime import ds_config
from pipeline.runtime.checkpoint import Step, read_model_weights
from pipeline.runtime.json_files import read_json
from pipeline.runtime.run_paths import STUDENTS, RunPaths, one_student
from pipeline.runtime.tensor_files import not_finite, save_tensors
from pipeline.training.identity import check_same_tokenizer_files, warn_of_other_teacher

Extra = Callable[[Path], object]
TOKENIZER_FILES = (
    "*.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    VOCABULARY_FILE,
)
PRODUCTS = (  # the files of an export
    *TOKENIZER_FILES,
    LINEAGE_FILE,
    CARD_FILE,
    "config.json",
    "generation_config.json",
    "model*.safetensors*",
    "onnx",
    "*_Pooling",
    "*_Dense",
    "*_Normalize",
    "modules.json",
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
)
DTYPES = {name: ds_config.DTYPES[name] for name in ("fp32", "fp16")}


def export_run(
    run_dir: Path,
    output: Path,
    extras: Sequence[Extra] = (),
    dtype: torch.dtype = torch.float32,
    student: str = "",
    step: Step = None,
) -> Path:
    """Write a checkpoint of a run directory as a Hugging Face directory, with the figures in the run directory.

    Args:
        extras, dtype: as in `Export`
        student: its name in the recipe's `students`; empty where the run has one student
        step: of the checkpoint

    Returns:
        `output`

    Raises:
        UserError: the run directory is not complete, or `output` cannot be used
    """
    student, run = checked_place(run_dir, output, student)
    weights, state = read_model_weights(run_dir, student, step)
    paths = RunPaths(run_dir, student)
    config = config_of(_existing(paths.student_config), str(paths.files), "student")
    recipe_text = _existing(paths.recipe).read_text(encoding="utf-8")
    tokenizer = run.get("vocabulary") or run["teacher"]
    check_same_tokenizer_files(state.get("identity", {}), tokenizer, paths.files)
    warn_of_other_teacher(state.get("identity", {}), run["teacher"])
    weight_Dd = weights.pop(SENTENCE_PROJECTION, None)
    projection = None if weight_Dd is None else Dense(weight_Dd)
    tail = tree_of_recipe(recipe_text, f"{paths.recipe}")["relations"].get("tail", "none")
    more = {
        "dropout": hand_over(config, run),
        "sentences": sentences_of(run, tail),
        "license": license_of(run["teacher"]),
    }
    lineage = lineage_of({**run, **more, "student": student}, state, recipe_text)
    export = Export(weights, config, tokenizer, lineage, extras, dtype, [paths.files], projection)
    return export_student(export, output)


def checked_place(run_dir: Path, output: Path, student: str) -> tuple[str, dict[str, Any]]:
    """The student of the run, and its run.json, after a check that an export to `output` replaces nothing that is needed.

    Args:
        student: as in `export_run`

    Raises:
        UserError, DataError: as `export_run`
    """
    if not run_dir.is_dir():
        raise UserError(f"run directory {run_dir} not found. Name the --run-dir of a training.")
    check_output_place(output, "--output", {"the run directory": run_dir})
    student = one_student(run_dir, student or None)
    if student and output.resolve().parent == (run_dir / STUDENTS).resolve():
        raise UserError(
            f"--output {output}: every directory in {run_dir / STUDENTS} is a student of the run. For example: "
            f"--output {run_dir / STUDENTS / student / 'student'}"
        )
    run = read_json(_existing(RunPaths(run_dir, student).description))
    tokenizer = run.get("vocabulary") or run["teacher"]
    check_output_place(output, "--output", {"the teacher": Path(run["teacher"]), "the tokenizer": Path(tokenizer)})
    return student, run


@dataclass(frozen=True)
class Export:
    """What an export is made of.

    Attributes:
        weights: fp32 weights by Hugging Face name
        tokenizer: directory or hub name
        extras: functions that add files to the export. They run before it gets its name, so if one fails nothing is left
        dtype: precision of the stored weights
        measured: directories whose figures go into the model card
        projection: of sentence vectors, for the extras
    """

    weights: Mapping[str, torch.Tensor]
    config: PretrainedConfig
    tokenizer: str
    lineage: dict[str, Any]
    extras: Sequence[Extra] = ()
    dtype: torch.dtype = torch.float32
    measured: Sequence[Path] = ()
    projection: Dense | None = None


def export_student(export: Export, output: Path) -> Path:
    """Write an export to `output`. Returns `output`; raises `UserError` where weights or output are not valid."""
    weights, config, dtype = export.weights, export.config, export.dtype
    architecture = check_weights(weights, config)
    if name := not_finite({name: tensor.to(dtype) for name, tensor in weights.items()}):
        raise UserError(
            f"{name} is not finite (NaN or infinite) in {dtype}, so this student cannot be used. Export another checkpoint, or "
            "fp32 if only the rounding to half precision overflows (--dtype fp32)"
        )
    if output.exists() and not (output / LINEAGE_FILE).is_file():
        raise UserError(f"{output} exists and is not an earlier export, so it is not replaced. Name another --output.")
    with replaced_directory(output, PRODUCTS) as temporary:
        config.architectures, config.dtype = [architecture], dtype
        config.save_pretrained(temporary)
        save_tensors(
            {name: tensor.to(dtype).contiguous() for name, tensor in weights.items()},
            temporary / "model.safetensors",
            metadata={"format": "pt"},
        )
        copy_tokenizer(export.tokenizer, temporary)
        if export.projection is not None:
            write_dense(temporary, export.projection, dtype)
        (temporary / LINEAGE_FILE).write_text(json.dumps(export.lineage, indent=2) + "\n", encoding="utf-8")
        limit_tokenizer(temporary)
        for extra in export.extras:
            extra(temporary)
        write_card(temporary, export.measured, output)
    return output


def check_weights(weights: Mapping[str, torch.Tensor], config: PretrainedConfig) -> str:
    """The name of the model class, after checking that it has exactly these weights in these shapes, all fp32."""
    with torch.device("meta"):
        model = blank_model(config, "student_config.json", "student")
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    given = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    differing = sorted(name for name in expected.keys() | given.keys() if expected.get(name) != given.get(name))
    if differing:
        name = differing[0]
        raise UserError(
            f"the weights are not those of a {type(model).__name__} of this config: {name} is {given.get(name)} in the "
            f"checkpoint and {expected.get(name)} in the model ({len(differing)} differ). "
            "student_config.json and the checkpoint must come from the same run."
        )
    other = [name for name, tensor in weights.items() if tensor.dtype != torch.float32]
    if other:
        raise UserError(
            f"{other[0]} is {weights[other[0]].dtype}, not float32: this checkpoint is not complete. Export another one."
        )
    return type(model).__name__


def copy_tokenizer(name: str, directory: Path) -> None:
    """Copy the tokenizer files of a directory or hub name, byte for byte: shards identify a tokenizer by their hash."""
    source = tokenizer_directory(name)
    files = [path for pattern in TOKENIZER_FILES for path in source.glob(pattern)]
    if not files:
        raise UserError(f"{name} has no tokenizer files, and a student without tokenizer cannot be used.")
    for path in files:
        shutil.copyfile(path, directory / path.name)


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise UserError(f"{path} is missing: {path.parent} is not a run directory, or its training has not started.")
    return path
