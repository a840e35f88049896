"""Writes the files with which an exported encoder loads as a `SentenceTransformer`.

In: a Hugging Face directory whose lineage.json says how its sentence vectors were trained; without that, mean over tokens
and unit length. Out: `modules.json` and the settings of its modules in the same directory, which still loads with
`AutoModel`. A learned projection is a Dense module. The package itself is not needed.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from pipeline.distillation.models.loading import load_config
from pipeline.distillation.models.sentence_files import DENSE, EARLIER_KEYS, MODES, SentenceSettings
from pipeline.errors import UserError
from pipeline.evaluation.pooling import ACTIVATIONS, DENSE_BIAS, DENSE_FILE, DENSE_WEIGHT, Dense
from pipeline.export.handover import longest_input
from pipeline.runtime.json_files import read_json_if_there
from pipeline.runtime.tensor_files import save_tensors

TRANSFORMER_FILE = "sentence_bert_config.json"
POOLING_KEYS = {MODES[mode]: key for key, mode in EARLIER_KEYS.items() if mode in MODES}  # which all versions read


def add_sentence_transformers(directory: Path, source: Path | None = None) -> None:
    """Write the files. Inputs are cut at the longest length that the export can be used with.

    `source`: a SentenceTransformer whose inputs are cut earlier, or are made lower case, so that the vectors are the same
    """
    width, max_length = load_config(directory, "student").hidden_size, longest_input(directory)
    earlier = read_json_if_there(source / TRANSFORMER_FILE) if source else {}
    if type(shorter := earlier.get("max_seq_length")) is int and shorter > 0:
        max_length = min(max_length, shorter)
    settings = exported_settings(directory)
    kinds = {"": "Transformer", "1_Pooling": "Pooling"}
    if (directory / DENSE).is_dir():
        kinds[DENSE] = "Dense"
    if settings.normalize:
        kinds[f"{len(kinds)}_Normalize"] = "Normalize"
    modules = [
        {"idx": number, "name": str(number), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for number, (path, kind) in enumerate(kinds.items())
    ]
    for path in kinds:
        (directory / path).mkdir(exist_ok=True)
    pooling = {key: name == settings.pooling for name, key in POOLING_KEYS.items()}
    prompts = {"prompts": settings.prompts, "default_prompt_name": settings.default_prompt} if settings.prompts else {}
    for name, content in (
        ("modules.json", modules),
        (TRANSFORMER_FILE, {"max_seq_length": max_length, "do_lower_case": earlier.get("do_lower_case") is True}),
        ("config_sentence_transformers.json", {**prompts, "similarity_fn_name": settings.similarity}),
        (
            "1_Pooling/config.json",
            {"word_embedding_dimension": width, **pooling, "include_prompt": settings.include_prompt},
        ),
    ):
        (directory / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def exported_settings(directory: Path) -> SentenceSettings:
    """How an export's sentence vectors are made, from its lineage. Raises `UserError` where that is corrupt."""
    path = directory / "lineage.json"
    content: dict[str, Any] = read_json_if_there(path).get("sentences") or {}
    try:
        settings = SentenceSettings(**content)
        if settings.pooling not in POOLING_KEYS:
            raise KeyError(settings.pooling)
    except (TypeError, KeyError) as error:
        names = ", ".join(field.name for field in fields(SentenceSettings))
        raise UserError(
            f"{path}: `sentences` is not an object with the keys {names} ({type(error).__name__}: {error}). Export the model again."
        ) from None
    return settings


def write_dense(directory: Path, dense: Dense, dtype: torch.dtype = torch.float32) -> None:
    """Write the projection of sentence vectors as a Dense module, which modules.json need not name."""
    (outputs, inputs), activation = dense.weight_Ed.shape, ACTIVATIONS[dense.activation]
    config = {
        "in_features": inputs,
        "out_features": outputs,
        "bias": dense.bias_E is not None,
        "activation_function": f"{activation.__module__}.{activation.__name__}",
    }
    (directory / DENSE).mkdir()
    (directory / DENSE / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    tensors = {DENSE_WEIGHT: dense.weight_Ed, DENSE_BIAS: dense.bias_E}
    stored = {name: tensor.to(dtype).contiguous() for name, tensor in tensors.items() if tensor is not None}
    save_tensors(stored, directory / DENSE / DENSE_FILE, {"format": "pt"})


def drop_dense(directory: Path) -> None:
    """Leave the projection out of an export: its sentence vectors are the student's own, of the student's width."""
    shutil.rmtree(directory / DENSE, ignore_errors=True)
