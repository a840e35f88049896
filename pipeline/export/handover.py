"""Adapts the config and tokenizer of a student where the settings of the distillation would mislead those who load it.

In: the config and facts that a run wrote. Out: the config with the teacher's dropout and without the teacher's head, how
sentence vectors are made, and a tokenizer that cuts inputs at the longest trained length. Weights are not changed.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from pipeline.distillation.models.architectures import architecture_of, usable_positions
from pipeline.distillation.models.loading import load_config
from pipeline.distillation.models.model_files import find_directory
from pipeline.distillation.models.sentence_files import SentenceSettings, UnknownSettingsError, sentence_settings
from pipeline.distillation.models.student import dropout_of
from pipeline.errors import UserError
from pipeline.evaluation.model_content import TOKENIZER_CONFIG
from pipeline.evaluation.training_metadata import training_metadata
from pipeline.runtime.json_files import read_json_if_there


def hand_over(config: PretrainedConfig, run: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Change the student config of a run, in place, into the one that is exported.

    Returns:
        the dropout of the distillation and of the config, for the lineage
    """
    used = dropout_of(config)
    own = run["dropout"]["config"] if "dropout" in run else _dropout_of_teacher(config, run["teacher"], used)
    for key, value in own.items():
        setattr(config, key, value)
    # Labels, problem type and outputs belong to a head that the student does not have.
    default = PretrainedConfig()
    for key in ("id2label", "label2id", "problem_type", "output_hidden_states", "output_attentions"):
        setattr(config, key, getattr(default, key))
    if hasattr(config, "pooler_hidden_size"):  # the heads of DeBERTa need the student's width here
        config.pooler_hidden_size = config.hidden_size
    return {"distillation": used, "config": own}


def _dropout_of_teacher(config: PretrainedConfig, teacher: str, used: dict[str, float]) -> dict[str, float]:
    """The teacher's dropout where run.json does not record it: read from the teacher if it is available, else `used`."""
    try:
        source = load_config(teacher, "teacher", is_cached=True)
    except UserError:
        source = None
    if source is None or source.model_type != config.model_type:
        _warn(
            f"run.json does not record the teacher's dropout and {teacher} cannot be read as a {config.model_type} "
            f"model, so config.json keeps the distillation's: {used}. Before fine-tuning, set "
            f"{', '.join(architecture_of(config).dropout_keys)} there to the teacher's (0.1 in most encoders)."
        )
        return used
    return dropout_of(source)


def sentences_of(run: dict[str, Any], tail: str) -> dict[str, Any] | None:
    """How the sentence vectors of an export are made, as `SentenceSettings.recorded`; None: the default, means over tokens.

    A run that compares sentence vectors has recorded it. The vectors of a student that imitates the teacher's output are made
    as the teacher's, by the teacher's files. Where these cannot be read, a warning says what the export has.

    Args:
        run: content of run.json
        tail: `relations.tail` of the recipe
    """
    if run.get("sentences") or tail == "none":
        return run.get("sentences")
    try:
        find_directory(run["teacher"], is_cached=True)  # at most small files are fetched
        found = sentence_settings(run["teacher"], "auto")
    except UserError as error:
        cause = error.cause if isinstance(error, UnknownSettingsError) else str(error)
        _warn(
            f"{cause.rstrip('.')}. The model card and the files of sentence-transformers name mean pooling, and no prefix. Correct "
            "the teacher's files and export again, or write the teacher's pooling into 1_Pooling/config.json of the export."
        )
        return None
    for warning in found.warnings:
        _warn(warning)
    return None if found.settings == SentenceSettings() else found.settings.recorded()


def _warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr, flush=True)


def longest_input(directory: Path) -> int:
    """Length in tokens up to which an export can be used: its positions, or the training rows if positions began at random."""
    positions = usable_positions(load_config(directory, "student"))
    return min(positions, training_metadata(directory).get("longest") or positions)


def limit_tokenizer(directory: Path) -> None:
    """Set `model_max_length` of an export's tokenizer where the positions after the training rows are random."""
    path, longest = directory / TOKENIZER_CONFIG, training_metadata(directory).get("longest")
    if longest is None:
        return
    settings = read_json_if_there(path)
    before = settings.get("model_max_length")
    if type(before) not in (int, float) or before > longest:  # null: as without the key, and no file: the same
        settings["model_max_length"] = longest
        path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
