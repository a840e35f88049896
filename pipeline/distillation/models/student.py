"""The student: built from the teacher's config, initialised, and split into what is trained and what is carried along.

In: the whole teacher in fp32 and a `StudentConfig`. Out: `Student`, with the full Hugging Face model, its tapped part
(same parameters), the trained parameters by Hugging Face name, and fp32 copies of all weights that training never
touches. How weights start is `student_init.py`.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel

from pipeline.distillation.models.architectures import (
    ARCHITECTURES,
    POSITIONS_AFTER_PADDING,
    architecture_of,
    usable_positions,
)
from pipeline.distillation.models.projection import Calibration, can_project_layers, project_layers
from pipeline.distillation.models.student_init import check_width, copied_layers, copy_layers, project_embeddings
from pipeline.distillation.tap import TappedEncoder, tap
from pipeline.errors import UserError
from pipeline.recipe.ranges import check_ranges

FREEZABLE = ("embeddings",)
BASIS = "projection.basis"  # its name among what is carried along: no weight of the model (runtime/checkpoint.py)
# What a student of another family than its teacher keeps: whatever belongs to the tokenizer they share.
TOKENIZER_KEYS = ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id")


@dataclass
class StudentConfig:
    """Shape and start of the student. What is not named here is the teacher's."""

    layers: int = 6  # the last one is the tap
    hidden: int = 384  # width
    heads: int = 12  # attention heads, not relation heads
    ffn: int | None = None  # None: 4 x hidden
    family: str | None = None  # None: the teacher's; another model type needs `init: random`
    init: Literal["random", "layers", "project"] = "random"  # layers: copied from the teacher; project: made narrower
    init_layers: list[int] | None = None  # teacher layers to start from, from 1; None: evenly up to the distilled one
    freeze: list[str] = field(default_factory=list)  # "embeddings": the word embedding matrix gets no gradient
    dropout: float | None = None  # None: the teacher's
    checkpointing: bool = False  # recompute activations in backward: less memory, a third more work

    def __post_init__(self) -> None:
        for name in ("layers", "hidden", "heads"):
            if getattr(self, name) < 1:
                raise UserError(f"`student.{name}` is {getattr(self, name)}; it must be at least 1")
        check_ranges(
            self,
            "student",
            {
                "layers": (1, 1024),
                "hidden": (1, 2**16),
                "heads": (1, 2**16),
                "ffn": (1, 2**18),
                "dropout": (0, 1),
                "init_layers": (1, 1024),
            },
        )
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
                "`student.freeze: [embeddings]` with `student.init: random` would leave the embeddings random for ever; "
                "use `init: layers` or `init: project`, or freeze nothing"
            )
        if self.family is not None and self.family not in ARCHITECTURES:
            raise UserError(f"`student.family` is {self.family!r}; known: {', '.join(ARCHITECTURES)}")


@dataclass
class Student:
    """A student in training. `trained` and `carried` together are the model's state, by Hugging Face name; a projected
    student also carries its basis, which a later life of the run must not measure anew."""

    model: PreTrainedModel
    tapped: TappedEncoder
    trained: dict[str, nn.Parameter]
    untrained: dict[str, torch.Tensor]
    start: str = ""  # in words, for people
    matched: list[tuple[int, int]] = field(default_factory=list)  # (teacher's layer, student's layer), from 1
    own_dropout: dict[str, float] = field(default_factory=dict)  # by config key, as without `student.dropout`

    @property
    def basis_Dd(self) -> torch.Tensor | None:
        """On which components of the teacher's hidden states a projected student's stand."""
        return self.untrained.get(BASIS)

    @property
    def frozen(self) -> dict[str, nn.Parameter]:
        """What the forward uses and training leaves alone, by Hugging Face name."""
        in_use = {id(parameter) for parameter in self.tapped.parameters() if not parameter.requires_grad}
        return {name: parameter for name, parameter in self.model.named_parameters() if id(parameter) in in_use}


def build_student(
    teacher: PreTrainedModel,
    config: StudentConfig,
    seed: int,
    distilled_layer: int | Sequence[int] | None = None,
    teacher_layer: int | Sequence[int] | None = None,
    with_output: bool = False,
    after_rotary: bool = False,
    calibration: Calibration | None = None,
) -> Student:
    """Build the student of a whole fp32 teacher. `distilled_layer` is the student's tapped layer (or list of layers),
    `teacher_layer` the teacher's (None: the last of each); `with_output` and `after_rotary` are `tap`'s.

    `init: project` needs `calibration` to project layers; without it, and in families whose layers are of another kind,
    it projects the embeddings alone.

    Frozen are the word embeddings if `freeze` says so; position embeddings and the embedding norm are always trained.
    """
    if teacher.dtype != torch.float32:
        raise ValueError(f"the student is built from fp32 weights, the teacher is in {teacher.dtype}: build it first")
    highest = max([teacher_layer] if isinstance(teacher_layer, int) else teacher_layer or [0])
    num_teacher_layers = teacher.config.num_hidden_layers
    chosen = copied_layers(num_teacher_layers, config.layers, config.init_layers, highest or num_teacher_layers)
    model = _blank_model(student_hf_config(teacher.config, config, chosen), seed)
    family, basis_Dd = architecture_of(teacher.config), None
    tapped_layer = config.layers if distilled_layer is None else distilled_layer
    start, layers = "random", ", ".join(map(str, chosen))
    if config.init == "layers":
        start = f"the teacher's layers {layers}"
        copy_layers(teacher, model, family, chosen)
    elif config.init == "project":
        check_width(teacher, model)
        if calibration is not None and can_project_layers(teacher, family):
            tapped_layers = {tapped_layer} if isinstance(tapped_layer, int) else set(tapped_layer)
            basis_Dd = project_layers(teacher, model, family, chosen, tapped_layers, calibration)
            start = f"the teacher's layers {layers} on {config.hidden} principal components of its states"
        else:
            start = f"the teacher's embeddings alone, on {config.hidden} principal components; layers random"
            project_embeddings(teacher, model)
    if "embeddings" in config.freeze:
        model.get_input_embeddings().weight.requires_grad_(False)
    if config.checkpointing:
        recompute_activations(model)
    student = split_student(model, tap(model, tapped_layer, with_output, after_rotary, role="student"))
    student.start = start
    of_teacher = teacher_layer or num_teacher_layers
    teacher_taps = [of_teacher] if isinstance(of_teacher, int) else list(of_teacher)
    student.matched = list(zip(teacher_taps, student.tapped.layers, strict=True))
    as_teacher = student_hf_config(teacher.config, replace(config, dropout=None), chosen)
    student.own_dropout = dropout_of(as_teacher)
    if basis_Dd is not None:
        student.untrained[BASIS] = basis_Dd
    return student


def split_student(model: PreTrainedModel, tapped: TappedEncoder) -> Student:
    """Name what is trained (in the tapped part, with a gradient) and copy the rest."""
    in_use = {id(parameter) for parameter in tapped.parameters() if parameter.requires_grad}
    trained = {name: parameter for name, parameter in model.named_parameters() if id(parameter) in in_use}
    untrained = {
        name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items() if name not in trained
    }
    return Student(model, tapped, trained, untrained)


def student_hf_config(teacher: PretrainedConfig, config: StudentConfig, chosen: list[int]) -> PretrainedConfig:
    """The teacher's config, changed: so vocabulary, positions, special ids and norm constants are the teacher's."""
    if config.family is None or config.family == teacher.model_type:
        changed = copy.deepcopy(teacher)
        if getattr(teacher, "layer_types", None):  # ModernBERT: which layers see everything, which a window
            numbers = chosen if config.init == "layers" else range(1, config.layers + 1)
            changed.layer_types = [teacher.layer_types[(number - 1) % len(teacher.layer_types)] for number in numbers]
    else:
        changed = _other_architecture(teacher, config, config.family)
    family = architecture_of(changed)
    if getattr(changed, "embedding_size", None) == changed.hidden_size:  # ELECTRA, unless it factorises its embedding
        changed.embedding_size = config.hidden
    changed.num_hidden_layers = config.layers
    changed.num_attention_heads = config.heads
    changed.hidden_size = config.hidden
    setattr(changed, family.ffn_key, config.ffn or 4 * config.hidden)
    changed.dtype = torch.float32
    if config.dropout is not None:
        for key in family.dropout_keys:
            setattr(changed, key, config.dropout)
    return changed


def dropout_of(config: PretrainedConfig) -> dict[str, float]:
    """What the body's dropout is, by config key; heads have keys of their own."""
    return {key: getattr(config, key) for key in architecture_of(config).dropout_keys}


def _other_architecture(teacher: PretrainedConfig, config: StudentConfig, model_type: str) -> PretrainedConfig:
    """Another architecture's defaults with the teacher's tokenizer and number of positions."""
    if config.init != "random":
        raise UserError(
            f"a {model_type} student of a {teacher.model_type} teacher cannot start from its weights; "
            "set `student.init: random`"
        )
    shared = {key: getattr(teacher, key) for key in TOKENIZER_KEYS if getattr(teacher, key, None) is not None}
    positions = usable_positions(teacher)
    if model_type in POSITIONS_AFTER_PADDING:
        positions += shared["pad_token_id"] + 1
    widths = {"hidden_size": config.hidden, "num_attention_heads": config.heads, "num_hidden_layers": config.layers}
    return AutoConfig.for_model(model_type, max_position_embeddings=positions, **shared, **widths)


def _blank_model(config: PretrainedConfig, seed: int) -> PreTrainedModel:
    """A model with the architecture's own random start; the process's random state is left as it was."""
    pooler = {"add_pooling_layer": False} if architecture_of(config).has_pooler else {}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return AutoModel.from_config(config, dtype=torch.float32, **pooler)


def recompute_activations(model: PreTrainedModel) -> None:
    if not model.supports_gradient_checkpointing:
        raise UserError(f"{model.config.model_type} cannot recompute activations; set `student.checkpointing: false`")
    # transformers renamed it between 5.17 and 5.23
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
