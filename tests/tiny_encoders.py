"""A tiny random encoder of every architecture, with shapes in which its special code paths run."""

from __future__ import annotations

import torch
from transformers import AutoConfig, AutoModel, PreTrainedModel

VOCABULARY = 120
SPECIAL = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "max_position_embeddings": 80,
    **SPECIAL,
}
MODERNBERT_LAYERS = ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]
CONFIGS: dict[str, dict] = {
    "bert": COMMON,
    "roberta": COMMON,
    "xlm-roberta": COMMON,
    "camembert": COMMON,
    "xlm-roberta-xl": COMMON,
    "electra": {**COMMON, "embedding_size": 24},  # so that it has embeddings_project
    "mpnet": COMMON,
    "distilbert": {
        "vocab_size": VOCABULARY,
        "dim": 48,
        "n_layers": 4,
        "n_heads": 4,
        "hidden_dim": 96,
        "max_position_embeddings": 80,
        "pad_token_id": 1,
    },
    "deberta-v2": {  # everything that DeBERTa-v3 and mDeBERTa have, and v2's convolution
        **COMMON,
        "relative_attention": True,
        "pos_att_type": ["p2c", "c2p"],
        "position_buckets": 16,
        "norm_rel_ebd": "layer_norm",
        "share_att_key": True,
        "position_biased_input": False,
        "type_vocab_size": 0,
        "conv_kernel_size": 3,
    },
    "modernbert": {**COMMON, "local_attention": 8, "layer_types": MODERNBERT_LAYERS},
}


def tiny_encoder(model_type: str, seed: int = 0, **changes) -> PreTrainedModel:
    """A model in eval mode with random weights, large enough that every term of the forward changes its output."""
    config = AutoConfig.for_model(model_type, **{**CONFIGS[model_type], **changes})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModel.from_config(config)
        for parameter in model.parameters():
            parameter.data += 0.2 * torch.randn_like(parameter)
    return model.eval()


def random_rows(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    """Ids without padding or special ids."""
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def padded_rows(lengths: list[int], seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids padded at the end with id 1, and the attention mask."""
    rows_BL = random_rows(len(lengths), max(lengths), seed)
    mask_BL = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    return torch.where(mask_BL.bool(), rows_BL, 1), mask_BL
