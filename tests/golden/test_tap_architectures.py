"""The tap of every architecture against the unchanged Hugging Face forward: Q, K, V equal bit for bit, in fp32."""

from __future__ import annotations

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from pipeline.distillation.models.architectures import ARCHITECTURES, architecture_of
from pipeline.distillation.tap import tap
from tests.tiny_encoders import CONFIGS, MODERNBERT_LAYERS, padded_rows, random_rows, tiny_encoder


def projections_of_full_forward(model, layer: int, input_ids, mask):
    """Outputs of the projections of layer `layer` (from 1) while the complete model runs, from forward hooks."""
    architecture, seen = architecture_of(model.config), []
    module = model.get_submodule(f"{architecture.layers}.{layer - 1}")
    hooks = [
        module.get_submodule(name).register_forward_hook(lambda _, __, output: seen.append(output))
        for name in architecture.projections
    ]
    with torch.no_grad():
        hidden = model(input_ids=input_ids, attention_mask=mask).last_hidden_state
    for hook in hooks:
        hook.remove()
    if len(seen) == 1:
        seen = list(seen[0].chunk(3, dim=-1))
    return seen[:3], hidden


def assert_same(ours, theirs):
    for mine, expected in zip(ours, theirs, strict=True):
        assert torch.equal(mine, expected)


def test_tiny_encoders_and_architectures_are_the_same():
    assert set(CONFIGS) == set(ARCHITECTURES)


@pytest.mark.parametrize("model_type", CONFIGS)
@pytest.mark.parametrize("layer", [1, 3, 4])
def test_packed_rows(model_type, layer):
    model, rows = tiny_encoder(model_type), random_rows(3, 40)
    expected, _ = projections_of_full_forward(model, layer, rows, None)
    with torch.no_grad():
        assert_same(tap(model, layer)(rows), expected)


@pytest.mark.parametrize("model_type", [name for name in CONFIGS if name not in ("mpnet", "deberta-v2")])
def test_packed_rows_need_no_mask(model_type, monkeypatch):
    """Without padding, attention gets no mask, so that its fast kernels apply. ModernBERT's windows are masks."""
    masks, attend = [], torch.nn.functional.scaled_dot_product_attention

    def watched(*arguments, attn_mask=None, **keywords):
        masks.append(attn_mask)
        return attend(*arguments, attn_mask=attn_mask, **keywords)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    model = tiny_encoder(model_type)
    with torch.no_grad():
        tap(model, 4)(random_rows(2, 40))
        tap(model, 4)(*padded_rows([40, 9]))
    windows = MODERNBERT_LAYERS[:3] if model_type == "modernbert" else ["full_attention"] * 3
    assert [mask is None for mask in masks[:3]] == [kind == "full_attention" for kind in windows]
    assert not any(mask is None for mask in masks[3:])
    assert len(masks) == 6


@pytest.mark.parametrize("model_type", CONFIGS)
def test_padded_rows(model_type):
    model, (rows, mask) = tiny_encoder(model_type), padded_rows([40, 9, 1])
    expected, _ = projections_of_full_forward(model, 3, rows, mask)
    with torch.no_grad():
        assert_same(tap(model, 3)(rows, mask), expected)


@pytest.mark.parametrize("model_type", CONFIGS)
def test_several_layers_and_output(model_type):
    model, rows = tiny_encoder(model_type), random_rows(2, 30)
    with torch.no_grad():
        taps, hidden = tap(model, [4, 2, 2], with_output=True)(rows)
    for layer, ours in zip([4, 2, 2], taps, strict=True):
        expected, full_output = projections_of_full_forward(model, layer, rows, None)
        assert_same(ours, expected)
        assert torch.equal(hidden, full_output)
    with torch.no_grad():
        lower = tap(model, [1, 3])(rows)
    assert_same(lower[0], projections_of_full_forward(model, 1, rows, None)[0])
    assert_same(lower[1], projections_of_full_forward(model, 3, rows, None)[0])


@pytest.mark.parametrize("layer", [1, 2, 4])
def test_after_rotary_gives_what_attention_gets(layer):
    seen = {}

    def spy(module, query, key, value, attention_mask, **keywords):
        seen[module.layer_idx + 1] = (query, key, value)
        return sdpa_attention_forward(module, query, key, value, attention_mask, **keywords)

    AttentionInterface.register("spy", spy)
    AttentionMaskInterface.register("spy", sdpa_mask)
    model, rows = tiny_encoder("modernbert"), random_rows(2, 30)
    with torch.no_grad():
        ours = tap(model, layer, after_rotary=True)(rows)
        model.set_attn_implementation("spy")
        model(input_ids=rows)
    assert_same(ours, [x_BHLd.transpose(1, 2).flatten(2) for x_BHLd in seen[layer]])
