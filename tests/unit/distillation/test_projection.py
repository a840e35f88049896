"""A projected student: its weights as functions of the teacher's, its limits, and its tail term."""

from __future__ import annotations

import pytest
import torch

from pipeline.distillation.config import RelationsConfig
from pipeline.distillation.distiller import DistillModule
from pipeline.distillation.models.projection import Calibration
from pipeline.distillation.models.student import BASIS, Student, StudentConfig, build_student
from pipeline.distillation.models.teacher import load_teacher
from pipeline.errors import UserError
from tests.tiny_encoders import random_rows, tiny_encoder

RELATION_HEADS = 4
PROJECTED = ["electra", "bert", "roberta", "xlm-roberta", "camembert", "xlm-roberta-xl", "distilbert"]
EMBEDDINGS_ALONE = ["electra", "mpnet", "deberta-v2", "modernbert"]
WITH_OUTPUT = RelationsConfig(tail="mse")
CALIBRATION = Calibration(random_rows(8, 40, seed=5), RELATION_HEADS)


def project(teacher, calibration: Calibration | None = CALIBRATION, **changes) -> Student:
    config = StudentConfig(**{"layers": 2, "hidden": 24, "heads": 4, "ffn": 48, "init": "project", **changes})
    return build_student(teacher, config, 0, WITH_OUTPUT, calibration)


def relations_of(x_BLD: torch.Tensor, heads: int) -> torch.Tensor:
    """Scaled products within each head, the logits of (1)."""
    x_BHLd = x_BLD.unflatten(-1, (heads, -1)).transpose(1, 2)
    return x_BHLd @ x_BHLd.mT * x_BHLd.shape[-1] ** -0.5


def test_with_all_components_every_product_is_the_teachers():
    """A student as wide as its teacher differs in the norms alone: each product is the teacher's, in the other basis."""
    teacher = tiny_encoder("xlm-roberta")
    student = project(teacher, layers=4, hidden=48, ffn=96)
    basis_DD = student.basis_Dd
    x_BLD = torch.randn(2, 9, 48, generator=torch.Generator().manual_seed(1))
    for theirs, own in zip(teacher.encoder.layer, student.model.encoder.layer, strict=True):
        turned_BLD = x_BLD @ basis_DD
        query, key, value = (getattr(own.attention.self, n)(turned_BLD) for n in ("query", "key", "value"))
        of_teacher = [getattr(theirs.attention.self, n)(x_BLD) for n in ("query", "key", "value")]
        for mine_BLD, his_BLD in zip((query, key, value), of_teacher, strict=True):
            assert torch.allclose(relations_of(mine_BLD, 4), relations_of(his_BLD, 4), rtol=1e-3, atol=1e-3)
        logits = [q.unflatten(-1, (4, -1)).transpose(1, 2) @ k.unflatten(-1, (4, -1)).transpose(1, 2).mT
                  for q, k in ((query, key), of_teacher[:2])]  # fmt: skip
        assert torch.allclose(*logits, rtol=1e-3, atol=1e-2), "query and key are rotated alike"
        mixed_BLD = own.attention.output.dense(value)
        assert torch.allclose(mixed_BLD, theirs.attention.output.dense(of_teacher[2]) @ basis_DD, rtol=1e-3, atol=1e-3)
        inner_BLF = own.intermediate(turned_BLD)
        assert torch.allclose(inner_BLF, theirs.intermediate(x_BLD), rtol=1e-3, atol=1e-3)
        outer_BLD = theirs.output.dense(theirs.intermediate(x_BLD)) @ basis_DD
        assert torch.allclose(own.output.dense(inner_BLF), outer_BLD, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("layer", [0, 1], ids=["in attention heads", "tapped, in relation heads"])
def test_states_that_fit_into_fewer_channels_keep_their_logits(layer):
    """Hidden states within the basis and heads that use half of their channels: narrower heads give the same relations."""
    teacher = tiny_encoder("bert", num_attention_heads=2)
    with torch.no_grad():
        for theirs in teacher.encoder.layer:
            for name in ("query", "key", "value"):
                projection = getattr(theirs.attention.self, name)
                projection.weight.unflatten(0, (4, 12))[:, 6:] = 0
                projection.bias.unflatten(0, (4, 12))[:, 6:] = 0
    student = project(teacher, heads=2)
    x_BLd = torch.randn(2, 9, 24, generator=torch.Generator().manual_seed(1))
    theirs, own = teacher.encoder.layer[2 * layer + 1], student.model.encoder.layer[layer]
    heads = RELATION_HEADS if layer else 2
    for name in ("query", "key", "value"):
        of_student = relations_of(getattr(own.attention.self, name)(x_BLd), heads)
        of_teacher = relations_of(getattr(theirs.attention.self, name)(x_BLd @ student.basis_Dd.T), heads)
        assert torch.allclose(of_student, of_teacher, rtol=1e-3, atol=1e-3), name
    mixed_BLd = own.attention.output.dense(own.attention.self.value(x_BLd))
    values_BLD = theirs.attention.self.value(x_BLd @ student.basis_Dd.T)
    expected_BLd = theirs.attention.output.dense(values_BLD) @ student.basis_Dd
    assert torch.allclose(mixed_BLd, expected_BLd, rtol=1e-3, atol=1e-3)


def test_the_basis_holds_most_of_the_hidden_states():
    teacher = tiny_encoder("bert")
    student = project(teacher)
    assert student.start == "the teacher's layers 2, 4 on 24 principal components of its states"
    basis_Dd = student.basis_Dd
    assert torch.allclose(basis_Dd.T @ basis_Dd, torch.eye(24), atol=1e-5)
    with torch.no_grad():
        states_ND = teacher(random_rows(4, 40, seed=6)).last_hidden_state.flatten(0, 1)
    random_Dd = torch.linalg.qr(torch.randn(48, 24, generator=torch.Generator().manual_seed(0)))[0]
    share, by_chance = ((states_ND @ b).square().sum() / states_ND.square().sum() for b in (basis_Dd, random_Dd))
    assert share > by_chance + 0.2


@pytest.mark.parametrize("model_type", PROJECTED)
def test_norms_bring_the_student_nearest_to_the_projected_teacher(model_type):
    """On the calibration rows, the student's output has the target's mean in every channel, and no other weight of the
    last norm would reduce the distance further."""
    teacher = tiny_encoder(model_type, **({"embedding_size": 48} if model_type == "electra" else {}))
    student = project(teacher)
    with torch.no_grad():
        output_Nd = student.model.eval()(CALIBRATION.rows_BL).last_hidden_state.flatten(0, 1)
        target_Nd = teacher(CALIBRATION.rows_BL).last_hidden_state.flatten(0, 1) @ student.basis_Dd
    assert torch.allclose(output_Nd.mean(0), target_Nd.mean(0), atol=1e-3)
    left_Nd = (target_Nd - output_Nd) * (output_Nd - output_Nd.mean(0))
    assert left_Nd.mean(0).abs().max() < 1e-3 * target_Nd.square().mean()
    assert (target_Nd - output_Nd).square().sum() < (target_Nd - target_Nd.mean(0)).square().sum()


@pytest.mark.parametrize("model_type", EMBEDDINGS_ALONE)
def test_other_layers_start_at_random_and_say_so(model_type):
    teacher = tiny_encoder(model_type)
    student = project(teacher)
    assert student.start == "the teacher's embeddings alone, on 24 principal components; layers random"
    assert student.basis_Dd is None
    without = project(teacher, calibration=None)
    assert all(torch.equal(student.trained[name], without.trained[name]) for name in student.trained)


def test_the_heads_and_neurons_that_add_nothing_are_left_out():
    teacher = tiny_encoder("bert")
    with torch.no_grad():
        for layer in teacher.encoder.layer:
            layer.attention.output.dense.weight[:, 12:24] = 0  # head 2 of 4 adds nothing
            layer.output.dense.weight[:, ::2] = 0
    student = project(teacher, layers=4, heads=3, hidden=24)
    for theirs, own in zip(teacher.encoder.layer[:3], student.model.encoder.layer[:3], strict=True):  # 4 is tapped
        inner = theirs.intermediate.dense.weight[1::2] @ student.basis_Dd
        assert torch.allclose(own.intermediate.dense.weight, inner, atol=1e-5)
        used = theirs.attention.self.value.weight[12:24] @ student.basis_Dd
        span = own.attention.self.value.weight.unflatten(0, (3, 8))
        others = [theirs.attention.self.value.weight[s] @ student.basis_Dd for s in (slice(0, 12), slice(24, 36))]
        assert not any(_within(head, used) for head in span)
        assert _within(span[0], others[0])
        assert _within(span[1], others[1])


def _within(rows_nd: torch.Tensor, others_md: torch.Tensor) -> bool:
    """Whether all rows are linear combinations of the others."""
    return torch.linalg.matrix_rank(torch.cat([rows_nd, others_md]), rtol=1e-4) == len(others_md)


@pytest.mark.parametrize("heads", [2, 3, 6, 8])
def test_any_number_of_heads(heads):
    """Fewer, more, wider or narrower heads than the teacher's four of 12 channels: all weights are set and finite."""
    teacher = tiny_encoder("bert")
    student = project(teacher, heads=heads)
    blank = build_student(teacher, StudentConfig(layers=2, hidden=24, heads=heads, ffn=48), 0, WITH_OUTPUT)
    for name, weight in student.trained.items():
        assert torch.isfinite(weight).all(), name
        assert not torch.equal(weight, blank.trained[name]) or "position" in name, name


def test_a_wider_ffn_keeps_its_own_start_where_the_teacher_has_no_neurons():
    teacher = tiny_encoder("bert")
    student = project(teacher, ffn=120)
    blank = build_student(teacher, StudentConfig(layers=2, hidden=24, heads=4, ffn=120), 0, WITH_OUTPUT)
    own, start = (s.model.encoder.layer[0].intermediate.dense.weight for s in (student, blank))
    assert torch.equal(own[96:], start[96:])
    assert not torch.equal(own[:96], start[:96])


def test_two_builds_are_equal_and_leave_the_teacher_alone():
    teacher = tiny_encoder("xlm-roberta")
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    first, second = project(teacher), project(teacher)
    for name, weight in first.trained.items():
        assert torch.equal(weight, second.trained[name])
    assert torch.equal(first.untrained[BASIS], second.untrained[BASIS])
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())
    assert not any(module._forward_hooks for model in (teacher, first.model) for module in model.modules())
    assert first.model.training


def test_the_tail_compares_on_the_students_components():
    teacher, rows_BL = tiny_encoder("xlm-roberta"), random_rows(3, 20)
    student = project(teacher, dropout=0.0)
    relations = RelationsConfig(heads=RELATION_HEADS, tail="mse", tail_weight=0.5)
    with torch.no_grad():
        target_BLd = teacher(rows_BL).last_hidden_state @ student.basis_Dd
        expected = (student.model(rows_BL).last_hidden_state - target_BLd).square().mean()
    frozen = load_teacher(teacher, with_output=True)
    _, parts = DistillModule(frozen, student.tapped, relations, basis_Dd=student.basis_Dd)(rows_BL)
    assert parts[-1].item() == pytest.approx(expected.item(), rel=1e-4)
    with pytest.raises(UserError, match=r"equal widths, not 48 .* 24 .*project"):
        DistillModule(frozen, student.tapped, relations)(rows_BL)


def test_a_student_wider_than_its_teacher_is_rejected():
    with pytest.raises(UserError, match="48; the student is 96 wide"):
        project(tiny_encoder("bert"), hidden=96)
