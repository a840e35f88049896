"""The terms for the student's output: sentence vectors against a float64 reference, their gradient, padding and ranks."""

from __future__ import annotations

import math

import pytest
import torch

from pipeline.distillation.config import RelationsConfig
from pipeline.distillation.distiller import DistillModule
from pipeline.distillation.documents import Documents, SequenceMask
from pipeline.distillation.models.projection import Calibration
from pipeline.distillation.models.student import SENTENCE_PROJECTION, StudentConfig, build_student
from pipeline.distillation.models.teacher import load_teacher
from pipeline.distillation.tail import SentenceProjection, Tail
from pipeline.errors import UserError
from tests.host_reads import HostReads
from tests.tiny_encoders import padded_rows, random_rows, tiny_encoder

DISTANCES, POOLINGS = ["cosine", "mse", "similarity"], ["mean", "cls", "last"]
TEMPERATURE, LENGTH = 0.3, 12
SEGMENTS = [[5, 7], [12], [2, 1, 6], [4, 4, 4]]  # the third row ends with padding
LENGTHS = [12, 12, 9, 12]
UNITS = {  # how documents are given -> the mask, and each row's units
    "joined": (SequenceMask(), [[12]] * 4),
    "padded": (SequenceMask(torch.tensor(LENGTHS)), [[n] for n in LENGTHS]),
    "separate": (
        SequenceMask(None, Documents(torch.tensor([row + [0] * (3 - len(row)) for row in SEGMENTS]))),
        SEGMENTS,
    ),
}


def states(width: int, seed: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(4, LENGTH, width, generator=generator, dtype=torch.float64).to(dtype)


def tail(distance: str, pooling: str = "mean", width: int = 0, **options) -> Tail:
    """With a projection to 6 channels from `width`, if that is given."""
    config = RelationsConfig(tail="pooled", pooling=pooling, pooled_distance=distance, pooled_temperature=TEMPERATURE)
    projection = None
    if width and distance != "similarity":
        weight_Dd = torch.randn(6, width, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
        projection = SentenceProjection(weight_Dd)
    return Tail(config, projection=projection, **options)


def sentences(states_BLD, units, pooling):
    """(vector, weight) of each sentence as the documentation says it, one by one."""
    found = []
    for row_LD, lengths in zip(states_BLD.double(), units, strict=True):
        start = 0
        for number, length in enumerate(lengths):
            tokens = row_LD[start : start + length]
            start += length
            if pooling == "cls":
                if number == 0:
                    found.append((tokens[0], 1.0))
                continue
            vector = tokens.sum(0) / length if pooling == "mean" else tokens[-1]
            found.append((vector, length / sum(lengths)))
    return found


def reference(term: Tail, teacher_BLD, student_BLD, units) -> float:
    config = term.config
    of_teacher, of_student = (sentences(x, units, config.pooling) for x in (teacher_BLD, student_BLD))
    weights = [weight for _, weight in of_teacher]
    t, s = [v for v, _ in of_teacher], [v for v, _ in of_student]
    if term.projection is not None:
        s = [term.projection.weight.double() @ v for v in s]
    cosine = lambda a, b: (a @ b / (a.norm() * b.norm())).item()  # noqa: E731
    if config.pooled_distance == "similarity":
        distances = []
        for i in range(len(t)):
            others = [j for j in range(len(t)) if j != i]
            exps = [[math.exp(cosine(x[i], x[j]) / TEMPERATURE) for j in others] for x in (t, s)]
            p, q = ([e / sum(row) for e in row] for row in exps)
            distances.append(sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)))
    elif config.pooled_distance == "mse":
        distances = [((a - b) ** 2).mean().item() for a, b in zip(s, t, strict=True)]
    else:
        distances = [1 - cosine(a, b) for a, b in zip(s, t, strict=True)]
    return sum(w * d for w, d in zip(weights, distances, strict=True)) / len(teacher_BLD)


@pytest.mark.parametrize("units", UNITS)
@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("distance", DISTANCES)
def test_pooled_is_the_documented_formula(distance: str, pooling: str, units: str) -> None:
    """In float64 to its last digits, and in fp32; with a projection where widths differ."""
    mask, parts = UNITS[units]
    for width in (6, 4):
        term = tail(distance, pooling, width if width != 6 else 0)
        teacher_BLD, student_BLD = states(6, 0), states(width, 1)
        expected = reference(term, teacher_BLD, student_BLD, parts)
        (loss,) = term.losses(teacher_BLD, student_BLD, mask, "chunked")
        assert loss.dtype == torch.float64
        assert loss.item() == pytest.approx(expected, rel=1e-7)  # the weights of documents are fp32
        (single,) = term.losses(teacher_BLD.float(), student_BLD.float(), mask, "chunked")
        assert single.dtype == torch.float32
        assert single.item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("units", UNITS)
@pytest.mark.parametrize("distance", DISTANCES)
def test_the_gradient_of_pooled_is_that_of_finite_differences(distance: str, units: str) -> None:
    """Of the student's hidden states, and of the projection."""
    mask, _ = UNITS[units]
    term, student_BLD = tail(distance, width=4), states(4, 1)[:, :, :4].clone().requires_grad_()
    weight = [] if term.projection is None else [term.projection.weight]

    def loss(student_BLD, *_):
        return term.losses(states(6, 0), student_BLD, mask, "chunked")[0]

    assert torch.autograd.gradcheck(loss, (student_BLD, *weight), atol=1e-7)


@pytest.mark.parametrize("distance", DISTANCES)
def test_padding_is_in_no_sentence(distance: str) -> None:
    term, student_BLD = tail(distance), states(6, 1)
    for units in ("padded", "separate"):
        other_BLD = student_BLD.clone()
        other_BLD[2, 9:] = 100.0
        before, after = (term.losses(states(6, 0), x, UNITS[units][0], "chunked")[0] for x in (student_BLD, other_BLD))
        assert torch.equal(before, after)


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("distance", DISTANCES)
def test_a_row_of_padding_alone_counts_as_zero(distance: str, pooling: str) -> None:
    """As in the relation loss: loops of others may fill a batch with such rows."""
    for kind, term in (("pooled", tail(distance, pooling)), ("mse", Tail(RelationsConfig(heads=2, tail="mse")))):
        teacher_BLD, student_BLD = states(6, 0)[:3], states(6, 1)[:3].requires_grad_()
        rows = len(teacher_BLD) - 1
        masks = (
            (SequenceMask(torch.tensor([7, 4, 0])), SequenceMask(torch.tensor([7, 4]))),
            tuple(SequenceMask(None, Documents(torch.tensor(x))) for x in ([[4, 3], [4, 0], [0, 0]], [[4, 3], [4, 0]])),
        )
        for with_row, without in masks:
            (loss,) = term.losses(teacher_BLD, student_BLD, with_row, "chunked")
            (expected,) = term.losses(teacher_BLD[:rows], student_BLD[:rows], without, "chunked")
            is_mean_over_sentences = kind == "pooled" and distance == "similarity"
            share = 1.0 if is_mean_over_sentences else rows / len(teacher_BLD)
            assert loss.item() == pytest.approx(share * expected.item(), rel=1e-6, abs=1e-12)
            (gradient_BLD,) = torch.autograd.grad(loss, student_BLD)
            assert gradient_BLD.isfinite().all()
            assert not gradient_BLD[rows].any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("distance", DISTANCES)
def test_half_precision_states_are_pooled_and_compared_in_fp32(distance: str, dtype: torch.dtype) -> None:
    """The result is that of the rounded states, to the precision of fp32."""
    mask, parts = UNITS["separate"]
    term, teacher_BLD, student_BLD = tail(distance), states(6, 0, dtype), states(6, 1, dtype).requires_grad_()
    (loss,) = term.losses(teacher_BLD, student_BLD, mask, "chunked")
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(reference(term, teacher_BLD, student_BLD.detach(), parts), rel=1e-4)
    loss.backward()
    assert student_BLD.grad is not None
    assert student_BLD.grad.dtype == dtype
    assert student_BLD.grad.abs().sum() > 0


@pytest.mark.parametrize("units", ["joined", "separate"])
def test_two_ranks_have_the_loss_and_gradient_of_one(units: str) -> None:
    """Each rank sees the other's vectors without a graph. Its gradients are averaged with the other's, as an engine does."""
    mask, _ = UNITS[units]
    teacher_BLD, student_BLD = states(6, 0), states(6, 1).requires_grad_()
    (alone,) = tail("similarity").losses(teacher_BLD, student_BLD, mask, "chunked")
    alone.backward()
    shared: dict[int, torch.Tensor] = {}
    halves = [slice(0, 1), slice(1, 4)] if units == "separate" else [slice(0, 2), slice(2, 4)]
    of_ranks = [states(6, 1)[half].clone().requires_grad_() for half in halves]
    losses = []
    for again in range(2):  # the first turn finds out what the other rank has
        for rank, half in enumerate(halves):

            def gather(rows, rank=rank):
                shared[rank] = rows.detach()
                return [rows if r == rank else shared.get(r, rows.detach()) for r in range(2)]

            documents = None if mask.documents is None else Documents(mask.documents.segments_BS[half])
            term = tail("similarity", gather_rows=gather)
            (loss,) = term.losses(teacher_BLD[half], of_ranks[rank], SequenceMask(None, documents), "chunked")
            if again:
                losses.append(loss.item())
                loss.backward()
    assert losses == pytest.approx([alone.item()] * 2, rel=1e-12)
    averaged = torch.cat([x.grad for x in of_ranks]) / 2
    assert student_BLD.grad is not None
    assert torch.allclose(averaged, student_BLD.grad, rtol=1e-9, atol=1e-14)


def test_one_sentence_has_nothing_to_be_compared_with() -> None:
    student_BLD = states(6, 1)[:1].requires_grad_()
    (loss,) = tail("similarity").losses(states(6, 0)[:1], student_BLD, SequenceMask(), "chunked")
    loss.backward()
    assert loss.item() == 0
    assert student_BLD.grad is not None
    assert not student_BLD.grad.any()


def make(relations: RelationsConfig, dtype: torch.dtype = torch.float32, **changes):
    """(module, student) of tiny models; the student is narrower than its teacher unless `changes` says otherwise."""
    options = {"layers": 2, "hidden": 24, "heads": 2, "dropout": 0.0, **changes}
    student = build_student(tiny_encoder("xlm-roberta"), StudentConfig(**options), 3, relations)
    teacher = load_teacher(tiny_encoder("xlm-roberta"), None, dtype, "cpu", **relations.tap_options)
    return DistillModule(teacher, student.tapped, relations, student.basis_Dd, projection=student.projection), student


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_weight_of_the_student_and_the_projection_is_trained(distance: str, dtype: torch.dtype) -> None:
    relations = RelationsConfig(heads=12, tail="pooled", pooling="mean", pooled_distance=distance, tail_weight=0.5)
    module, student = make(relations, dtype)
    assert not student.untrained
    assert (SENTENCE_PROJECTION in student.trained) == (distance != "similarity")
    assert {id(p) for p in module.parameters()} == {id(p) for p in student.trained.values()}
    rows, _ = padded_rows([20, 9, 3])
    loss, parts = module(rows, torch.tensor([20, 9, 3]))
    assert module.part_names == ["q-q", "k-k", "v-v", "pooled"]
    assert loss.item() == pytest.approx((parts[:3].sum() + 0.5 * parts[3]).item(), rel=1e-5)
    loss.backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in student.trained.values())
    assert student.model.encoder.layer[-1].output.dense.weight.grad.norm() > 0
    if student.projection is not None:
        assert student.projection.weight.grad.norm() > 0


def test_held_out_losses_have_no_tail() -> None:
    rows = random_rows(3, 20)
    plain, _ = make(RelationsConfig(heads=12))
    pooled, _ = make(RelationsConfig(heads=12, tail="pooled", pooling="mean", tail_weight=7.0))
    assert torch.equal(plain.losses_by_row(rows), pooled.losses_by_row(rows))


def test_both_tails_have_weights_of_their_own() -> None:
    relations = RelationsConfig(
        heads=12, tail="mse+pooled", pooling="last", tail_weight=2.0, pooled_weight=5.0, pairs={"v-v": 1.0}
    )
    module, student = make(relations, hidden=48, heads=4)
    loss, parts = module(random_rows(3, 20))
    assert module.part_names == ["v-v", "output", "pooled"]
    assert loss.item() == pytest.approx((parts[0] + 2 * parts[1] + 5 * parts[2]).item(), rel=1e-6)
    assert student.projection is None, "equal widths need none"
    assert all(module.relation_maps(random_rows(2, 20), name).shape[0] == 2 for name in module.part_names)


def test_the_projection_of_a_projected_student_starts_from_its_basis() -> None:
    relations = RelationsConfig(heads=12, tail="pooled", pooling="mean")
    config = StudentConfig(layers=2, hidden=24, heads=2, init="project")
    calibration = Calibration(random_rows(8, 20), 12)
    student = build_student(tiny_encoder("xlm-roberta"), config, 3, relations, calibration)
    assert student.projection is not None
    assert torch.equal(student.projection.weight, student.basis_Dd)


def test_the_projection_leaves_the_random_start_as_it_was() -> None:
    """A student with a projection has the weights of one without, and the process's random state is not used."""
    before = torch.get_rng_state()
    _, plain = make(RelationsConfig(heads=12))
    _, pooled = make(RelationsConfig(heads=12, tail="pooled", pooling="mean"))
    assert torch.equal(before, torch.get_rng_state())
    for name, tensor in plain.model.state_dict().items():
        assert torch.equal(tensor, pooled.model.state_dict()[name]), name


def test_a_batch_is_read_without_waiting_for_the_device() -> None:
    for distance in DISTANCES:
        module, _ = make(
            RelationsConfig(heads=12, tail="pooled", pooling="mean", pooled_distance=distance, backend="chunked")
        )
        plain, _ = make(RelationsConfig(heads=12, backend="chunked"))
        segments = torch.tensor([[8, 12, 0], [3, 7, 10]])
        counts = []
        for each in (plain, module):
            with HostReads() as reads:
                each(random_rows(2, 20), segments=segments)
            counts.append(reads.count)
        assert counts[0] == counts[1], distance


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tail": "pooled", "pooled_temperature": 0.0}, "relations.pooled_temperature` is 0.0"),
        ({"tail": "pooled", "pooled_temperature": float("nan")}, "relations.pooled_temperature` is nan"),
        ({"tail": "pooled", "pooled_weight": -1.0}, "relations.pooled_weight` is -1.0"),
    ],
)
def test_invalid_settings_are_explained(options: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        RelationsConfig(**options)


def test_a_pooling_that_is_not_resolved_is_a_fault_of_the_caller() -> None:
    with pytest.raises(ValueError, match="resolved"):
        make(RelationsConfig(heads=12, tail="pooled"))
