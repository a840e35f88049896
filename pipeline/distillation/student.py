"""The student: built from the teacher's config, initialised, and split into what is trained and what is carried along.

In: the whole teacher in fp32 and a `StudentConfig`. Out: `Student`, with the full Hugging Face model, its tapped part
(same parameters), the trained parameters by Hugging Face name, and fp32 copies of all weights that training never
touches.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import nn
from transformers import AutoModel, PretrainedConfig, PreTrainedModel

from pipeline.distillation.families import Family, family_of
from pipeline.distillation.tap import TappedEncoder, tap
from pipeline.errors import UserError

FREEZABLE = ("embeddings",)


@dataclass
class StudentConfig:
    """Shape and start of the student. What is not named here is the teacher's."""

    layers: int = 6
    hidden: int = 384
    heads: int = 12  # attention heads, not relation heads
    ffn: int | None = None  # None: 4 x hidden
    init: Literal["random", "layers"] = "random"  # layers: copies of teacher layers (same width)
    init_layers: list[int] | None = None  # teacher layers to copy, counted from 1; None: evenly up to the distilled one
    freeze: list[str] = field(default_factory=list)  # "embeddings": the word embedding matrix gets no gradient
    dropout: float | None = None  # None: the teacher's

    def __post_init__(self) -> None:
        for name in ("layers", "hidden", "heads"):
            if getattr(self, name) < 1:
                raise UserError(f"`student.{name}` is {getattr(self, name)}; it must be at least 1")
        if self.hidden % self.heads:
            divisors = ", ".join(str(n) for n in range(1, self.hidden + 1) if self.hidden % n == 0)
            raise UserError(
                f"{self.heads} attention heads do not divide the student's width of {self.hidden}; "
                f"set `student.heads` to one of: {divisors}"
            )
        for part in self.freeze:
            if part not in FREEZABLE:
                raise UserError(f"`student.freeze` names {part!r}; it knows: {', '.join(FREEZABLE)}")
        if self.freeze and self.init == "random":
            raise UserError(
                "`student.freeze: [embeddings]` with `student.init: random` would never train random embeddings"
            )


@dataclass
class Student:
    """A student in training. `trained` and `carried` together are the model's state, by Hugging Face name."""

    model: PreTrainedModel
    tapped: TappedEncoder
    trained: dict[str, nn.Parameter]
    carried: dict[str, torch.Tensor]


def build_student(
    teacher: PreTrainedModel,
    config: StudentConfig,
    seed: int,
    distilled_layer: int | None = None,
    teacher_layer: int | None = None,
) -> Student:
    """Build the student of a whole fp32 teacher. `distilled_layer` is the student's tapped layer, `teacher_layer` the
    teacher's (None: the last of each). Frozen are the word embeddings if `freeze` says so; position embeddings and the
    embedding norm are trained in any case."""
    if teacher.dtype != torch.float32:
        raise ValueError(f"the student is built from fp32 weights, the teacher is in {teacher.dtype}: build it first")
    teacher_layer = teacher_layer or teacher.config.num_hidden_layers
    chosen = copied_layers(teacher.config.num_hidden_layers, config, teacher_layer)
    model = _blank_model(student_hf_config(teacher.config, config, chosen), seed)
    if config.init == "layers":
        _copy_layers(teacher, model, family_of(teacher.config), chosen)
    if "embeddings" in config.freeze:
        model.get_input_embeddings().weight.requires_grad_(False)
    tapped = tap(model, distilled_layer or config.layers)
    return split_student(model, tapped)


def split_student(model: PreTrainedModel, tapped: TappedEncoder) -> Student:
    """Name what is trained (in the tapped part, with a gradient) and copy the rest."""
    in_use = {id(parameter) for parameter in tapped.parameters() if parameter.requires_grad}
    trained = {name: parameter for name, parameter in model.named_parameters() if id(parameter) in in_use}
    carried = {
        name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items() if name not in trained
    }
    return Student(model, tapped, trained, carried)


def copied_layers(num_teacher_layers: int, config: StudentConfig, teacher_layer: int) -> list[int]:
    """Teacher layers that the student's layers start from, counted from 1; the last one is the distilled layer."""
    if config.init_layers is None:
        if config.init != "random" and config.layers > teacher_layer:
            raise UserError(
                f"`student.layers` is {config.layers}, but only {teacher_layer} teacher layers are there to copy "
                "(up to `relations.teacher_layer`); use fewer layers or `student.init: random`"
            )
        return [max(1, round((i + 1) * teacher_layer / config.layers)) for i in range(config.layers)]
    if len(config.init_layers) != config.layers:
        raise UserError(
            f"`student.init_layers` names {len(config.init_layers)} layers for {config.layers} student layers"
        )
    for layer in config.init_layers:
        if not 1 <= layer <= num_teacher_layers:
            raise UserError(
                f"`student.init_layers` names layer {layer}; the teacher has layers 1 to {num_teacher_layers}"
            )
    return config.init_layers


def student_hf_config(teacher: PretrainedConfig, config: StudentConfig, chosen: list[int]) -> PretrainedConfig:
    """The teacher's config, changed: so vocabulary, positions, special ids and norm constants are the teacher's."""
    family = family_of(teacher)
    changed = copy.deepcopy(teacher)
    changed.num_hidden_layers = config.layers
    changed.num_attention_heads = config.heads
    changed.hidden_size = config.hidden
    setattr(changed, family.ffn_key, config.ffn or 4 * config.hidden)
    changed.dtype = torch.float32
    if config.dropout is not None:
        for key in family.dropout_keys:
            setattr(changed, key, config.dropout)
    return changed


def _blank_model(config: PretrainedConfig, seed: int) -> PreTrainedModel:
    """A model with the architecture's own random start; the process's random state is left as it was."""
    pooler = {"add_pooling_layer": False} if family_of(config).has_pooler else {}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return AutoModel.from_config(config, dtype=torch.float32, **pooler)


def _copy_layers(teacher: PreTrainedModel, model: PreTrainedModel, family: Family, chosen: list[int]) -> None:
    """Everything outside the layer list, and the chosen layers in order, from teacher to student."""
    prefix = family.layers + "."
    source = {name: tensor for name, tensor in teacher.state_dict().items() if not name.startswith(prefix)}
    for name, tensor in teacher.state_dict().items():
        if name.startswith(prefix):
            number, _, rest = name[len(prefix) :].partition(".")
            for position in (i for i, layer in enumerate(chosen) if layer == int(number) + 1):
                source[f"{prefix}{position}.{rest}"] = tensor
    own = model.state_dict()
    for name, tensor in own.items():
        if source[name].shape != tensor.shape:
            raise UserError(
                f"`student.init: layers` copies the teacher's weights, but `{name}` is {tuple(source[name].shape)} in "
                f"the teacher and {tuple(tensor.shape)} in the student; use the teacher's hidden, heads and ffn, or "
                "another init"
            )
    model.load_state_dict({name: source[name] for name in own})
