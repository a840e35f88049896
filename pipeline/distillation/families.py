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
    norm_before: str | None = None  # the layer's norm in front of its projections (pre-norm architectures)
    after_layers: tuple[str, ...] = ()  # modules that the model applies to the last layer's output
    layer_returns: int = 0  # 0: a layer returns a tensor; n: a tuple of n
    has_pooler: bool = True  # the class takes `add_pooling_layer`
    ffn_key: str = "intermediate_size"
    dropout_keys: tuple[str, ...] = ("hidden_dropout_prob", "attention_probs_dropout_prob")


_BERT = Family()

FAMILIES: dict[str, Family] = {
    "bert": _BERT,
    "roberta": _BERT,
    "xlm-roberta": _BERT,
    "camembert": _BERT,
}


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
