"""What a student's config and tokenizer say to those who load it, where the distillation's own settings would mislead them.

In: the config and facts that a run wrote. Out: the config with the teacher's dropout and no traces of the teacher's head,
and a tokenizer that cuts where training ended. Weights are never touched. Used by hf.py and by `pipeline export`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from pipeline.distillation.models.architectures import architecture_of, usable_positions
from pipeline.distillation.models.loading import load_config
from pipeline.distillation.models.student import dropout_of
from pipeline.errors import UserError
from pipeline.evaluation.training_metadata import longest_of
from pipeline.runtime.json_files import read_json

TOKENIZER_CONFIG = "tokenizer_config.json"


def hand_over(config: PretrainedConfig, run: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Change a run's student config into the one that is exported. Returns the dropout of the distillation and of the
    config, for the lineage."""
    used = dropout_of(config)
    own = run["dropout"]["config"] if "dropout" in run else _dropout_of_teacher(config, run["teacher"], used)
    for key, value in own.items():
        setattr(config, key, value)
    # Labels, problem type and outputs are of a head, or of a use, that the student does not have.
    nothing = PretrainedConfig()
    for key in ("id2label", "label2id", "problem_type", "output_hidden_states", "output_attentions"):
        setattr(config, key, getattr(nothing, key))
    if hasattr(config, "pooler_hidden_size"):  # DeBERTa's heads multiply states of this width
        config.pooler_hidden_size = config.hidden_size
    return {"distillation": used, "config": own}


def _dropout_of_teacher(config: PretrainedConfig, teacher: str, used: dict[str, float]) -> dict[str, float]:
    """For runs whose run.json does not record it: from the teacher, if it is still there."""
    try:
        source = load_config(teacher, "teacher", is_cached=True)
    except UserError:
        source = None
    if source is None or source.model_type != config.model_type:
        print(
            f"warning: run.json does not record the teacher's dropout and {teacher} cannot be read as a {config.model_type} "
            f"model, so config.json keeps the distillation's: {used}. Before fine-tuning, set "
            f"{', '.join(architecture_of(config).dropout_keys)} there to the teacher's (0.1 in most encoders).",
            file=sys.stderr,
            flush=True,
        )
        return used
    return dropout_of(source)


def longest_input(directory: Path) -> int:
    """Tokens up to which an export can be used: its positions, or the rows of the training where these began at random."""
    positions = usable_positions(load_config(directory, "student"))
    return min(positions, _longest_trained(directory) or positions)


def _longest_trained(directory: Path) -> int | None:
    recipe = read_json(directory / "lineage.json").get("recipe")
    return longest_of(recipe) if recipe else None


def limit_tokenizer(directory: Path) -> None:
    """Let the tokenizer of an export cut where positions are random from there on; it is otherwise as it was."""
    path, longest = directory / TOKENIZER_CONFIG, _longest_trained(directory)
    if longest is None or not path.is_file():
        return
    settings = read_json(path)
    if settings.get("model_max_length", longest + 1) > longest:
        settings["model_max_length"] = longest
        path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
