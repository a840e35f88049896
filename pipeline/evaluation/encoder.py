"""Loads a Hugging Face encoder and computes sentence vectors with it.

In: a directory or hub name, and texts. Out: one vector per text and pooling: from the model's output, from the input of
its last layer, and from the attention values of the distilled layer.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence, Sized
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from transformers import PretrainedConfig

from data_prep.command_line import module_command
from data_prep.progress import progress
from data_prep.tokenizer_ids import POSITIONS_FROM_PADDING
from pipeline.distillation.models import loading
from pipeline.distillation.models.architectures import architecture_of, usable_positions
from pipeline.distillation.models.vocabulary import MAP_FILE, read_vocabulary
from pipeline.distillation.tap import tap
from pipeline.errors import UserError
from pipeline.evaluation.model_content import VOCABULARY_FILES, content_of
from pipeline.evaluation.pooling import MEAN, SentencePooling, sentence_pooling
from pipeline.evaluation.training_metadata import training_metadata
from pipeline.runtime import gpus

# The states that a sentence vector is made of -> their title.
POOLINGS = {"output": "output", "last_input": "input of the last layer", "values": "values of the distilled layer"}
_LAYER_SUFFIX = re.compile(r"(.+)@(\d+)")


@dataclass
class Encoder:
    """A loaded model, its tokenizer, and the layer (counted from 1) whose values are pooled."""

    name: str
    model: Any
    tokenizer: Any
    values_layer: int
    path: str  # the name without the layer

    @cached_property
    def pooling(self) -> SentencePooling:
        """How its sentence vectors are made from its output."""
        return sentence_pooling(self.path)

    @cached_property
    def content(self) -> list[str]:
        """What identifies it: hashes of a directory's files; name and commit of a hub model.

        They are read once, because other files may take their place while this model is in memory.
        """
        directory = Path(self.path)
        if directory.is_dir():
            return content_of(directory)
        return [self.path, str(getattr(self.model.config, "_commit_hash", None))]

    @property
    def pad_id(self) -> int:
        """What rows are padded with, masked: the tokenizer's padding; of one without padding the model's, or any id."""
        own = self.tokenizer.pad_token_id
        return own if own is not None else self.model.config.pad_token_id or 0

    @property
    def max_positions(self) -> int:
        """Length of the longest input in tokens."""
        return usable_positions(self.model.config)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def check_max_length(self, length: int, setting: str) -> None:
        """Check the number of tokens that `setting` (TASK.KEY) asks for.

        Warns where the model was trained on fewer tokens and its further positions are random.

        Raises:
            UserError: the model has fewer positions
        """
        if length > self.max_positions:
            raise UserError(
                f"{self.name} accepts at most {self.max_positions} tokens, {setting} is {length}. "
                f"Set it lower: --set {setting}={self.max_positions}"
            )
        longest = training_metadata(self.path).get("longest")
        if longest is not None and length > longest:
            print(
                f"warning: {self.name} was trained from random weights on rows of {longest} tokens, {setting} is {length}: "
                f"longer texts use position embeddings that were not trained. Cut them: --set {setting}={longest}",
                file=sys.stderr,
                flush=True,
            )


def load_encoder(name: str, values_layer: int | None = None) -> Encoder:
    """Load a model and its tokenizer.

    Args:
        name: `DIR_OR_HUB_NAME` or `DIR_OR_HUB_NAME@LAYER`
        values_layer: the layer whose values are pooled. Without one it is the layer in `name`, else the distilled layer
            that the model's lineage names, else the last layer

    Raises:
        UserError: the model or its tokenizer cannot be loaded, or do not belong together
    """
    path, named_layer = split_name(name)
    if path.startswith("~"):
        path = os.path.expanduser(path)  # noqa: PTH111 (Path's raises where ~USER does not exist)
    model = loading.load_encoder(path, role="model")
    tokenizer = _load_tokenizer(path)
    check_same_tokenizer(path, tokenizer, model.config)
    num_layers = model.config.num_hidden_layers
    layer = values_layer or named_layer or training_metadata(path).get("student_layer") or num_layers
    if not 1 <= layer <= num_layers:
        raise UserError(f"{path} has layers 1 to {num_layers}, so it has no layer {layer}. Name another: MODEL@LAYER")
    device = "cuda" if gpus.available() else "cpu"  # of several ranks, each has chosen its own
    return Encoder(name, cast(Any, model).to(device), tokenizer, layer, path)


def split_name(name: str) -> tuple[str, int | None]:
    """`DIR_OR_HUB_NAME@LAYER` in its two parts."""
    if not Path(name).exists() and (match := _LAYER_SUFFIX.fullmatch(name)):
        return match[1], int(match[2])
    return name, None


def _load_tokenizer(path: str) -> Any:
    directory = Path(path).expanduser()
    has_files = any(found for pattern in VOCABULARY_FILES for found in directory.glob(pattern))
    if directory.is_dir() and not has_files:  # transformers would make a tokenizer without vocabulary, without an error
        raise UserError(
            f"{path} has a model but no tokenizer (none of {', '.join(VOCABULARY_FILES)}). "
            "Copy the tokenizer files of its teacher into this directory."
        )
    return loading.load_tokenizer(directory if directory.is_dir() else path)


def check_same_tokenizer(path: str, tokenizer: Any, config: PretrainedConfig) -> None:
    """Raise a `UserError` where the ids of this tokenizer are not those of this model.

    Sizes may differ: multilingual-e5 has 250 037 embeddings for 250 002 pieces. Padding ids must be equal only where the
    model counts positions from them: a BERT body with XLM-R's tokenizer (e5-small) works with padding ids 0 and 1.
    """
    problem = ""
    if len(tokenizer) > config.vocab_size:
        problem = f"the tokenizer has {len(tokenizer)} pieces, the model only {config.vocab_size} embeddings"
    pads = (tokenizer.pad_token_id, config.pad_token_id)
    if config.model_type in POSITIONS_FROM_PADDING and None not in pads and pads[0] != pads[1]:
        problem = f"padding is id {pads[0]} of the tokenizer and id {pads[1]} of the model"
    kept = Path(path) / MAP_FILE
    if kept.is_file():
        size = len(read_vocabulary(path))
        if not size == len(tokenizer) == config.vocab_size:
            problem = f"{MAP_FILE} keeps {size} pieces, the tokenizer has {len(tokenizer)}, the model {config.vocab_size} embeddings"
    if problem:
        raise UserError(
            f"{path}: {problem}, so they do not belong together. Copy the model's own tokenizer files into the directory (for a cut vocabulary: "
            f"make the model with `{module_command('pipeline', 'trim')}`)."
        )


@torch.inference_mode()
def sentence_vectors(
    encoder: Encoder, texts: list[str], max_length: int, batch_size: int
) -> tuple[dict[str, torch.Tensor], int]:
    """Sentence vectors: of the output as the model makes them, of the other states means over the tokens of each text.

    Returns:
        pooling -> unit vectors `[text, width]` in the order of `texts`; and the number of tokens in all texts
    """
    ids = encoder.tokenizer(texts, truncation=True, max_length=max_length)["input_ids"]
    batches = batches_by_length(ids, batch_size)
    vectors: dict[str, list[torch.Tensor]] = {pooling: [] for pooling in POOLINGS}
    last_inputs: list[torch.Tensor] = []
    tapped = tap(encoder.model, layer=encoder.values_layer, with_output=True)
    last_layer = cast(torch.nn.ModuleList, tapped.model.get_submodule(architecture_of(encoder.model.config).layers))[-1]
    # The context manager removes the hook also after an error: the layer is the model's own, and later tasks use it.
    with last_layer.register_forward_pre_hook(lambda module, arguments: last_inputs.append(arguments[0])):
        for batch in progress(batches, f"encoding with {encoder.name}", "batch"):
            input_ids_BL, mask_BL = pad_rows([ids[i] for i in batch], encoder.pad_id, encoder.device)
            (_, _, values_BLD), output_BLD = tapped(input_ids_BL, mask_BL)
            vectors["output"].append(encoder.pooling(output_BLD, mask_BL).cpu())
            for pooling, states_BLD in (("last_input", last_inputs.pop()), ("values", values_BLD)):
                vectors[pooling].append(MEAN(states_BLD, mask_BL).cpu())
    back = torch.argsort(torch.tensor([number for batch in batches for number in batch]))
    return {pooling: torch.cat(parts)[back] for pooling, parts in vectors.items()}, sum(map(len, ids))


def batches_by_length(rows: Sequence[Sized], size: int) -> list[list[int]]:
    """All row numbers in batches of similar length, which need little padding."""
    order = sorted(range(len(rows)), key=lambda number: len(rows[number]))
    return [order[start : start + size] for start in range(0, len(order), size)]


def pad_rows(rows: list[list[int]], pad_id: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask, both int64 `[B, L]`, padded to the longest row.

    Of a tokenizer without special tokens, all texts of a batch may be empty rows: L is at least 1.
    """
    longest = max(1, *map(len, rows))
    input_ids = torch.tensor([row + [pad_id] * (longest - len(row)) for row in rows], device=device)
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows], device=device)
    return input_ids, mask
