"""The student: built from the teacher's config, initialised, and split into trained and untrained weights.

In: the complete teacher in fp32, a `StudentConfig`, the recipe's relations. Out: `Student`: the Hugging Face model, its
tapped part (the same parameters), the trained parameters by name, and fp32 copies of all weights that training never
changes. student_init.py and projection.py compute the first weights, or read them from another encoder.
"""

from __future__ import annotations

import contextlib
import copy
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from data_prep.tokenizer_ids import POSITIONS_FROM_PADDING
from pipeline.distillation.config import RelationsConfig
from pipeline.distillation.models.architectures import ARCHITECTURES, architecture_of, usable_positions
from pipeline.distillation.models.loading import blank_model, load_encoder
from pipeline.distillation.models.projection import Calibration, can_project_layers, project_layers
from pipeline.distillation.models.student_init import (
    START_ENCODER,
    check_start_shape,
    check_width,
    copied_layers,
    copy_layers,
    project_embeddings,
)
from pipeline.distillation.tail import SentenceProjection, sentence_projection
from pipeline.distillation.tap import TappedEncoder, layer_numbers, tap
from pipeline.errors import UserError, did_you_mean
from pipeline.recipe.ranges import check_ranges
from pipeline.recipe.text import shown

STARTS = ("random", "layers", "project")  # `student.init`; everything else that it can be names an encoder

FREEZABLE = ("embeddings",)
# Names in checkpoints of what is no weight of the model (runtime/checkpoint.py): untrained, and trained.
BASIS, SENTENCE_PROJECTION = "projection.basis", "projection.sentence"
# What a student of another architecture keeps of its teacher's config: everything that belongs to their tokenizer.
TOKENIZER_KEYS = ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id")


@dataclass
class StudentConfig:
    """Shape and first weights of the student. All other config keys are the teacher's."""

    layers: int = 6  # the last one is the tap
    hidden: int = 384  # width
    heads: int = 12  # attention heads, not relation heads
    ffn: int | None = None  # None: 4 x hidden
    family: str | None = None  # None: the teacher's; another model type needs `init: random` or an encoder of that type
    init: str = "random"  # layers: copied from the teacher; project: made narrower; else an encoder: DIR or hub name
    init_layers: list[int] | None = None  # teacher layers to start from, from 1; None: evenly up to the distilled one
    freeze: list[str] = field(default_factory=list)  # "embeddings": the word embedding matrix gets no gradient
    dropout: float | None = None  # None: the teacher's; of a student that starts from another encoder: that encoder's
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
        self.init = _named_start(self.init)
        if self.init_layers is not None and self.start_encoder is not None:
            raise UserError(
                f"`student.init_layers` names layers of the teacher, and `student.init` is {shown(self.init)}, whose layers "
                "are all copied; set `student.init_layers: null`, or `student.init: layers`"
            )
        for part in self.freeze:
            if part not in FREEZABLE:
                raise UserError(f"`student.freeze` names {part!r}; it knows: {', '.join(FREEZABLE)}")
        if self.freeze and self.init == "random":
            raise UserError(
                "`student.freeze: [embeddings]` with `student.init: random` would leave the embeddings random; "
                "use `init: layers`, `init: project` or another encoder, or freeze nothing"
            )
        if self.family is not None and self.family not in ARCHITECTURES:
            raise UserError(f"`student.family` is {self.family!r}; known: {', '.join(ARCHITECTURES)}")

    @property
    def start_encoder(self) -> str | None:
        """Directory or hub name of the encoder that the student starts from; None: it starts from the teacher or at random."""
        return None if self.init in STARTS else self.init


def _named_start(init: str) -> str:
    """`student.init`, checked: one of `STARTS`, or a directory or hub name with a slash in it.

    A directory without a slash gets one, because the recipe of a run is also read where that directory does not exist.
    """
    if init in STARTS or "/" in init:
        return init
    with contextlib.suppress(OSError, RuntimeError):  # too long a name; ~ of a user that does not exist
        directory = Path(init).expanduser()
        if init and directory.is_dir():
            return str(directory) if "/" in str(directory) else f"./{directory}"
    raise UserError(
        f"`student.init` is {shown(repr(init))}; it must be one of {', '.join(STARTS)}, or an encoder: a directory that exists, "
        f"or a hub name (OWNER/NAME). {did_you_mean(init, STARTS).capitalize()}"
    )


@dataclass
class Student:
    """A student in training. `trained` and `untrained` together are the model's state, by Hugging Face name, and what belongs to
    the loss: a projected student's basis, and the projection of sentence vectors.

    `untrained` holds fp32 copies of all weights that training never changes. A projected student's basis is in it too,
    because a restarted run must not measure it again.
    """

    model: PreTrainedModel
    tapped: TappedEncoder
    trained: dict[str, nn.Parameter]
    untrained: dict[str, torch.Tensor]
    start: str = ""  # description of the first weights, for logs
    start_hashes: dict[str, str] = field(
        default_factory=dict
    )  # of the encoder that it starts from, if it is not the teacher
    matched: list[tuple[int, int]] = field(default_factory=list)  # (teacher's layer, student's layer), from 1
    trained_length: int | None = None  # tokens after which its positions stay untrained; None: they began trained
    own_dropout: dict[str, float] = field(default_factory=dict)  # by config key, as without `student.dropout`
    projection: SentenceProjection | None = None  # of sentence vectors to the teacher's width

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
    teacher_taps = layer_numbers(relations.teacher_taps or num_teacher_layers)
    student_taps = config.layers if relations.student_taps is None else relations.student_taps
    chosen = copied_layers(num_teacher_layers, config.layers, config.init_layers, max(teacher_taps))
    own_config = student_hf_config(teacher.config, replace(config, dropout=None), chosen)
    if config.start_encoder is None:
        model = _with_random_start(_with_dropout(own_config, config.dropout), seed)
        start, basis_Dd = _set_first_weights(
            teacher, model, config, chosen, set(layer_numbers(student_taps)), calibration
        )
    else:
        encoder = load_encoder(config.start_encoder, START_ENCODER)
        check_start_shape(config.start_encoder, encoder.config, own_config)
        own_config = encoder.config  # its activation and norm constants are not always the teacher's
        model = _with_random_start(_with_dropout(own_config, config.dropout), seed)
        model.load_state_dict(encoder.state_dict())
        start, basis_Dd = f"the encoder {config.start_encoder}", None
    if "embeddings" in config.freeze:
        model.get_input_embeddings().weight.requires_grad_(False)
    if config.checkpointing:
        recompute_activations(model)
    student = split_student(model, tap(model, student_taps, **relations.tap_options, role="student"))
    student.start = start
    student.matched = list(zip(teacher_taps, student.tapped.layers, strict=True))
    student.own_dropout = dropout_of(own_config)
    if basis_Dd is not None:
        student.untrained[BASIS] = basis_Dd
    widths = (teacher.config.hidden_size, model.config.hidden_size)
    student.projection = sentence_projection(relations, widths, seed, basis_Dd)
    if student.projection is not None:
        student.trained[SENTENCE_PROJECTION] = student.projection.weight
    return student


def _set_first_weights(
    teacher: PreTrainedModel,
    model: PreTrainedModel,
    config: StudentConfig,
    chosen: list[int],
    student_taps: set[int],
    calibration: Calibration | None,
) -> tuple[str, torch.Tensor | None]:
    """Set the student's weights from the teacher's as `student.init` says: a description, and the basis if layers were
    projected."""
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
    return _with_dropout(changed, config.dropout)


def _with_dropout(config: PretrainedConfig, dropout: float | None) -> PretrainedConfig:
    """A copy with this dropout in the encoder; with its own where `dropout` is None."""
    changed = copy.deepcopy(config)
    for key in architecture_of(config).dropout_keys if dropout is not None else ():
        setattr(changed, key, dropout)
    return changed


def dropout_of(config: PretrainedConfig) -> dict[str, float]:
    """The encoder's dropout by config key; heads have other keys."""
    return {key: getattr(config, key) for key in architecture_of(config).dropout_keys}


def _other_architecture(teacher: PretrainedConfig, config: StudentConfig, model_type: str) -> PretrainedConfig:
    """The config of another architecture: its defaults, with the teacher's tokenizer and number of positions."""
    if config.init not in ("random", config.start_encoder):
        raise UserError(
            f"a {model_type} student of a {teacher.model_type} teacher cannot start from its weights; "
            f"set `student.init: random`, or `student.init` to a {model_type} encoder"
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
