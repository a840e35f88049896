"""The tap shares parameters with the model, runs nothing above the layer, and explains what it cannot do."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2Model

from pipeline.distillation.models.architectures import ARCHITECTURES
from pipeline.distillation.tap import tap
from pipeline.errors import UserError
from tests.tiny_encoders import CONFIGS, random_rows, tiny_encoder


@pytest.mark.parametrize("model_type", CONFIGS)
def test_parameters_are_shared_and_all_get_a_gradient(model_type):
    model = tiny_encoder(model_type)
    tapped = tap(model, 3)
    own = {id(parameter) for parameter in model.parameters()}
    assert all(id(parameter) in own for parameter in tapped.parameters())
    query, key, value = tapped(random_rows(2, 12))
    (query.square().sum() + key.square().sum() + value.square().sum()).backward()
    assert [name for name, parameter in tapped.named_parameters() if parameter.grad is None] == []


def test_a_cut_at_the_first_layer_drops_debertas_convolution():
    """It is applied to the first layer's output, which is not computed then."""
    assert any("conv" in name for name, _ in tap(tiny_encoder("deberta-v2"), 2).named_parameters())
    assert not any("conv" in name for name, _ in tap(tiny_encoder("deberta-v2"), 1).named_parameters())


@pytest.mark.parametrize("model_type", CONFIGS)
def test_nothing_above_the_layer_runs(model_type):
    model = tiny_encoder(model_type)
    architecture = ARCHITECTURES[model_type]
    tapped = tap(model, 2)
    for number in (2, 3):
        model.get_submodule(f"{architecture.layers}.{number}").forward = None  # calling it would raise
    layer = model.get_submodule(f"{architecture.layers}.1")
    in_use = {id(parameter) for parameter in tapped.parameters()}
    assert len(tapped.model.get_submodule(architecture.layers)) == 2
    assert any(id(parameter) not in in_use for parameter in layer.parameters())  # attention output and FFN
    tapped(random_rows(2, 12))


def test_the_model_itself_is_not_changed():
    model, rows = tiny_encoder("xlm-roberta"), random_rows(2, 12)
    names, before = list(model.state_dict()), model(rows).last_hidden_state
    tap(model, 2)(rows)
    tap(model, [1, 3], with_output=True)(rows)
    assert list(model.state_dict()) == names
    assert torch.equal(model(rows).last_hidden_state, before)


def test_training_the_tap_trains_the_model():
    model = tiny_encoder("bert")
    tapped = tap(model, 2)
    with torch.no_grad():
        for parameter in tapped.parameters():
            parameter.zero_()
    assert torch.count_nonzero(model.encoder.layer[0].attention.self.query.weight) == 0
    assert torch.count_nonzero(model.encoder.layer[1].output.dense.weight) > 0


def test_packed_rows_need_no_mask():
    """Attention gets no mask: a mask of ones would cost a read of every logit."""
    model = tiny_encoder("xlm-roberta")
    masks = []
    model.encoder.layer[0].attention.self.register_forward_pre_hook(
        lambda module, args, kwargs: masks.append(kwargs["attention_mask"]), with_kwargs=True
    )
    tap(model, 2)(random_rows(2, 12))
    assert masks == [None]


def test_no_graph_outlasts_its_step():
    tapped = tap(tiny_encoder("bert"), [2, 3])
    tapped(random_rows(2, 12))
    assert all(layer_tap._kept is None for layer_tap in tapped._taps.values())


@pytest.mark.parametrize("model_type", CONFIGS)
def test_attention_is_fused_wherever_transformers_has_a_fused_form(model_type):
    """MPNet and DeBERTa-v2 add position terms to their logits; transformers has no fused form of that."""
    expected = "eager" if model_type in ("mpnet", "deberta-v2") else "sdpa"
    assert tap(tiny_encoder(model_type), 1).model.config._attn_implementation == expected


@pytest.mark.parametrize("layer", [0, 5, -1])
def test_layer_out_of_range(layer):
    with pytest.raises(UserError, match=f"layer {layer} in the model.* 1 to 4"):
        tap(tiny_encoder("bert"), layer)


def test_an_unknown_architecture_lists_the_known_ones():
    model = GPT2Model(GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=10))
    with pytest.raises(UserError, match=r"(?s)'gpt2'.*bert, roberta, xlm-roberta"):
        tap(model, 1)


def test_a_decoder_is_rejected():
    model = tiny_encoder("bert")
    model.config.is_decoder = True
    with pytest.raises(UserError, match="decoder"):
        tap(model, 1)


def test_after_rotary_needs_a_rotary_embedding():
    with pytest.raises(UserError, match="no rotary"):
        tap(tiny_encoder("bert"), 1, after_rotary=True)


def test_a_tap_has_no_pooler():
    tapped = tap(tiny_encoder("bert"), 2)
    assert not any(isinstance(m, nn.Linear) for name, m in tapped.named_modules() if "pooler" in name)
