"""The teacher: a loaded encoder, cut above the distilled layer, frozen, in the chosen precision.

In: the complete encoder in fp32 (`load_encoder`), from which the student is built first. Out: the frozen, cut teacher
(`load_teacher`). It is never in a checkpoint and never in the optimizer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from data_prep.command_line import module_command
from pipeline.distillation.documents import Documents
from pipeline.distillation.models.loading import load_encoder
from pipeline.distillation.tap import TappedEncoder, tap
from pipeline.errors import UserError

__all__ = ["FrozenTeacher", "TeacherConfig", "cast_parameters", "check_vocabulary", "load_encoder", "load_teacher"]


@dataclass
class TeacherConfig:
    """How the teacher runs."""

    placement: Literal["replicated", "zero3"] = "replicated"  # zero3: its parameters are partitioned over the ranks
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"  # auto: half precision where the device computes in it
    compile: bool = False  # torch.compile of each layer: fewer kernels, a slower start; requires a compiler


def load_teacher(
    model: PreTrainedModel,
    layer: int | Sequence[int] | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    with_output: bool = False,
    after_rotary: bool = False,
) -> FrozenTeacher:
    """The frozen teacher, cut above its highest tapped layer.

    `model` is converted in place, so build the student first. Deleting `model` afterwards frees the layers above the cut.
    `layer` (None: the last), `with_output` and `after_rotary` are those of `tap`; `dtype` is that of the parameters.
    """
    last = model.config.num_hidden_layers
    tapped = tap(model, last if layer is None else layer, with_output, after_rotary, role="teacher")
    return FrozenTeacher(cast_parameters(tapped.requires_grad_(False), dtype).to(device))


def cast_parameters(module: nn.Module, dtype: torch.dtype):
    """Convert the module's parameters, in place, but not its buffers: ModernBERT's rotary frequencies in bf16 would rotate
    position 512 by up to 0.5 radians too much or too little, and position 8192 by 8."""
    for parameter in module.parameters():
        parameter.data = parameter.data.to(dtype)
    return module


class FrozenTeacher(nn.Module):
    """A tapped encoder that is always in eval mode and never records a graph, with the call of `tap`."""

    def __init__(self, tapped: TappedEncoder) -> None:
        super().__init__()
        self.tapped = tapped.eval()

    @property
    def widths(self) -> list[int]:
        """Channels of Q for each tapped layer."""
        return self.tapped.widths

    def train(self, mode: bool = True) -> FrozenTeacher:
        return super().train(False)

    def forward(self, input_ids_BL: torch.Tensor, attention_mask: torch.Tensor | Documents | None = None):
        with torch.inference_mode():
            return self.tapped(input_ids_BL, attention_mask)


def check_vocabulary(model: PreTrainedModel, vocabulary_size: int, shards: str | Path) -> None:
    """Raise a `UserError` if the shards' tokenizer has ids for which the model's embedding has no row."""
    rows = cast(nn.Embedding, model.get_input_embeddings()).num_embeddings
    if rows < vocabulary_size:
        raise UserError(
            f"the shards in {shards} use a vocabulary of {vocabulary_size} ids, the model's embedding has {rows} rows. "
            f"Prepare the text with this model's own tokenizer (`{module_command('data_prep', 'prepare', '--tokenizer', 'DIR')}`), or choose "
            "the teacher that the shards were made for"
        )
