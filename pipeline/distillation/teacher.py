"""The teacher: loaded from safetensors, checked, cut above the distilled layer, frozen, in the precision of choice.

In: a directory or hub name. Out: the whole encoder in fp32 (`load_encoder`, which the student is built from) and the
frozen, cut teacher (`load_teacher`). Never in a checkpoint, never in the optimizer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedModel

from pipeline.distillation.families import family_of
from pipeline.distillation.tap import TappedEncoder, tap
from pipeline.errors import UserError


@dataclass
class TeacherConfig:
    """How the teacher runs beside the student."""

    placement: Literal["replicated", "zero3"] = "replicated"  # zero3: its parameters are spread over the ranks
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"  # auto: half precision where the device computes in it
    compile: bool = False  # torch.compile: pays on long runs with a compiler at hand


def load_encoder(name_or_path: str | Path) -> PreTrainedModel:
    """A whole encoder in fp32, without pooler or head, from safetensors only."""
    path = check_files(name_or_path)
    source = str(path if path.is_dir() else name_or_path)
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
        family = family_of(config)
        pooler = {"add_pooling_layer": False} if family.has_pooler else {}
        model, loaded = AutoModel.from_pretrained(
            source,
            config=config,
            dtype=torch.float32,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            **pooler,
        )
    except UserError as error:
        raise UserError(f"teacher {name_or_path}: {error}") from None
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        first_line = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise UserError(
            f"the teacher {name_or_path!r} could not be loaded: {first_line.strip()} A hub name needs the network once "
            "(or `HF_HOME` with a filled cache); a directory needs config.json and *.safetensors"
        ) from None
    _refuse_unsound(model, sorted(loaded["missing_keys"]), str(name_or_path))
    return model.eval()


def check_files(name_or_path: str | Path) -> Path:
    """The teacher's directory if it is one: a missing one and one without safetensors are refused."""
    path = Path(name_or_path).expanduser()
    if not path.is_dir() and looks_like_path(str(name_or_path)):
        raise UserError(
            f"there is no teacher at {name_or_path}. `python -m demo.teacher --output {name_or_path}` makes the "
            "quickstart's (`make demo` does it all); for another one set `teacher:` to a Hugging Face directory or to a "
            "hub name like FacebookAI/xlm-roberta-base"
        )
    if path.is_dir() and not list(path.glob("*.safetensors")):
        raise UserError(
            f"{name_or_path} holds no *.safetensors file. Weights are read from safetensors only; convert others with "
            "`AutoModel.from_pretrained(DIR).save_pretrained(NEW_DIR)` where you trust them"
        )
    return path


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
    tapped = tap(model, last if layer is None else layer, with_output, after_rotary, whose="teacher")
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


def looks_like_path(name: str) -> bool:
    """Hub names are NAME or OWNER/NAME; what starts like a path or names a directory of this repo is a path."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or name.split("/")[0] in ("artifacts", "runs")


def _refuse_unsound(model: PreTrainedModel, missing: list[str], name: str) -> None:
    """Weights that are not in the files would be random; NaN and infinity would be the run's from its first step."""
    if missing:
        raise UserError(
            f"the teacher {name} lacks {len(missing)} of its weights ({', '.join(missing[:3])}, ...): its files are not "
            "complete, or its config.json is another model's"
        )
    for parameter_name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise UserError(
                f"the teacher {name} holds NaN or infinity in `{parameter_name}`: the file is damaged or its training "
                "diverged. Fetch it again or choose another one"
            )
