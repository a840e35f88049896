"""How one model makes sentence vectors from its output: by mean, cls or last token, and a learned projection behind it.

In: a model's directory or hub name. Out: `SentencePooling`, as its sentence-transformers files say; without these, as the
lineage of an export says; without both, the mean over tokens.
"""

from __future__ import annotations

import hashlib
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from pipeline.distillation.models.model_files import find_directory
from pipeline.distillation.models.sentence_files import (
    DENSE,
    FoundSettings,
    Pooling,
    UnknownSettingsError,
    sentence_settings,
)
from pipeline.distillation.tail import pooling_matrix
from pipeline.errors import UserError
from pipeline.evaluation.training_metadata import training_metadata
from pipeline.runtime.json_files import read_json
from pipeline.runtime.tensor_files import open_tensors

DENSE_FILE, DENSE_WEIGHT, DENSE_BIAS = "model.safetensors", "linear.weight", "linear.bias"
ACTIVATIONS: dict[str, type[torch.nn.Module]] = {"Identity": torch.nn.Identity, "Tanh": torch.nn.Tanh}
APPLIED = {"Transformer", "Pooling", "Dense", "Normalize"}  # modules of sentence-transformers


@dataclass(frozen=True)
class Dense:
    """The Dense module of sentence-transformers: `activation(weight @ vector + bias)`.

    Attributes:
        weight_Ed: fp32
        bias_E: fp32, or None
        activation: a key of `ACTIVATIONS`
    """

    weight_Ed: torch.Tensor
    bias_E: torch.Tensor | None = None
    activation: str = "Identity"

    def __call__(self, vectors_Bd: torch.Tensor) -> torch.Tensor:
        bias_E = None if self.bias_E is None else self.bias_E.to(vectors_Bd)
        return ACTIVATIONS[self.activation]()(
            torch.nn.functional.linear(vectors_Bd, self.weight_Ed.to(vectors_Bd), bias_E)
        )


@dataclass(frozen=True)
class SentencePooling:
    """From hidden states to sentence vectors.

    Attributes:
        pooling: which tokens make the vector
        dense: what is applied to the vector
    """

    pooling: Pooling = "mean"
    dense: Dense | None = None

    @property
    def name(self) -> str:
        """For results and messages: `mean`, `cls`, `last`, also with ` and 2_Dense`."""
        return self.pooling + (f" and {DENSE}" if self.dense else "")

    @property
    def content(self) -> list[str]:
        """What tells it from other ways, for fingerprints; empty for the mean alone."""
        if self.dense is None:
            return [] if self.pooling == MEAN.pooling else [self.pooling]
        bias = [] if self.dense.bias_E is None else [self.dense.bias_E]
        hashes = [hashlib.sha256(part.contiguous().numpy().tobytes()) for part in (self.dense.weight_Ed, *bias)]
        return [self.name, self.dense.activation, *(digest.hexdigest() for digest in hashes)]

    def __call__(self, states_BLD: torch.Tensor, mask_BL: torch.Tensor) -> torch.Tensor:
        """Unit vectors `[B, D]`, or `[B, E]` behind a projection. Rows are padded at their ends."""
        lengths_B1 = mask_BL.sum(dim=1, keepdim=True)
        pool_B1L = pooling_matrix(lengths_B1, mask_BL.shape[1], self.pooling).to(states_BLD)
        vectors_BD = (pool_B1L @ states_BLD).squeeze(1)
        return torch.nn.functional.normalize(self.dense(vectors_BD) if self.dense else vectors_BD, dim=-1)


MEAN = SentencePooling()


def sentence_pooling(model: str) -> SentencePooling:
    """How this model's vectors are made. What is not known, or not applied here, is said in a warning.

    Raises:
        UserError: the model's files about it are corrupt
    """
    made, said = pooling_of(model)
    for text in said:
        print(text, file=sys.stderr, flush=True)
    return made


def pooling_of(model: str) -> tuple[SentencePooling, list[str]]:
    """As `sentence_pooling`; the lines are returned, not printed."""
    try:
        directory = find_directory(model, is_cached=True)
    except UserError:  # a name that is neither a directory nor in the cache: a model that was built in memory
        return MEAN, []
    try:
        found = sentence_settings(model, "auto")
    except UnknownSettingsError as error:
        return MEAN, [f"warning: {error.cause.rstrip('.')}. The figures here are of means over tokens"]
    pooling = found.settings.pooling if found.modules else training_metadata(model).get("pooling") or "mean"
    has_dense = "Dense" in found.modules if found.modules else (directory / DENSE).is_dir()
    dense, cause = None, ""
    try:
        dense = read_dense(directory) if has_dense else None
    except UnknownDenseError as error:
        cause = f" ({error.cause})"
    said = []
    if not_applied := modules_without_effect(found, dense):
        said.append(
            f"warning: {model}: modules that are not applied to the sentence vectors here: {', '.join(not_applied)}{cause}"
        )
    made = SentencePooling(pooling, dense)
    if made != MEAN:
        said.append(f"note: sentence vectors from the output of {model} are made with pooling: {made.name}")
    return made, said


def modules_without_effect(found: FoundSettings, dense: Dense | None) -> list[str]:
    """The kinds of modules that a model lists and that do nothing here. `dense`: what was read of its projection."""
    return sorted({*found.modules} - (APPLIED if dense else APPLIED - {"Dense"}))


class UnknownDenseError(UserError):
    """A Dense module of another form than is known here. `cause` is the message without the fix."""

    def __init__(self, path: Path, cause: str) -> None:
        self.cause = f"{path} {cause}"
        super().__init__(f"the projection of sentence vectors in {self.cause}. To do without it, move {path} away")


def read_dense(directory: Path) -> Dense | None:
    """The projection of a model; None where it has none.

    Raises:
        UnknownDenseError: another activation, or no safetensors file
        UserError: its files are corrupt
    """
    path = directory / DENSE
    if not path.is_dir():
        return None
    activation = str(read_json(path / "config.json").get("activation_function", "")).rpartition(".")[2]
    if activation not in ACTIVATIONS:
        raise UnknownDenseError(
            path, f"has the activation {activation or 'None'}; known here: {', '.join(ACTIVATIONS)}"
        )
    if not (path / DENSE_FILE).is_file():
        raise UnknownDenseError(path, f"has no {DENSE_FILE}, and other files of weights are not read")
    with open_tensors(path / DENSE_FILE) as tensors:
        names = tensors.keys()
        bias_E = tensors.get_tensor(DENSE_BIAS).float() if DENSE_BIAS in names else None
        return Dense(tensors.get_tensor(DENSE_WEIGHT).float(), bias_E, activation)
