"""Separate documents: what teacher and student compute of a packed row is what they compute of each document alone."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch.nn.functional import linear, scaled_dot_product_attention
from transformers import PreTrainedModel

from pipeline.distillation.config import RelationsConfig
from pipeline.distillation.distiller import DistillModule, Hooks
from pipeline.distillation.documents import Documents
from pipeline.distillation.models.architectures import first_position
from pipeline.distillation.models.student import StudentConfig, build_student, recompute_activations
from pipeline.distillation.models.teacher import load_teacher
from pipeline.distillation.relations.reference import relation_kl_reference
from pipeline.distillation.shared_teacher import SharedTeacher
from pipeline.distillation.tap import TappedEncoder, tap
from pipeline.errors import UserError
from tests.tiny_encoders import CONFIGS, random_rows, tiny_encoder

LENGTH = 40
LENGTHS = [[40], [13, 27], [8, 9, 7, 16], [16, 4, 20], [1, 2, 3, 4, 30]]
SEGMENTS = torch.tensor([parts + [0] * (5 - len(parts)) for parts in LENGTHS])
LAYERS = [1, 3, 4]
# transformers computes complete maps in these two. A row's map has more columns than a document's, and is summed in another order.
COMPLETE_MAPS = ("mpnet", "deberta-v2")
# With fewer rows a matrix product uses another kernel (`test_products_of_few_rows_use_another_kernel`).
FEW_ROWS = 16


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The number of rows from which a product uses another kernel depends on the threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def encoder(model_type: str, **changes) -> PreTrainedModel:
    """The tiny encoder, without the convolution of DeBERTa-v2, over which documents cannot be kept apart."""
    return tiny_encoder(model_type, **({"conv_kernel_size": 0} if model_type == "deberta-v2" else {}), **changes)


def tensors_of(tapped: TappedEncoder, rows_BL: torch.Tensor, mask: Documents | None = None) -> torch.Tensor:
    """Q, K and V of the tapped layers, and the output, [B, L, all channels]."""
    layers, output_BLD = tapped(rows_BL, mask)
    return torch.cat([*(x_BLD for layer in layers for x_BLD in layer), output_BLD], -1)


def pieces_of(lengths: list[list[int]]) -> Iterator[tuple[int, int, int]]:
    """(row, start, end) of every document."""
    for row, parts in enumerate(lengths):
        for number, length in enumerate(parts):
            start = sum(parts[:number])
            yield row, start, start + length


def alone(model: PreTrainedModel, rows_BL: torch.Tensor, row: int, start: int, end: int) -> torch.Tensor:
    """The tensors of one document in a row of its own, [L, all channels]; of a short one, in a batch of equal rows."""
    copies = -(-FEW_ROWS // (end - start))
    return tensors_of(tap(model, LAYERS, with_output=True), rows_BL[row : row + 1, start:end].repeat(copies, 1))[0]


@torch.no_grad()
@pytest.mark.parametrize("model_type", CONFIGS)
def test_a_packed_row_is_each_document_alone(model_type: str) -> None:
    """With positions that restart: to the last bit in fp32, where attention is torch's."""
    model, rows_BL = encoder(model_type), random_rows(len(LENGTHS), LENGTH)
    packed_BLC = tensors_of(tap(model, LAYERS, with_output=True), rows_BL, Documents(SEGMENTS, restart_positions=True))
    for row, start, end in pieces_of(LENGTHS):
        expected_LC = alone(model, rows_BL, row, start, end)
        if model_type in COMPLETE_MAPS:
            assert torch.allclose(packed_BLC[row, start:end], expected_LC, rtol=1e-5, atol=1e-5)
        else:
            assert torch.equal(packed_BLC[row, start:end], expected_LC)


def test_products_of_few_rows_use_another_kernel() -> None:
    """Why a document of three tokens has other last bits in a batch of its own, also without any attention."""
    x_ND, weight = random_numbers(64, 48), random_numbers(96, 48)
    complete = linear(x_ND, weight)
    assert torch.equal(linear(x_ND[:FEW_ROWS], weight), complete[:FEW_ROWS])
    assert torch.allclose(linear(x_ND[:3], weight), complete[:3], rtol=1e-5, atol=1e-5)


def random_numbers(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
@pytest.mark.parametrize("model_type", CONFIGS)
def test_positions_continue_along_the_row_by_default(model_type: str) -> None:
    model, rows_BL = encoder(model_type), random_rows(len(LENGTHS), LENGTH)
    packed_BLC = tensors_of(tap(model, LAYERS, with_output=True), rows_BL, Documents(SEGMENTS))
    for row, start, end in pieces_of(LENGTHS):
        positions_1L = torch.arange(start, end)[None] + first_position(model)
        output_1LD = model(input_ids=rows_BL[row : row + 1, start:end], position_ids=positions_1L).last_hidden_state
        assert torch.allclose(packed_BLC[row, start:end, -48:], output_1LD[0], rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize("by_document", [False, True])
@pytest.mark.parametrize("model_type", CONFIGS)
def test_the_text_of_one_document_changes_no_bit_of_another(model_type: str, by_document: bool, restart: bool) -> None:
    """Neither with attention document by document nor with one mask for all, as on GPUs and in compiled layers."""
    tapped = tap(encoder(model_type), LAYERS, with_output=True)
    tapped.attends_by_document = by_document
    rows_BL, documents = random_rows(len(LENGTHS), LENGTH), Documents(SEGMENTS, restart)
    changed_BL = rows_BL.clone()
    for row, start, end in pieces_of([parts[:1] for parts in LENGTHS]):
        changed_BL[row, start:end] = 5
    before, after = (tensors_of(tapped, ids_BL, documents) for ids_BL in (rows_BL, changed_BL))
    for row, (first, *_) in enumerate(LENGTHS):
        assert torch.equal(before[row, first:], after[row, first:])
        assert not torch.allclose(before[row, :first], after[row, :first], atol=1e-2)


@torch.no_grad()
@pytest.mark.parametrize("model_type", CONFIGS)
def test_one_mask_for_all_documents_gives_the_same(model_type: str) -> None:
    tapped, rows_BL = tap(encoder(model_type), LAYERS, with_output=True), random_rows(len(LENGTHS), LENGTH)
    one_by_one = tensors_of(tapped, rows_BL, Documents(SEGMENTS, True))
    tapped.attends_by_document = False
    assert torch.allclose(tensors_of(tapped, rows_BL, Documents(SEGMENTS, True)), one_by_one, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("by_document", [False, True])
def test_windows_end_where_they_do_in_a_document_alone(by_document: bool) -> None:
    """A window of 16 tokens to either side, and documents that are as long, one token shorter and longer, and much longer."""
    model, rows_BL = encoder("modernbert", local_attention=32), random_rows(1, 80)
    tapped = tap(model, LAYERS, with_output=True)
    tapped.attends_by_document = by_document
    lengths = [[15, 16, 17, 32]]
    packed_BLC = tensors_of(tapped, rows_BL, Documents(torch.tensor(lengths), True))
    for row, start, end in pieces_of(lengths):
        expected_LC = alone(model, rows_BL, row, start, end)
        assert torch.allclose(packed_BLC[row, start:end], expected_LC, rtol=1e-5, atol=1e-5)
        assert not by_document or torch.equal(packed_BLC[row, start:end], expected_LC)
    complete = encoder("modernbert", local_attention=32, layer_types=["full_attention"] * 4)
    without_window = alone(complete, rows_BL, 0, 48, 80)
    assert not torch.allclose(packed_BLC[0, 48:80], without_window, atol=1e-3), "the window is not seen in this test"


@torch.no_grad()
def test_queries_and_keys_are_rotated_by_positions_in_the_document() -> None:
    model, rows_BL = encoder("modernbert"), random_rows(1, LENGTH)
    tapped = tap(model, 3, after_rotary=True)
    restart, along_the_row = (tapped(rows_BL, Documents(torch.tensor([[20, 20]]), kind)) for kind in (True, False))
    for rotated, other, expected in zip(restart, along_the_row, tapped(rows_BL[:, 20:]), strict=True):
        assert torch.equal(rotated[:, 20:], expected)
        is_rotated = not torch.allclose(other[:, 20:], expected, rtol=1e-4, atol=1e-4)
        assert is_rotated == (rotated is not restart[2]), "V is never rotated"


@pytest.mark.parametrize(
    ("model_type", "recomputed"),
    [*((name, False) for name in CONFIGS), *((name, True) for name in ("bert", "modernbert", "deberta-v2"))],
)
def test_gradients_are_the_sum_of_those_of_the_documents(model_type: str, recomputed: bool) -> None:
    """In float64, also where activations are recomputed in backward."""
    model, rows_BL = encoder(model_type).double(), random_rows(len(LENGTHS), LENGTH)
    if recomputed:
        recompute_activations(model)
        model.train()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        model.config.attention_dropout = 0.0

    def gradients(*losses: torch.Tensor) -> dict[str, torch.Tensor]:
        model.zero_grad()
        for loss in losses:
            loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    tapped = tap(model, LAYERS, with_output=True)
    packed = gradients(tensors_of(tapped, rows_BL, Documents(SEGMENTS, True)).square().sum())
    pieces = [rows_BL[row : row + 1, start:end] for row, start, end in pieces_of(LENGTHS)]
    expected = gradients(*(tensors_of(tapped, piece_1L).square().sum() for piece_1L in pieces))
    assert packed.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (packed[name] - gradient).norm() <= 1e-6 * gradient.norm() + 1e-6, name


@pytest.mark.parametrize("model_type", CONFIGS)
def test_the_loss_is_that_of_each_document_alone(model_type: str) -> None:
    relations, teacher_model = RelationsConfig(heads=12), encoder(model_type)
    student = build_student(teacher_model, StudentConfig(layers=2, hidden=24, heads=2, dropout=0.0), 3, relations)
    hooks = Hooks(restart_positions=True)
    module = DistillModule(load_teacher(encoder(model_type)), student.tapped, relations, hooks=hooks)
    rows_BL = random_rows(len(LENGTHS), LENGTH)
    expected_B = torch.zeros(len(LENGTHS))
    with torch.no_grad():
        for row, start, end in pieces_of(LENGTHS):
            of_both = (
                tap(model, layer)(rows_BL[row : row + 1, start:end])
                for model, layer in ((teacher_model, 4), (student.model, 2))
            )
            kl = sum(relation_kl_reference(x_T, x_S, 12).item() for x_T, x_S in zip(*of_both, strict=True))
            expected_B[row] += kl * (end - start) / LENGTH
    assert module.losses_by_row(rows_BL, segments=SEGMENTS).tolist() == pytest.approx(expected_B.tolist(), rel=1e-3)
    assert module(rows_BL, segments=SEGMENTS)[0].item() == pytest.approx(expected_B.mean().item(), rel=1e-3)


@torch.no_grad()
def test_padding_behind_the_last_document_changes_nothing() -> None:
    model, rows_BL = encoder("xlm-roberta"), random_rows(1, 30)
    padded_BL = torch.cat([rows_BL, torch.ones(1, 10, dtype=torch.long)], 1)
    of_rows = [
        tensors_of(tap(model, LAYERS, with_output=True), ids_BL, Documents(torch.tensor([[12, 18]]), True))
        for ids_BL in (rows_BL, padded_BL)
    ]
    assert torch.equal(of_rows[0], of_rows[1][:, :30])


def test_students_that_share_a_teacher_read_the_same_documents() -> None:
    relations, rows_BL = RelationsConfig(heads=12, teacher_layer=3), random_rows(2, LENGTH)
    teacher = load_teacher(encoder("modernbert"), [3])
    shared = SharedTeacher(teacher, [3], teacher.widths, False)
    documents = Documents(SEGMENTS[1:3], True)
    for ours, expected in zip(shared.view(relations)(rows_BL, documents), teacher(rows_BL, documents)[0], strict=True):
        assert torch.equal(ours, expected)


def test_dropout_is_drawn_again_for_each_seed() -> None:
    """Attention's own dropout too, which each document's call applies."""
    tapped = tap(encoder("bert", attention_probs_dropout_prob=0.5, hidden_dropout_prob=0.0), LAYERS, True).train()
    results = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        results.append(tensors_of(tapped, random_rows(len(LENGTHS), LENGTH), Documents(SEGMENTS)))
    assert torch.equal(results[0], results[1])
    assert not torch.allclose(results[0], results[2], atol=1e-2)


def test_a_convolution_over_documents_is_an_error() -> None:
    with pytest.raises(UserError, match=r"(?s)conv_kernel_size: 3.*--set documents=joined"):
        tap(tiny_encoder("deberta-v2"), 3)(random_rows(1, LENGTH), Documents(SEGMENTS[:1]))


def test_a_mask_without_values_is_for_attention_alone() -> None:
    mask = Documents(SEGMENTS).attention(random_rows(len(LENGTHS), LENGTH))
    assert mask.shape == (len(LENGTHS), 1, LENGTH, LENGTH)
    query_BHLd = random_numbers(len(LENGTHS), 2, LENGTH, 8)
    windowed = Documents(SEGMENTS).attention(random_rows(len(LENGTHS), LENGTH), window=4)
    results = [
        scaled_dot_product_attention(query_BHLd, query_BHLd, query_BHLd, attn_mask=given)
        for given in (mask, mask.detach(), windowed, windowed.detach())
    ]
    assert torch.equal(*results[:2])
    assert torch.equal(*results[2:])
    assert not torch.allclose(*results[1:3], atol=1e-2)
    for use in (lambda: mask + 1, lambda: query_BHLd.masked_fill(mask, 0), mask.bool, lambda: mask[:, :, :3]):
        with pytest.raises(RuntimeError, match="only attention can use it"):
            use()
