"""Counted operations of an encoder against torch's own counter, which watches a forward."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from pipeline.distillation.flops import forward_flops, training_flops
from pipeline.distillation.tap import tap
from tests.tiny_encoders import CONFIGS, random_rows, tiny_encoder

LENGTH = 24


@pytest.mark.parametrize("model_type", sorted(CONFIGS.keys() - {"deberta-v2"}))
def test_as_many_as_torch_counts(model_type: str) -> None:
    assert 3 * forward_flops(tap(tiny_encoder(model_type), 3), LENGTH) == counted(model_type, 3)


def test_projections_that_a_tap_computes_again_are_counted_once() -> None:
    """Layer 1 is tapped and runs: its Q, K and V are computed twice, and needed once."""
    again = 3 * 3 * 2 * LENGTH * 48 * 48
    assert 3 * forward_flops(tap(tiny_encoder("bert"), [1, 3]), LENGTH) == counted("bert", [1, 3]) - again


def counted(model_type: str, layers: int | list[int]) -> int:
    """Of three rows, without the table of rotary positions, which some versions of transformers make by a matrix product.

    Eager attention, because torch does not count its CPU kernel.
    """
    model = tiny_encoder(model_type)
    model.set_attn_implementation("eager")
    encoder = tap(model, layers)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        encoder(random_rows(3, LENGTH))
    of_table = counter.get_flop_counts().get("TappedEncoder.model.rotary_emb", {})
    return counter.get_total_flops() - sum(of_table.values())


def test_relative_positions_of_deberta_are_left_out() -> None:
    """Its products with the table of relative positions depend on the table, not on tokens."""
    assert 0.5 < 3 * forward_flops(tap(tiny_encoder("deberta-v2"), 2), LENGTH) / counted("deberta-v2", 2) < 1


def test_a_training_row_is_one_pass_of_the_teacher_and_three_of_the_student() -> None:
    teacher, student = tap(tiny_encoder("bert"), 3), tap(tiny_encoder("bert", seed=1), 2)
    of_student = forward_flops(student, LENGTH)
    assert training_flops(teacher, [student], LENGTH) == forward_flops(teacher, LENGTH) + 3 * of_student
