"""The table of encoder architectures: the names of modules, weights and config keys that distillation needs.

In: a Hugging Face config or its `model_type`. Out: the architecture's `ArchitectureSpec`. No other module knows names
of one architecture. How to add a row: CONTRIBUTING.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from data_prep.tokenizer_ids import POSITIONS_FROM_PADDING
from pipeline.errors import UserError


@dataclass(frozen=True)
class ArchitectureSpec:
    """Names inside a base model (`AutoModel`) and its config; dotted names start at the model or at one layer."""

    layers: str = "encoder.layer"
    projections: tuple[str, ...] = ("attention.self.query", "attention.self.key", "attention.self.value")
    # Output projection of attention, first and second product of the FFN. None: `student.init: project` leaves layers
    # of this architecture at their random start.
    products: tuple[str, str, str] | None = ("attention.output.dense", "intermediate.dense", "output.dense")
    norm_before: str | None = None  # the norm between a layer's input and its projections (pre-norm architectures)
    after_layers: tuple[str, ...] = ()  # modules that the model applies to the last layer's output
    after_first_layer: str | None = None  # a module that the model applies to the first layer's output
    layer_attributes: tuple[str, ...] = ()  # attributes of a layer that the model reads
    layer_returns: int = 0  # 0: a layer returns a tensor; n: a tuple of n
    rotary_head_dim: str | None = None  # attribute with the width of a rotary head, for layers that have one
    # How several documents of a row are kept apart. "sdpa": attention is torch's, and its mask reaches it unchanged.
    # "added": attention adds a mask of numbers to its logits. Else the method of a submodule that makes a bool mask.
    block_mask: str = "sdpa"
    masks_by_layer_type: bool = False  # the mask may be a dictionary: type of a layer -> its mask
    mixing_key: str | None = None  # a config key; above zero, a convolution mixes neighbouring tokens
    has_pooler: bool = True  # the class has the argument `add_pooling_layer`
    ffn_key: str = "intermediate_size"
    dropout_keys: tuple[str, ...] = ("hidden_dropout_prob", "attention_probs_dropout_prob")
    prefix: str = "roberta"  # of the encoder's weights in a class with a head
    # Weights that a file may hold in addition to the encoder's: the heads of the architecture's classes.
    heads: tuple[str, ...] = ("pooler", "lm_head", "classifier", "qa_outputs")
    positions_key: str | None = None  # a config key; where it is false, the model has no position embeddings
    learned_positions: bool = True  # one vector per position: `position_embedding_type` must be absolute


SLIDING = "sliding_attention"  # the type of a layer whose attention has a window
# Buffers in files of older releases: position_ids, the token types of an unsegmented text, rotary frequencies.
BUFFERS = ("embeddings.position_ids", "embeddings.token_type_ids", "rotary_emb.inv_freq")
_ROBERTA = ArchitectureSpec()

ARCHITECTURES: dict[str, ArchitectureSpec] = {
    "bert": ArchitectureSpec(prefix="bert", heads=("pooler", "cls", "classifier", "qa_outputs")),
    "roberta": _ROBERTA,
    "xlm-roberta": _ROBERTA,
    "camembert": _ROBERTA,
    "xlm-roberta-xl": ArchitectureSpec(
        norm_before="attention.self_attn_layer_norm", after_layers=("encoder.LayerNorm",)
    ),
    "electra": ArchitectureSpec(
        has_pooler=False,
        prefix="electra",
        heads=(
            *("discriminator_predictions", "generator_predictions", "generator_lm_head"),
            *("classifier", "qa_outputs", "sequence_summary"),
        ),
    ),
    "mpnet": ArchitectureSpec(
        projections=("attention.attn.q", "attention.attn.k", "attention.attn.v"),
        products=None,  # its position bias is defined per head
        layer_returns=1,
        block_mask="added",
        prefix="mpnet",
        learned_positions=False,
    ),
    "distilbert": ArchitectureSpec(
        layers="transformer.layer",
        projections=("attention.q_lin", "attention.k_lin", "attention.v_lin"),
        products=("attention.out_lin", "ffn.lin1", "ffn.lin2"),
        has_pooler=False,
        ffn_key="hidden_dim",
        dropout_keys=("dropout", "attention_dropout"),
        prefix="distilbert",
        heads=(
            *("vocab_transform", "vocab_layer_norm", "vocab_projector"),
            *("pre_classifier", "classifier", "qa_outputs"),
        ),
        learned_positions=False,
    ),
    "deberta-v2": ArchitectureSpec(  # Q and K of the content; the position terms of its attention are not part of them
        projections=("attention.self.query_proj", "attention.self.key_proj", "attention.self.value_proj"),
        products=None,
        after_first_layer="encoder.conv",
        layer_returns=2,
        block_mask="encoder.get_attention_mask",
        mixing_key="conv_kernel_size",
        has_pooler=False,
        prefix="deberta",
        heads=("pooler", "cls", "lm_head", "lm_predictions", "mask_predictions", "classifier", "qa_outputs"),
        positions_key="position_biased_input",  # only DeBERTa-v3's MLM decoder reads its absolute positions
        learned_positions=False,
    ),
    "modernbert": ArchitectureSpec(  # mmBERT too
        layers="layers",
        projections=("attn.Wqkv",),
        products=None,
        norm_before="attn_norm",
        after_layers=("final_norm",),
        layer_attributes=("attention_type",),
        masks_by_layer_type=True,
        rotary_head_dim="attn.head_dim",
        has_pooler=False,
        dropout_keys=("embedding_dropout", "attention_dropout", "mlp_dropout"),
        prefix="model",
        heads=("head", "decoder", "lm_head", "classifier"),
        learned_positions=False,
    ),
}


def usable_positions(config: PretrainedConfig) -> int:
    """Number of tokens in the longest row that a model accepts (XLM-R: a table of 514 positions, 512 tokens)."""
    positions = int(config.max_position_embeddings)
    return positions - (config.pad_token_id + 1) if config.model_type in POSITIONS_FROM_PADDING else positions


def first_position(model: PreTrainedModel) -> int:
    """The position of a row's first token: 0, or the one behind the padding's (XLM-R: 2)."""
    if model.config.model_type not in POSITIONS_FROM_PADDING:
        return 0
    return cast(int, cast(nn.Module, model.embeddings).padding_idx) + 1


def check_documents(config: PretrainedConfig, model: str) -> None:
    """Raise a `UserError` if `model` cannot keep the documents of a row apart."""
    key = architecture_of(config).mixing_key
    if key and getattr(config, key, 0) > 0:
        raise UserError(
            f"documents is separate, but {model} cannot keep the documents of a row apart: it is a {config.model_type} with "
            f"`{key}: {getattr(config, key)}`, and this convolution mixes the last tokens of one document with the first of the "
            "next. No mask changes that. Set documents: joined (--set documents=joined), or choose a model without it"
        )


def window_of(config: PretrainedConfig, layer: int) -> int | None:
    """How many tokens to either side attention of a layer (counted from 1) sees; None: all."""
    kinds = getattr(config, "layer_types", None)
    return int(config.sliding_window) if kinds and kinds[layer - 1] == SLIDING else None


def check_length(config: PretrainedConfig, seq_len: int, teacher: str) -> None:
    """Raise a `UserError` if rows of `seq_len` tokens are longer than the model's positions."""
    longest = usable_positions(config)
    if seq_len > longest:
        raise UserError(
            f"seq_len is {seq_len}, but {teacher} has positions for {longest} tokens; set it to {longest} or less: "
            f"--set seq_len={longest}"
        )


def architecture_of(config: PretrainedConfig) -> ArchitectureSpec:
    """The table's row for a config. Raises `UserError`: unknown architecture (lists the known ones), or a decoder."""
    return architecture_of_type(config.model_type, getattr(config, "is_decoder", False))


def architecture_of_type(model_type: str, is_decoder: bool = False) -> ArchitectureSpec:
    """`architecture_of` for a `model_type`, before there is a config object."""
    if model_type not in ARCHITECTURES:
        raise UserError(
            f"model type {model_type!r} is not one whose Q, K and V can be read. Known: {', '.join(ARCHITECTURES)}. "
            "CONTRIBUTING.md shows how to add one: a row in pipeline/distillation/models/architectures.py and a tiny model "
            "for the tests"
        )
    if is_decoder:
        raise UserError(f"this {model_type} model is a decoder (`is_decoder: true`); distillation needs an encoder")
    return ARCHITECTURES[model_type]
