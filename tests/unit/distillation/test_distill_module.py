"""`DistillModule`: its losses against the reference, its parts, its configuration; the teacher is no part of it."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch

from pipeline.distillation.config import LayerPair, RelationsConfig
from pipeline.distillation.distiller import DistillModule, Hooks
from pipeline.distillation.models.student import StudentConfig, build_student
from pipeline.distillation.models.teacher import load_teacher
from pipeline.distillation.relations.reference import relation_kl_reference
from pipeline.distillation.tap import tap
from pipeline.errors import UserError
from tests.tiny_encoders import padded_rows, random_rows, tiny_encoder


def make(relations=None, teacher_type="xlm-roberta", dtype=torch.float32, **student_changes):
    """(module, complete teacher in fp32, student), always with the same weights."""
    relations = relations or RelationsConfig(heads=12)
    options = {"layers": 2, "hidden": 24, "heads": 2, "dropout": 0.0, **student_changes}
    teacher_model = tiny_encoder(teacher_type)
    student = build_student(teacher_model, StudentConfig(**options), 3, relations)
    teacher = load_teacher(tiny_encoder(teacher_type), relations.teacher_taps, dtype, "cpu", **relations.tap_options)
    return DistillModule(teacher, student.tapped, relations), teacher_model, student


def reference(models, pair, rows, mask=None, lengths=None, layers=(4, 2)):
    """The float64 loss of one relation, 12 heads, from the two models' own taps."""
    first, second = ("qkv".index(letter) for letter in pair.split("-"))
    with torch.no_grad():
        of_both = [tap(model, layer)(rows, mask) for model, layer in zip(models, layers, strict=True)]
    return relation_kl_reference(*((x[first], x[second]) for x in of_both), 12, lengths).item()


@pytest.mark.parametrize("padded", [False, True])
def test_losses_are_the_papers(padded):
    relations = RelationsConfig(heads=12, pairs={"q-k": 0.5, "v-v": 2.0, "k-k": 1.0})
    module, teacher_model, student = make(relations)
    lengths = torch.tensor([20, 9, 3]) if padded else None
    rows, mask = padded_rows([20, 9, 3]) if padded else (random_rows(3, 20), None)
    loss, parts = module(rows, lengths)
    models = (teacher_model, student.model)
    expected = [reference(models, pair, rows, mask, lengths) for pair in relations.pairs]
    assert module.part_names == ["q-k", "v-v", "k-k"]
    assert parts.tolist() == pytest.approx(expected, rel=1e-4)
    assert loss.item() == pytest.approx(0.5 * expected[0] + 2 * expected[1] + expected[2], rel=1e-4)
    assert parts.dtype == torch.float32
    assert not parts.requires_grad


def test_several_layer_pairs():
    relations = RelationsConfig(heads=12, pairs={"v-v": 2.0}, layers=[LayerPair(2, 1, 0.5), LayerPair(4, 2)])
    module, teacher_model, student = make(relations)
    rows = random_rows(3, 20)
    loss, parts = module(rows)
    models = (teacher_model, student.model)
    expected = [reference(models, "v-v", rows, layers=layers) for layers in ((2, 1), (4, 2))]
    assert module.part_names == ["v-v@2>1", "v-v@4>2"]
    assert parts.tolist() == pytest.approx(expected, rel=1e-4)
    assert loss.item() == pytest.approx(expected[0] + 2 * expected[1], rel=1e-4)
    with torch.no_grad():
        value = tap(teacher_model, 4)(rows[:1])[2]
    shown = module.relation_maps(rows, "v-v@4>2")[0, 1]
    assert torch.allclose(shown, (value[0, :, 4:8] @ value[0, :, 4:8].T / 2).softmax(-1), atol=1e-5)


def test_the_teacher_is_not_part_of_the_module():
    module, _, student = make()
    assert {id(p) for p in module.parameters()} == {id(p) for p in student.tapped.parameters()}
    assert not any("teacher" in name for name, _ in module.named_modules())
    assert not any("teacher" in name for name in module.state_dict())


def test_only_trained_parameters_of_the_student_get_a_gradient():
    module, _, student = make(init="project", freeze=["embeddings"])
    module(random_rows(3, 20))[0].backward()
    assert all(parameter.grad is not None for parameter in student.trained.values())
    assert student.model.get_input_embeddings().weight.grad is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_teacher_and_student_in_half_precision(dtype):
    exact, _, _ = make()
    half, _, _ = make(dtype=dtype)
    half.student.to(dtype)
    rows = random_rows(3, 20)
    (loss, _), (close, _) = exact(rows), half(rows)
    assert close.dtype == torch.float32
    assert close.item() == pytest.approx(loss.item(), rel=0.05)
    close.backward()
    assert all(torch.isfinite(p.grad).all() for p in half.parameters() if p.grad is not None)


def test_any_callable_can_be_the_teacher():
    module, teacher_model, student = make()
    rows = random_rows(3, 20)
    expected = module(rows)[0].item()
    tapped = tap(teacher_model, 4)
    other = DistillModule(lambda ids, mask: tapped(ids, mask), student.tapped, RelationsConfig(heads=12))
    assert other(rows)[0].item() == expected


def test_losses_by_row_have_no_dropout_and_leave_the_mode():
    module, _, _ = make(dropout=0.5)
    module.train()
    rows = random_rows(5, 20)
    by_row = module.losses_by_row(rows)
    assert torch.equal(by_row, module.losses_by_row(rows))
    assert by_row.shape == (5,)
    assert module.student.training
    assert not by_row.requires_grad
    module.eval()
    assert module(rows)[0].item() == pytest.approx(by_row.mean().item(), rel=1e-5)


@pytest.mark.parametrize("tail", ["relation", "mse"])
def test_the_tail_term_reaches_the_last_layers_ffn(tail):
    relations = RelationsConfig(heads=12, tail=tail, tail_weight=0.5)
    module, teacher_model, student = make(relations, hidden=48, heads=4)
    assert not student.untrained
    rows, _ = padded_rows([20, 9, 3])
    lengths = torch.tensor([20, 9, 3])
    loss, parts = module(rows, lengths)
    assert module.part_names == ["q-q", "k-k", "v-v", "output"]
    assert loss.item() == pytest.approx((parts[:3].sum() + 0.5 * parts[3]).item(), rel=1e-5)
    with torch.no_grad():
        mask = (torch.arange(20) < lengths[:, None]).long()
        outputs = [model(input_ids=rows, attention_mask=mask)[0] for model in (teacher_model, student.model)]
    if tail == "relation":
        expected = relation_kl_reference(*outputs, 12, lengths).item()
    else:
        squares = (outputs[0] - outputs[1]).square().mean(-1)
        expected = sum(squares[row, :n].mean().item() for row, n in enumerate([20, 9, 3])) / 3
    assert parts[3].item() == pytest.approx(expected, rel=1e-4)
    assert all(module.relation_maps(rows, name).shape == (2, 4, 20, 20) for name in module.part_names)
    loss.backward()
    assert student.model.encoder.layer[-1].output.dense.weight.grad.norm() > 0


def test_a_student_of_another_architecture():
    relations = RelationsConfig(heads=12)
    module, _, student = make(relations, family="modernbert")
    assert student.model.config.model_type == "modernbert"
    module(random_rows(2, 20))[0].backward()


def test_rotary_relations():
    module, teacher_model, student = make(RelationsConfig(heads=12, after_rotary=True), "modernbert")
    rows = random_rows(2, 20)
    with torch.no_grad():
        of_teacher = tap(teacher_model, 4, after_rotary=True)(rows)
        of_student = tap(student.model, 2, after_rotary=True)(rows)
    expected = relation_kl_reference(of_teacher[0], of_student[0], 12).item()
    assert module(rows)[1][0].item() == pytest.approx(expected, rel=1e-4)


def test_relation_maps_are_probabilities_of_the_named_relation():
    module, teacher_model, _ = make()
    rows = random_rows(2, 20)
    maps = module.relation_maps(rows, "q-k", num_heads=3)
    assert maps.shape == (2, 3, 20, 20)
    assert torch.allclose(maps.sum(-1), torch.ones(2, 3, 20), atol=1e-5)
    with torch.no_grad():
        query, key, _ = tap(teacher_model, 4)(rows[:1])
    expected = (query[0, :, :4] @ key[0, :, :4].T / 2).softmax(-1)
    assert torch.allclose(maps[0, 0], expected, atol=1e-5)


def test_only_the_student_runs_in_the_given_context():
    """Deterministic kernels cost speed, and the teacher's forward is deterministic without them."""
    open_contexts, seen = [], []

    @contextmanager
    def around():
        open_contexts.append(1)
        yield
        open_contexts.pop()

    relations = RelationsConfig(heads=12)
    _, teacher_model, student = make(relations)
    module = DistillModule(tap(teacher_model, 4), student.tapped, relations, hooks=Hooks(around_student=around))
    for name, model in (("teacher", teacher_model), ("student", student.model)):
        model.register_forward_hook(lambda *_, name=name: seen.append((name, len(open_contexts))))
    module(random_rows(2, 10))
    assert seen == [("teacher", 0), ("student", 1)]


@pytest.mark.parametrize("first", ["forward", "losses_by_row"])
def test_the_backend_is_chosen_on_the_first_batch_and_reported(first: str):
    """Also where the first batch is one of an evaluation: the curve begins with the backend that it continues with."""
    module, _, _ = make()
    assert module.backend == "auto"
    with torch.no_grad():
        getattr(module, first)(random_rows(2, 20))
    assert module.backend == "chunked"
    assert module.backend_report[-1] == "relation backend chosen: chunked"


def test_a_resumed_run_keeps_its_backend():
    module, _, _ = make()
    module.keep_backend("flash")
    module(random_rows(2, 20))
    assert module.backend == "flash"
    assert "flash: kept" in module.backend_report[0]
    for name in (None, "auto", "a backend of another version"):
        fresh, _, _ = make()
        fresh.keep_backend(name)
        assert fresh.backend == "auto"
    pinned, _, _ = make(RelationsConfig(heads=12, backend="chunked"))
    pinned.keep_backend("flash")
    assert pinned.backend == "chunked"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"pairs": {"q-x": 1.0}}, "'q-x'.*q-q, q-k"),
        ({"pairs": {"qq": 1.0}}, "'qq'"),
        ({"pairs": {}}, "at least one"),
        ({"pairs": {"q-q": -1.0}}, "relations.pairs.q-q` is -1.*between 0 and"),
        ({"pairs": {"q-q": 1.0, "v-v": float("nan")}}, "relations.pairs.v-v` is nan.*between 0 and"),
        ({"pairs": {"q-q": float("inf")}}, "relations.pairs.q-q` is inf.*between 0 and"),
        ({"pairs": {"q-q": 0.0, "v-v": 0.0}}, "relations.pairs.*above zero"),
        ({"layers": [LayerPair(1, 1), LayerPair(2, 2, -1.0)]}, "relations.layers.1..weight` is -1.*between 0 and"),
        ({"layers": [LayerPair(1, 1, float("nan"))]}, "relations.layers.0..weight` is nan.*between 0 and"),
        ({"layers": [LayerPair(1, 1, 0.0)]}, "relations.layers.*above zero"),
        ({"tail_weight": -1.0}, "relations.tail_weight"),
        ({"tail_weight": float("nan")}, "relations.tail_weight"),
        ({"tail_weight": float("inf")}, "relations.tail_weight"),
        ({"backend": "fast"}, "auto, chunked, flash"),
        ({"layers": [LayerPair(1, 1)], "teacher_layer": 3}, "relations.layers"),
        ({"layers": [LayerPair(1, 1), LayerPair(1, 1, 2.0)]}, "twice"),
    ],
)
def test_invalid_relations_are_explained(options, words):
    with pytest.raises(UserError, match=f"(?s){words}"):
        RelationsConfig(**options)


@pytest.mark.parametrize(("role", "layer"), [("student", 0), ("student", 3), ("teacher", 5)])
def test_a_missing_layer_names_the_model_and_the_key(role, layer):
    """Layer 0 does not mean the last."""
    with pytest.raises(UserError, match=f"no layer {layer} in the {role}.*`relations.{role}_layer`"):
        make(RelationsConfig(heads=12, **{f"{role}_layer": layer}))


@pytest.mark.parametrize(("heads", "words"), [(16, "student's width of 24"), (10, "student's width of 24")])
def test_heads_are_checked_before_the_first_batch(heads, words):
    with pytest.raises(UserError, match=words):
        make(RelationsConfig(heads=heads))


def test_the_teachers_heads_are_checked_too():
    with pytest.raises(UserError, match=r"teacher's width of 48.*one of: 1, 2, 4$"):
        make(RelationsConfig(heads=5), hidden=20, heads=2)


def test_the_mse_tail_needs_equal_widths():
    module, _, _ = make(RelationsConfig(heads=12, tail="mse"))
    with pytest.raises(UserError, match=r"(?s)equal widths.*tail: relation"):
        module(random_rows(2, 20))


def test_one_document_per_row_is_the_same_as_no_documents():
    module, _, _ = make()
    rows = random_rows(2, 20)
    assert module(rows, segments=torch.tensor([[20], [20]]))[0].item() == pytest.approx(
        module(rows)[0].item(), rel=1e-5
    )
