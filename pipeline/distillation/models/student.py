"""The student: built from the teacher's config, initialised, and split into trained and untrained weights.

In: the complete teacher in fp32, a `StudentConfig`, the recipe's relations. Out: `Student`: the Hugging Face model, its
tapped part (the same parameters), the trained parameters by name, and fp32 copies of all weights that training never
changes. student_init.py and projection.py compute the first weights.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from data_prep.tokenizer_ids import POSITIONS_FROM_PADDING
from pipeline.distillation.config import RelationsConfig
from pipeline.distillation.models.architectures import ARCHITECTURES, architecture_of, usable_positions
from pipeline.distillation.models.loading import blank_model
from pipeline.distillation.models.projection import Calibration, can_project_layers, project_layers
from pipeline.distillation.models.student_init import check_width, copied_layers, copy_layers, project_embeddings
from pipeline.distillation.tap import TappedEncoder, tap
from pipeline.errors import UserError
from pipeline.recipe.ranges import check_ranges

FREEZABLE = ("embeddings",)
BASIS = "projection.basis"  # its name among the untrained weights; it is no weight of the model (runtime/checkpoint.py)
# What a student of another architecture keeps of its teacher's config: everything that belongs to their tokenizer.
TOKENIZER_KEYS = ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id")


@dataclass
class StudentConfig:
    """Shape and first weights of the student. All other config keys are the teacher's."""

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
    compile: bool = False  # torch.compile of each layer, as for the teacher; dropout may draw other masks

    def __post_init__(self) -> None:
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
                "`student.freeze: [embeddings]` with `student.init: random` would leave the embeddings random; "
                "use `init: layers` or `init: project`, or freeze nothing"
            )
        if self.family is not None and self.family not in ARCHITECTURES:
            raise UserError(f"`student.family` is {self.family!r}; known: {', '.join(ARCHITECTURES)}")


@dataclass
class Student:
    """A student in training. `trained` and `untrained` together are the model's state, by Hugging Face name.

    `untrained` holds fp32 copies of all weights that training never changes. A projected student's basis is in it too,
    because a restarted run must not measure it again.
    """

    model: PreTrainedModel
    tapped: TappedEncoder
    trained: dict[str, nn.Parameter]
    untrained: dict[str, torch.Tensor]
    start: str = ""  # description of the first weights, for logs
    matched: list[tuple[int, int]] = field(default_factory=list)  # (teacher's layer, student's layer), from 1
    own_dropout: dict[str, float] = field(default_factory=dict)  # by config key, as without `student.dropout`

    @property
    def basis_Dd(self) -> torch.Tensor | None:
        """The components of the teacher's hidden states on which a projected student's are expressed."""
        return self.untrained.get(BASIS)

    @property
    def frozen(self) -> dict[str, nn.Parameter]:
        """Parameters that the forward uses and training does not change, by Hugging Face name."""
        in_use = {id(parameter) for parameter in self.tapped.parameters() if not parameter.requires_grad}
        return {name: parameter for name, parameter in self.model.named_parameters() if id(parameter) in in_use}


def build_student(
    teacher: PreTrainedModel,
    config: StudentConfig,
    seed: int,
    relations: RelationsConfig | None = None,
    calibration: Calibration | None = None,
) -> Student:
    """Build the student of a complete teacher.

    Word embeddings are frozen if `student.freeze` names them. Position embeddings and their norm are always trained.

    Args:
        teacher: the encoder in fp32.
        config: the student's shape and start.
        seed: of the random start; the process's random state is left as it was.
        relations: which layers are matched and how they are tapped; None: the last layer of each.
        calibration: text on which `init: project` measures the teacher's states. Without it, and in architectures whose
            layers cannot be projected, only the embeddings are projected.

    Raises:
        UserError: the config does not fit the teacher.
    """
    if teacher.dtype != torch.float32:
        raise ValueError(f"the student is built from fp32 weights, the teacher is in {teacher.dtype}: build it first")
    relations = relations or RelationsConfig()
    num_teacher_layers = teacher.config.num_hidden_layers
    teacher_taps = _as_list(relations.teacher_taps or num_teacher_layers)
    student_taps = config.layers if relations.student_taps is None else relations.student_taps
    chosen = copied_layers(num_teacher_layers, config.layers, config.init_layers, max(teacher_taps))
    model = _with_random_start(student_hf_config(teacher.config, config, chosen), seed)
    start, basis_Dd = _set_first_weights(teacher, model, config, chosen, set(_as_list(student_taps)), calibration)
    if "embeddings" in config.freeze:
        model.get_input_embeddings().weight.requires_grad_(False)
    if config.checkpointing:
        recompute_activations(model)
    student = split_student(model, tap(model, student_taps, **relations.tap_options, role="student"))
    student.start = start
    student.matched = list(zip(teacher_taps, student.tapped.layers, strict=True))
    student.own_dropout = dropout_of(student_hf_config(teacher.config, replace(config, dropout=None), chosen))
    if basis_Dd is not None:
        student.untrained[BASIS] = basis_Dd
    return student


def _as_list(layers: int | list[int]) -> list[int]:
    return [layers] if isinstance(layers, int) else list(layers)


def _set_first_weights(
    teacher: PreTrainedModel,
    model: PreTrainedModel,
    config: StudentConfig,
    chosen: list[int],
    student_taps: set[int],
    calibration: Calibration | None,
) -> tuple[str, torch.Tensor | None]:
    """Set the student's weights as `student.init` says: a description, and the basis if layers were projected."""
    architecture, layers = architecture_of(teacher.config), ", ".join(map(str, chosen))
    if config.init == "layers":
        copy_layers(teacher, model, architecture, chosen)
        return f"the teacher's layers {layers}", None
    if config.init == "random":
        return "random", None
    check_width(teacher, model)
    if calibration is not None and can_project_layers(teacher, architecture):
        basis_Dd = project_layers(teacher, model, chosen, student_taps, calibration)
        return f"the teacher's layers {layers} on {config.hidden} principal components of its states", basis_Dd
    project_embeddings(teacher, model)
    return f"the teacher's embeddings alone, on {config.hidden} principal components; layers random", None


def split_student(model: PreTrainedModel, tapped: TappedEncoder) -> Student:
    """List the trained parameters (in the tapped part, with a gradient) and copy the other weights."""
    in_use = {id(parameter) for parameter in tapped.parameters() if parameter.requires_grad}
    trained = {name: parameter for name, parameter in model.named_parameters() if id(parameter) in in_use}
    untrained = {
        name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items() if name not in trained
    }
    return Student(model, tapped, trained, untrained)


def student_hf_config(teacher: PretrainedConfig, config: StudentConfig, chosen: list[int]) -> PretrainedConfig:
    """The student's config: a copy of the teacher's with another shape.

    Vocabulary, positions, special ids and norm constants stay the teacher's. `chosen` names the teacher layer of each
    student layer, from 1.
    """
    if config.family is None or config.family == teacher.model_type:
        changed = copy.deepcopy(teacher)
        if getattr(teacher, "layer_types", None):  # ModernBERT: which layers have full attention, which a window
            numbers = chosen if config.init == "layers" else range(1, config.layers + 1)
            changed.layer_types = [teacher.layer_types[(number - 1) % len(teacher.layer_types)] for number in numbers]
    else:
        changed = _other_architecture(teacher, config, config.family)
    architecture = architecture_of(changed)
    if getattr(changed, "embedding_size", None) == changed.hidden_size:  # ELECTRA, unless it factorises its embedding
        changed.embedding_size = config.hidden
    changed.num_hidden_layers = config.layers
    changed.num_attention_heads = config.heads
    changed.hidden_size = config.hidden
    setattr(changed, architecture.ffn_key, config.ffn or 4 * config.hidden)
    changed.dtype = torch.float32
    if config.dropout is not None:
        for key in architecture.dropout_keys:
            setattr(changed, key, config.dropout)
    return changed


def dropout_of(config: PretrainedConfig) -> dict[str, float]:
    """The encoder's dropout by config key; heads have other keys."""
    return {key: getattr(config, key) for key in architecture_of(config).dropout_keys}


def _other_architecture(teacher: PretrainedConfig, config: StudentConfig, model_type: str) -> PretrainedConfig:
    """The config of another architecture: its defaults, with the teacher's tokenizer and number of positions."""
    if config.init != "random":
        raise UserError(
            f"a {model_type} student of a {teacher.model_type} teacher cannot start from its weights; "
            "set `student.init: random`"
        )
    shared = {key: getattr(teacher, key) for key in TOKENIZER_KEYS if getattr(teacher, key, None) is not None}
    positions = usable_positions(teacher)
    if model_type in POSITIONS_FROM_PADDING:
        positions += shared["pad_token_id"] + 1
    widths = {"hidden_size": config.hidden, "num_attention_heads": config.heads, "num_hidden_layers": config.layers}
    return AutoConfig.for_model(model_type, max_position_embeddings=positions, **shared, **widths)


def _with_random_start(config: PretrainedConfig, seed: int) -> PreTrainedModel:
    """A model with the architecture's own random start; the process's random state is left as it was."""
    with torch.random.fork_rng(devices=[]):  # the CPU's generator alone draws; torch warns if all GPUs' are forked
        torch.default_generator.manual_seed(seed)
        return blank_model(config, f"{config.model_type} of this shape", "student")


def recompute_activations(model: PreTrainedModel) -> None:
    """Switch activation checkpointing on. Raises `UserError` if the architecture does not have it."""
    if not model.supports_gradient_checkpointing:
        raise UserError(f"{model.config.model_type} cannot recompute activations; set `student.checkpointing: false`")
    # transformers renamed it between 5.17 and 5.23
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
