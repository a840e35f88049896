"""A recipe's teacher and student without weights: real modules on torch's `meta` device, which stores shapes only.

In: a recipe and, where the teacher is neither a directory nor a known hub name, its config.json. Out: `Encoders`, cut and
tapped by the code that trains, so that every count is of the modules that will run.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from pipeline.config import Recipe
from pipeline.distillation.models.architectures import check_length
from pipeline.distillation.models.loading import blank_model, config_of, count_parameters
from pipeline.distillation.models.student import recompute_activations, student_hf_config
from pipeline.distillation.models.student_init import copied_layers
from pipeline.distillation.models.vocabulary import cut_config, read_vocabulary
from pipeline.distillation.relations.loss import check_heads
from pipeline.distillation.shared_teacher import layers_of_all, tap_options_of_all
from pipeline.distillation.tail import projection_shape
from pipeline.distillation.tap import TappedEncoder, layer_numbers, tap
from pipeline.errors import UserError, did_you_mean
from pipeline.planning.trace import ATTENTION

ADAM_BYTES = 12  # per trained parameter: fp32 weight and two moments

_ROBERTA = {
    "model_type": "roberta",
    "pad_token_id": 1,
    "vocab_size": 50265,
    "max_position_embeddings": 514,
    "type_vocab_size": 1,
}
_XLM_R = {**_ROBERTA, "model_type": "xlm-roberta", "vocab_size": 250002}
_XLM_R_XL = {**_ROBERTA, "model_type": "xlm-roberta-xl", "vocab_size": 250880}
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
# Published config.json files: the keys that decide shapes.
KNOWN_TEACHERS: dict[str, dict[str, Any]] = {
    "FacebookAI/xlm-roberta-base": {**_XLM_R, **BASE},
    "FacebookAI/xlm-roberta-large": {**_XLM_R, **LARGE},
    "facebook/xlm-roberta-xl": {**_XLM_R_XL, **_shape(36, 2560, 32)},
    "facebook/xlm-roberta-xxl": {**_XLM_R_XL, **_shape(48, 4096, 32)},
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


@dataclass(frozen=True)
class Sizes:
    """Parameters of a run's models."""

    teacher: int  # complete, as it is loaded
    trained: int
    untrained: int  # of the student: in checkpoints and in the export, never in the optimizer

    @property
    def checkpoint_bytes(self) -> int:
        return ADAM_BYTES * self.trained + 4 * self.untrained


@dataclass(frozen=True)
class Encoders:
    """Both models as they run in training, and their sizes."""

    teacher: TappedEncoder
    student: TappedEncoder
    sizes: Sizes

    @property
    def teacher_parameters(self) -> int:
        """Of the cut teacher."""
        return count_parameters(self.teacher)

    @property
    def student_parameters(self) -> int:
        """Of the part of the student that runs in training."""
        return count_parameters(self.student)

    @property
    def trained_parameters(self) -> int:
        return self.sizes.trained

    @property
    def trained_tensors(self) -> int:
        return sum(parameter.requires_grad for parameter in self.student.parameters())


def build_encoders(recipe: Recipe, config: PretrainedConfig | None = None) -> Encoders:
    """Cut and tap both models as training does. `config`: the teacher's, by default that of `read_config`."""
    config, teacher_model, student_model = blank_models(recipe, config)
    check_length(config, recipe.seq_len, recipe.teacher)
    sizes = (count_parameters(teacher_model), count_parameters(student_model))
    relations, options = recipe.relations, recipe.relations.tap_options
    teacher = tap(teacher_model, relations.teacher_taps or config.num_hidden_layers, **options, role="teacher")
    if "embeddings" in recipe.student.freeze:
        student_model.get_input_embeddings().weight.requires_grad_(False)
    if recipe.student.checkpointing:
        student_model.config.use_cache = False  # otherwise transformers warns that recomputation excludes a cache
        recompute_activations(student_model)
    student = tap(student_model.train(), relations.student_taps or recipe.student.layers, **options, role="student")
    check_heads(teacher.widths[0], relations.heads, "teacher", student.widths[0])
    check_heads(student.widths[0], relations.heads, "student", teacher.widths[0])
    trained = sum(parameter.numel() for parameter in student.parameters() if parameter.requires_grad)
    untrained = sizes[1] - trained
    if shape := projection_shape(relations, config.hidden_size, student_model.config.hidden_size):
        trained += math.prod(shape)
    return Encoders(teacher.requires_grad_(False).eval(), student, Sizes(sizes[0], trained, untrained))


def teacher_of_all(recipes: Sequence[Recipe], config: PretrainedConfig) -> TappedEncoder:
    """The teacher of several students: cut above the highest layer that one of them reads, complete for a tail term."""
    _, model, _ = blank_models(recipes[0], config)
    relations = [recipe.relations for recipe in recipes]
    layers = layers_of_all(relations, model.config.num_hidden_layers)
    teacher = tap(model, layers, **tap_options_of_all(relations), role="teacher")
    return teacher.requires_grad_(False).eval()


def blank_models(
    recipe: Recipe, config: PretrainedConfig | None = None
) -> tuple[PretrainedConfig, PreTrainedModel, PreTrainedModel]:
    """The teacher's config, and the complete teacher and student on `meta`.

    Both use the attention of trace.py, unless their architecture has eager attention only.
    """
    config = config or read_config(recipe.teacher)
    if recipe.vocabulary is not None:
        cut_config(config, read_vocabulary(recipe.vocabulary))
    num_layers = config.num_hidden_layers
    taps = recipe.relations.teacher_taps or num_layers
    highest = max(layer_numbers(taps))
    chosen = copied_layers(num_layers, recipe.student.layers, recipe.student.init_layers, highest)
    student_config = student_hf_config(config, recipe.student, chosen)
    with torch.device("meta"):
        teacher = blank_model(config, recipe.teacher, attn_implementation=ATTENTION)
        student = blank_model(student_config, student_config.model_type, "student", ATTENTION)
    return config, teacher, student


def read_config(teacher: str, config_file: Path | None = None) -> PretrainedConfig:
    """The teacher's config from `config_file`, its directory, or the table of published ones. Never uses the network."""
    directory = Path(teacher).expanduser()
    if config_file is None and directory.is_dir():
        config_file = directory / "config.json"
    if config_file is not None:
        try:
            return config_of(config_file, str(config_file), "teacher")
        except OSError as error:
            raise UserError(f"{config_file} is not a readable config.json of a teacher: {error}") from None
    if teacher not in KNOWN_TEACHERS:
        raise UserError(
            f"the shape of the teacher {teacher} is not known here, and a plan does not use the network; "
            f"{did_you_mean(teacher, list(KNOWN_TEACHERS))} Otherwise set `teacher:` to its directory, or pass its "
            "config file: --teacher-config config.json"
        )
    return AutoConfig.for_model(**KNOWN_TEACHERS[teacher])
