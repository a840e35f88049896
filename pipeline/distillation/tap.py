"""`tap(hf_model, layer)` returns a module that computes Q, K and V of chosen layers and runs nothing above the last one.

The module is a copy of the model's skeleton that shares every parameter. Its layer list ends at `layer`, which is
replaced by its Q, K, V projections and the norm in front of them. The architecture's own forward does the rest, so
masks, positions and rotary embeddings are Hugging Face's. Packed rows without padding need no mask. Several documents of a row
are kept apart by `Documents`.

Shape suffixes: B rows, L positions, D channels, H attention heads, d channels per head.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from operator import attrgetter
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.models.modernbert.modeling_modernbert import apply_rotary_pos_emb

from pipeline.distillation.documents import Documents
from pipeline.distillation.models.architectures import (
    ArchitectureSpec,
    architecture_of,
    check_documents,
    first_position,
    window_of,
)
from pipeline.errors import UserError

Projections = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def tap(
    hf_model: PreTrainedModel,
    layer: int | Sequence[int],
    with_output: bool = False,
    after_rotary: bool = False,
    role: str | None = None,
) -> TappedEncoder:
    """Module `(input_ids, attention_mask=None) -> (q_BLD, k_BLD, v_BLD)` of one layer or of several.

    Args:
        hf_model: an encoder of a known architecture; the module shares its parameters.
        layer: counted from 1. A list of layers gives a list of triples, in the list's order.
        with_output: run all layers and return the last hidden state too: `(projections, hidden_BLD)`.
        after_rotary: Q and K with their rotary position embedding (ModernBERT), not as the projections return them.
        role: "teacher" or "student", for the message about a layer that does not exist.

    Raises:
        UserError: the architecture is unknown, a layer does not exist, or there is no rotary embedding.
    """
    return TappedEncoder(hf_model, layer, with_output, after_rotary, role)


@contextmanager
def without_dropout(module: nn.Module) -> Iterator[None]:
    """Context with the module in evaluation mode. Afterwards every submodule has its own former mode.

    A tap shares its layers with the model that was tapped, so setting one mode for all of them could switch dropout on
    in a model that is being evaluated.
    """
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


def layer_numbers(layer: int | Sequence[int]) -> list[int]:
    """The layer or layers that a tap reads, as a list."""
    return [layer] if isinstance(layer, int) else list(layer)


class TappedEncoder(nn.Module):
    """See `tap`. `model` is the cut skeleton; its parameters, and its mode, are those of the model that was tapped."""

    def __init__(
        self,
        hf_model: PreTrainedModel,
        layer: int | Sequence[int],
        with_output: bool,
        after_rotary: bool,
        role: str | None = None,
    ) -> None:
        super().__init__()
        self.training = hf_model.training  # new modules start in training mode, whatever mode their parts are in
        architecture = architecture_of(hf_model.config)
        if after_rotary and architecture.rotary_head_dim is None:
            raise UserError(
                f"{hf_model.config.model_type} has no rotary embedding; set `relations.after_rotary: false`"
            )
        self.single = isinstance(layer, int)
        self.layers = layer_numbers(layer)
        self.with_output = with_output
        self.architecture = architecture
        self.attends_by_document = True  # False: one mask for all documents, whose shape is that of every batch
        num_layers = len(cast(nn.ModuleList, hf_model.get_submodule(architecture.layers)))
        for number in self.layers:
            if not 1 <= number <= num_layers:
                fix = f". Set `relations.{role}_layer` or `relations.layers`" if role else ""
                raise UserError(
                    f"there is no layer {number} in the {role or 'model'}: a {hf_model.config.model_type} with layers 1 to "
                    f"{num_layers}{fix}"
                )
        self.model = _cut(hf_model, architecture, set(self.layers), with_output, after_rotary)
        layers = list(cast(nn.ModuleList, self.model.get_submodule(architecture.layers)))
        self._taps = {n: cast(TapLayer, layers[n - 1]) for n in self.layers}
        self.complete_layers = [layer for layer in layers if not isinstance(layer, TapLayer)]  # those that are not read
        self.num_attention_layers = len(layers) - sum(layer_tap.layer is None for layer_tap in self._taps.values())

    def forward(self, input_ids_BL: torch.Tensor, attention_mask: torch.Tensor | Documents | None = None):
        """`attention_mask`: [B, L], 1 at real tokens; or the rows' documents, which then do not see each other."""
        if isinstance(attention_mask, Documents):
            hidden_BLD = self._run_apart(input_ids_BL, attention_mask)
        else:
            hidden_BLD = self.model(input_ids=input_ids_BL, attention_mask=attention_mask)[0]
        taken = {layer: layer_tap.take() for layer, layer_tap in self._taps.items()}
        projections = [taken[layer] for layer in self.layers]
        result = projections[0] if self.single else projections
        return (result, hidden_BLD) if self.with_output else result

    def _run_apart(self, input_ids_BL: torch.Tensor, documents: Documents) -> torch.Tensor:
        """The model on rows of several documents, with the masks and positions that its architecture requires."""
        model, (*path, method) = self.model, self.architecture.block_mask.split(".")
        check_documents(model.config, "this model")
        positions_BL = None
        if documents.restart_positions:
            positions_BL = documents.positions(input_ids_BL) + first_position(model)
        if not path:
            masks = self._masks_of_attention(input_ids_BL, documents)
            return model(input_ids=input_ids_BL, attention_mask=masks, position_ids=positions_BL)[0]
        mask_B1LL, real_BL = documents.mask(input_ids_BL), documents.real_tokens(input_ids_BL)
        owner = model.get_submodule(".".join(path))  # a copy of this skeleton, not the tapped model's own
        setattr(owner, method, lambda _: mask_B1LL)
        try:
            return model(input_ids=input_ids_BL, attention_mask=real_BL, position_ids=positions_BL)[0]
        finally:
            delattr(owner, method)

    def _masks_of_attention(self, input_ids_BL: torch.Tensor, documents: Documents) -> Any:
        """One mask, or one for each type of layer.

        On a CPU torch's attention computes each document alone. A GPU would wait for the many small kernels of that, and a
        compiled layer would be compiled for each batch: they get one mask of numbers, which all layers share.
        """
        config, architecture = self.model.config, self.architecture
        on_cpu = input_ids_BL.device.type == "cpu"
        by_document = self.attends_by_document and on_cpu and architecture.block_mask == "sdpa"

        def mask(window: int | None) -> torch.Tensor:
            if by_document:
                return documents.attention(input_ids_BL, window)
            return documents.added_mask(input_ids_BL, self.model.dtype, window)

        if not architecture.masks_by_layer_type:
            return mask(None)
        first_of_type = {kind: number for number, kind in reversed(list(enumerate(config.layer_types, start=1)))}
        return {kind: mask(window_of(config, number)) for kind, number in first_of_type.items()}

    @property
    def widths(self) -> list[int]:
        """Channels of Q (K and V have as many) for each tapped layer."""
        return [self._taps[layer].width for layer in self.layers]


class TapLayer(nn.Module):
    """Replaces a layer: computes Q, K, V from the layer's input and stores them until `take` is called.

    With `run_layer` the layer itself runs too (a tap below the last one). Otherwise only the projections run.
    """

    def __init__(self, layer: nn.Module, architecture: ArchitectureSpec, run_layer: bool, after_rotary: bool) -> None:
        super().__init__()
        for name in architecture.layer_attributes:
            setattr(self, name, getattr(layer, name))
        shared_norm = layer.get_submodule(architecture.norm_before) if architecture.norm_before else None
        self.norm = nn.Identity().train(layer.training) if shared_norm is None else shared_norm
        self.projections = nn.ModuleList(layer.get_submodule(name) for name in architecture.projections)
        self.training = self.projections.training = layer.training
        self.layer = layer if run_layer else None
        self.returns = architecture.layer_returns
        self.rotary_head_dim: int | None = None
        if after_rotary and architecture.rotary_head_dim:
            self.rotary_head_dim = attrgetter(architecture.rotary_head_dim)(layer)
        self.width = sum(cast(nn.Linear, projection).out_features for projection in self.projections) // 3
        self._kept: Projections | None = None

    def forward(self, hidden_BLD: torch.Tensor, *arguments, **keywords):
        normed_BLD = self.norm(hidden_BLD)
        outputs = [projection(normed_BLD) for projection in self.projections]
        query_BLD, key_BLD, value_BLD = outputs[0].chunk(3, dim=-1) if len(outputs) == 1 else outputs
        if self.rotary_head_dim is not None:
            query_BLD, key_BLD = self._rotate(query_BLD, key_BLD, keywords["position_embeddings"])
        self._kept = (query_BLD, key_BLD, value_BLD)
        if self.layer is not None:
            return self.layer(hidden_BLD, *arguments, **keywords)
        return (hidden_BLD, None)[: self.returns] if self.returns else hidden_BLD

    def _rotate(self, query_BLD: torch.Tensor, key_BLD: torch.Tensor, cos_and_sin) -> list[torch.Tensor]:
        """Q and K as attention gets them: the channels of each head rotated by the token's position."""
        heads = [x_BLD.unflatten(-1, (-1, self.rotary_head_dim)).transpose(1, 2) for x_BLD in (query_BLD, key_BLD)]
        return [x_BHLd.transpose(1, 2).flatten(2) for x_BHLd in apply_rotary_pos_emb(*heads, *cos_and_sin)]

    def take(self) -> Projections:
        """Q, K and V of the last forward. They are released, so that no graph outlasts its step."""
        kept, self._kept = self._kept, None
        assert kept is not None, "the encoder ran past a tapped layer"
        return kept


def _cut(
    hf_model: PreTrainedModel, architecture: ArchitectureSpec, layers: set[int], with_output: bool, after_rotary: bool
) -> PreTrainedModel:
    """The model's skeleton with the taps in it. It shares all parameters and runs nothing above the last tap."""
    model = _shallow_copy(hf_model)
    model.config = copy.deepcopy(hf_model.config)
    model.config.output_hidden_states = model.config.output_attentions = False
    model._modules.pop("pooler", None)
    model.pooler = None
    old_layers = cast(nn.ModuleList, hf_model.get_submodule(architecture.layers))
    last = len(old_layers) if with_output else max(layers)
    new_layers = nn.ModuleList(
        TapLayer(layer, architecture, with_output or number < last, after_rotary) if number in layers else layer
        for number, layer in enumerate(old_layers[:last], start=1)
    )
    new_layers.training = old_layers.training
    _replace(model, architecture.layers, new_layers)
    if not with_output:
        for name in architecture.after_layers:
            _replace(model, name, nn.Identity().train(hf_model.training))
        if last == 1 and architecture.after_first_layer:
            _replace(model, architecture.after_first_layer, None)
    return model


def _shallow_copy(module: nn.Module):
    """A copy with its own dictionary of children, which holds the same children and parameters."""
    twin = copy.copy(module)
    twin._modules = dict(module._modules)
    return twin


def _replace(model: nn.Module, dotted_name: str, new_child: nn.Module | None) -> None:
    """Set the child at a dotted name. The modules on the path are copied, so that the original model keeps its own."""
    *parents, last = dotted_name.split(".")
    owner = model
    for name in parents:
        twin = _shallow_copy(getattr(owner, name))
        owner._modules[name] = twin
        owner = twin
    owner._modules[last] = new_child
