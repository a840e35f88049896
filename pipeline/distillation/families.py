"""Where each encoder family keeps what distillation needs: the one table that knows Hugging Face names.

Used by `tap.py` (layers and projections), `teacher.py` (how to load) and `student.py` (how to change a config).
"""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PretrainedConfig

from pipeline.errors import UserError


@dataclass(frozen=True)
class Family:
    """Names inside a base model (`AutoModel`) and its config; dotted names start at the model or at one layer."""

    layers: str = "encoder.layer"
    projections: tuple[str, ...] = ("attention.self.query", "attention.self.key", "attention.self.value")
    # attention's output, FFN in, FFN out; None: layers that `student.init: project` leaves at random
    products: tuple[str, str, str] | None = ("attention.output.dense", "intermediate.dense", "output.dense")
    norm_before: str | None = None  # the layer's norm in front of its projections (pre-norm architectures)
    after_layers: tuple[str, ...] = ()  # modules that the model applies to the last layer's output
    after_first_layer: str | None = None  # a module that the model applies to the first layer's output
    layer_attributes: tuple[str, ...] = ()  # what the model reads off its layers
    layer_returns: int = 0  # 0: a layer returns a tensor; n: a tuple of n
    rotary_head_dim: str | None = None  # where a layer says how wide its rotary heads are
    takes_block_mask: bool = True  # a [B, 1, L, L] bool mask reaches its attention as it is
    has_pooler: bool = True  # the class takes `add_pooling_layer`
    ffn_key: str = "intermediate_size"
    dropout_keys: tuple[str, ...] = ("hidden_dropout_prob", "attention_probs_dropout_prob")


_BERT = Family()

FAMILIES: dict[str, Family] = {
    "bert": _BERT,
    "roberta": _BERT,
    "xlm-roberta": _BERT,
    "camembert": _BERT,
    "xlm-roberta-xl": Family(norm_before="attention.self_attn_layer_norm", after_layers=("encoder.LayerNorm",)),
    "electra": Family(has_pooler=False),
    "mpnet": Family(
        projections=("attention.attn.q", "attention.attn.k", "attention.attn.v"),
        products=None,  # its position bias belongs to the heads
        layer_returns=1,
        takes_block_mask=False,
    ),
    "distilbert": Family(
        layers="transformer.layer",
        projections=("attention.q_lin", "attention.k_lin", "attention.v_lin"),
        products=("attention.out_lin", "ffn.lin1", "ffn.lin2"),
        has_pooler=False,
        ffn_key="hidden_dim",
        dropout_keys=("dropout", "attention_dropout"),
    ),
    "deberta-v2": Family(  # Q and K of the content; the position terms of its attention are not part of them
        projections=("attention.self.query_proj", "attention.self.key_proj", "attention.self.value_proj"),
        products=None,
        after_first_layer="encoder.conv",
        layer_returns=2,
        takes_block_mask=False,
        has_pooler=False,
    ),
    "modernbert": Family(  # mmBERT too
        layers="layers",
        projections=("attn.Wqkv",),
        products=None,
        norm_before="attn_norm",
        after_layers=("final_norm",),
        layer_attributes=("attention_type",),
        takes_block_mask=False,
        rotary_head_dim="attn.head_dim",
        has_pooler=False,
        dropout_keys=("embedding_dropout", "attention_dropout", "mlp_dropout"),
    ),
}

# These count positions from the padding id on, so their tables hold that many rows more than a row may have tokens.
POSITIONS_AFTER_PADDING = ("roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "mpnet")


def usable_positions(config: PretrainedConfig) -> int:
    """Longest row a model takes. RoBERTa's kin start counting positions after the padding id (XLM-R: 514 rows, 512)."""
    positions = int(config.max_position_embeddings)
    return positions - (config.pad_token_id + 1) if config.model_type in POSITIONS_AFTER_PADDING else positions


def check_length(config: PretrainedConfig, seq_len: int, teacher: str) -> None:
    """A `UserError` where rows would be longer than the model has positions for."""
    longest = usable_positions(config)
    if seq_len > longest:
        raise UserError(
            f"seq_len is {seq_len}, but {teacher} has positions for {longest} tokens; take --set seq_len={longest} or less"
        )


def family_of(config: PretrainedConfig) -> Family:
    """The table's row for a config; an unknown architecture is a `UserError` that lists the known ones."""
    if config.model_type not in FAMILIES:
        raise UserError(
            f"model type {config.model_type!r} is not one whose Q, K and V can be read. Known: {', '.join(FAMILIES)}. "
            "A new one is a row in pipeline/distillation/families.py and a golden test"
        )
    if getattr(config, "is_decoder", False):
        raise UserError(
            f"this {config.model_type} model is a decoder (`is_decoder: true`); distillation needs an encoder"
        )
    return FAMILIES[config.model_type]
