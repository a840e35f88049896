"""The teacher: loaded and checked (loading.py), cut above the distilled layer, frozen, in the precision of choice.

In: the whole encoder in fp32 (`load_encoder` of a directory or hub name), which the student is built from. Out: the
frozen, cut teacher (`load_teacher`). Never in a checkpoint, never in the optimizer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from pipeline.distillation.models.loading import load_encoder
from pipeline.distillation.tap import TappedEncoder, tap
from pipeline.errors import UserError

__all__ = ["FrozenTeacher", "TeacherConfig", "cast_parameters", "check_vocabulary", "load_encoder", "load_teacher"]


@dataclass
class TeacherConfig:
    """How the teacher runs beside the student."""

    placement: Literal["replicated", "zero3"] = "replicated"  # zero3: its parameters are spread over the ranks
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"  # auto: half precision where the device computes in it
    compile: bool = False  # torch.compile: pays on long runs with a compiler at hand


def load_teacher(
    model: PreTrainedModel,
    layer: int | Sequence[int] | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    with_output: bool = False,
    after_rotary: bool = False,
) -> FrozenTeacher:
    """The frozen teacher cut above `layer` (None: the last). It takes `model` over: parameters are converted in place,
    so build the student first. Dropping `model` afterwards frees the layers above the cut."""
    last = model.config.num_hidden_layers
    tapped = tap(model, last if layer is None else layer, with_output, after_rotary, role="teacher")
    return FrozenTeacher(cast_parameters(tapped.requires_grad_(False), dtype).to(device))


def cast_parameters(module: nn.Module, dtype: torch.dtype):
    """The module with its parameters in `dtype` and its buffers as they were: ModernBERT's rotary frequencies in bf16
    would turn position 512 by up to .5 radians too far or not far enough, and position 8192 by 8."""
    for parameter in module.parameters():
        parameter.data = parameter.data.to(dtype)
    return module


class FrozenTeacher(nn.Module):
    """A tapped encoder that is always in eval mode and never records a graph. Same call as the tap."""

    def __init__(self, tapped: TappedEncoder) -> None:
        super().__init__()
        self.tapped = tapped.eval()

    @property
    def widths(self) -> list[int]:
        """Channels of Q for each tapped layer."""
        return self.tapped.widths

    def train(self, mode: bool = True) -> FrozenTeacher:
        return super().train(False)

    def compile(self, *arguments, **keywords) -> None:
        """Compile the encoder alone: tracing Hugging Face's buffers under inference mode fails inside a graph."""
        self.tapped.compile(*arguments, **keywords)

    def forward(self, input_ids_BL: torch.Tensor, attention_mask: torch.Tensor | None = None):
        with torch.inference_mode():
            return self.tapped(input_ids_BL, attention_mask)


def check_vocabulary(model: PreTrainedModel, vocabulary_size: int, shards: str | Path) -> None:
    """A `UserError` where the shards' tokenizer has ids that the model's embedding does not."""
    rows = cast(nn.Embedding, model.get_input_embeddings()).num_embeddings
    if rows < vocabulary_size:
        raise UserError(
            f"the shards in {shards} use a vocabulary of {vocabulary_size} ids, the model's embedding has {rows} rows. "
            "Prepare the text with this model's own tokenizer (`python -m data_prep prepare --tokenizer DIR`), or choose "
            "the teacher that the shards were made for"
        )
