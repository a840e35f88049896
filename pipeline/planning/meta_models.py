"""Teacher and student of a recipe without their weights: real modules on torch's `meta` device, which holds shapes only.

In: a recipe and, where the teacher is neither a directory nor a known hub name, its config.json. Out: `Encoders`, cut and
tapped by the same code that trains, so that every count below is of the modules that will run.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from pipeline.config import Recipe
from pipeline.distillation.models.architectures import architecture_of, check_length
from pipeline.distillation.models.loading import blank_model, config_of
from pipeline.distillation.models.student import recompute_activations, student_hf_config
from pipeline.distillation.models.student_init import copied_layers
from pipeline.distillation.models.vocabulary import read_vocabulary
from pipeline.distillation.relations.loss import check_heads
from pipeline.distillation.tap import TappedEncoder, tap
from pipeline.errors import UserError, did_you_mean
from pipeline.planning.trace import ATTENTION

_XLM_R = {
    "model_type": "xlm-roberta",
    "pad_token_id": 1,
    "vocab_size": 250002,
    "max_position_embeddings": 514,
    "type_vocab_size": 1,
}
_ROBERTA = {
    "model_type": "roberta",
    "pad_token_id": 1,
    "vocab_size": 50265,
    "max_position_embeddings": 514,
    "type_vocab_size": 1,
}
_BERT = {"model_type": "bert", "vocab_size": 30522, "max_position_embeddings": 512, "type_vocab_size": 2}
_MODERNBERT = {
    "model_type": "modernbert",
    "max_position_embeddings": 8192,
    "intermediate_size": 1152,
    "num_hidden_layers": 22,
}


def _shape(layers: int, hidden: int, heads: int) -> dict[str, int]:
    return {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "intermediate_size": 4 * hidden,
    }


BASE, LARGE = _shape(12, 768, 12), _shape(24, 1024, 16)
# Published config.json files, as far as they decide shapes.
KNOWN_TEACHERS: dict[str, dict[str, Any]] = {
    "FacebookAI/xlm-roberta-base": {**_XLM_R, **BASE},
    "FacebookAI/xlm-roberta-large": {**_XLM_R, **LARGE},
    "facebook/xlm-roberta-xl": {**_XLM_R, **_shape(36, 2560, 32), "model_type": "xlm-roberta-xl", "vocab_size": 250880},
    "facebook/xlm-roberta-xxl": {
        **_XLM_R,
        **_shape(48, 4096, 32),
        "model_type": "xlm-roberta-xl",
        "vocab_size": 250880,
    },
    "FacebookAI/roberta-base": {**_ROBERTA, **BASE},
    "FacebookAI/roberta-large": {**_ROBERTA, **LARGE},
    "google-bert/bert-base-uncased": {**_BERT, **BASE},
    "google-bert/bert-large-uncased": {**_BERT, **LARGE},
    "google-bert/bert-base-multilingual-cased": {**_BERT, **BASE, "vocab_size": 119547},
    "intfloat/multilingual-e5-small": {**_BERT, **_shape(12, 384, 12), "vocab_size": 250037},
    "intfloat/multilingual-e5-base": {**_XLM_R, **BASE},
    "intfloat/multilingual-e5-large": {**_XLM_R, **LARGE},
    "BAAI/bge-m3": {**_XLM_R, **LARGE, "max_position_embeddings": 8194},
    "answerdotai/ModernBERT-base": {**_MODERNBERT, "vocab_size": 50368, "hidden_size": 768, "num_attention_heads": 12},
    "jhu-clsp/mmBERT-small": {**_MODERNBERT, "vocab_size": 256000, "hidden_size": 384, "num_attention_heads": 6},
    "jhu-clsp/mmBERT-base": {**_MODERNBERT, "vocab_size": 256000, "hidden_size": 768, "num_attention_heads": 12},
}


@dataclass
class Encoders:
    """Both models as they will run, and the counts that need no run."""

    teacher: TappedEncoder
    student: TappedEncoder
    teacher_parameters: int  # of the cut teacher
    student_parameters: int  # of the part that runs in training
    trained_shapes: list[tuple[int, ...]]
    untrained_parameters: int  # in checkpoints and in the export, never in the optimizer

    @property
    def trained_parameters(self) -> int:
        return sum(torch.Size(shape).numel() for shape in self.trained_shapes)


def build_encoders(recipe: Recipe, teacher_config: Path | None = None) -> Encoders:
    """Cut and tap both models as the recipe says."""
    relations, options = recipe.relations, recipe.relations.tap_options
    config = read_config(recipe.teacher, teacher_config)
    check_length(config, recipe.seq_len, recipe.teacher)
    if recipe.vocabulary is not None:
        config.vocab_size = len(read_vocabulary(recipe.vocabulary))
    teacher_layers = config.num_hidden_layers
    teacher = tap(_on_meta(config), relations.teacher_taps or teacher_layers, **options, role="teacher")
    chosen = copied_layers(teacher_layers, recipe.student.layers, recipe.student.init_layers, max(teacher.layers))
    model = _on_meta(student_hf_config(config, recipe.student, chosen))
    if "embeddings" in recipe.student.freeze:
        model.get_input_embeddings().weight.requires_grad_(False)
    if recipe.student.checkpointing:
        model.config.use_cache = False  # of no use to an encoder, and transformers warns where it meets recomputation
        recompute_activations(model)
    student = tap(model.train(), relations.student_taps or recipe.student.layers, **options, role="student")
    check_heads(teacher.widths[0], relations.heads, "teacher", student.widths[0])
    check_heads(student.widths[0], relations.heads, "student", teacher.widths[0])
    shapes = [tuple(p.shape) for p in student.parameters() if p.requires_grad]
    trained = sum(torch.Size(shape).numel() for shape in shapes)
    return Encoders(
        teacher=teacher.requires_grad_(False).eval(),
        student=student,
        teacher_parameters=num_parameters(teacher),
        student_parameters=num_parameters(student),
        trained_shapes=shapes,
        untrained_parameters=num_parameters(model) - trained,
    )


def num_parameters(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def read_config(teacher: str, config_file: Path | None) -> PretrainedConfig:
    """The teacher's shape: from `--teacher-config`, its directory, or the table of published ones. Never the network."""
    directory = Path(teacher).expanduser()
    if config_file is None and directory.is_dir():
        config_file = directory / "config.json"
    if config_file is not None:
        return _config_from_file(config_file)
    if teacher not in KNOWN_TEACHERS:
        raise UserError(
            f"the shape of the teacher {teacher} is not known here, and a plan does not use the network; "
            f"{did_you_mean(teacher, list(KNOWN_TEACHERS))} Otherwise set `teacher:` to its directory, or pass its "
            "config file: --teacher-config config.json"
        )
    return _checked(dict(KNOWN_TEACHERS[teacher]), teacher)


def _config_from_file(path: Path) -> PretrainedConfig:
    try:
        return config_of(path, str(path), "teacher")
    except OSError as error:
        raise UserError(f"{path} is not a readable config.json of a teacher: {error}") from None


def _checked(tree: dict[str, Any], where: str) -> PretrainedConfig:
    model_type = tree.pop("model_type")
    try:
        config = AutoConfig.for_model(model_type, **tree)
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{where}: {' '.join(str(error).split())[:300]}") from None
    architecture_of(config)
    return config


def _on_meta(config: PretrainedConfig) -> PreTrainedModel:
    """The architecture without weights. Families with eager attention only keep it; the others get the rehearsal's."""
    with torch.device("meta"):
        return blank_model(config, config.model_type, attn_implementation=ATTENTION)
