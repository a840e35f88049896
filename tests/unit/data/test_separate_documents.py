"""`documents: separate` from shards to losses: each document of a row counts as if it were a row of its own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from data_prep.shards import ShardSet
from pipeline.config import load_recipe
from pipeline.data.batches import Batch, BatchOptions, BatchSource, Prefetcher
from pipeline.data.heldout import heldout_losses
from pipeline.distillation.config import RelationsConfig
from pipeline.distillation.distiller import DistillModule
from pipeline.distillation.models.student import StudentConfig, build_student
from pipeline.distillation.models.teacher import load_encoder, load_teacher
from pipeline.distillation.relations.reference import relation_kl_reference
from pipeline.errors import UserError
from pipeline.provenance import changed_keys, resume_critical_config
from pipeline.runtime.dist import Launch

SEQ_LEN, TEACHER_LAYER, STUDENT_LAYER, HEADS = 64, 3, 2, 12
FIRST_POSITION = 2  # XLM-R counts positions from its padding id on


@pytest.fixture(scope="module")
def source(tiny_shards: Path) -> BatchSource:
    return BatchSource(ShardSet(tiny_shards), BatchOptions(SEQ_LEN, 0.3, 0, heldout_rows=3, documents="separate"))


@pytest.fixture(scope="module")
def models(tiny_teacher: Path) -> tuple[PreTrainedModel, PreTrainedModel, DistillModule]:
    """The complete teacher, the student, and the module that distils one into the other."""
    relations = RelationsConfig(teacher_layer=TEACHER_LAYER, heads=HEADS)
    teacher_model = load_encoder(str(tiny_teacher))
    config = StudentConfig(layers=2, hidden=24, heads=4, dropout=0.0)
    student = build_student(teacher_model, config, 0, relations)
    teacher = load_teacher(load_encoder(str(tiny_teacher)), TEACHER_LAYER, torch.float32, "cpu")
    return teacher_model.eval(), student.model.eval(), DistillModule(teacher, student.tapped, relations)


def projections_alone(
    model: PreTrainedModel, layer: int, ids_1L: torch.Tensor, first_position: int
) -> list[torch.Tensor]:
    """Q, K, V of one document in a batch of its own, at the positions that it has in its row."""
    positions_1L = torch.arange(ids_1L.shape[1])[None] + first_position + FIRST_POSITION
    hidden = model(input_ids=ids_1L, position_ids=positions_1L, output_hidden_states=True).hidden_states[layer - 1]
    attention = model.encoder.layer[layer - 1].attention.self
    return [attention.query(hidden), attention.key(hidden), attention.value(hidden)]


@torch.no_grad()
def loss_of_documents_alone(teacher: PreTrainedModel, student: PreTrainedModel, row_L: torch.Tensor, parts) -> float:
    """The loss of every document in a row of its own, weighted by its share of the row's tokens."""
    total, start = 0.0, 0
    for size in parts:
        ids_1L = row_L[None, start : start + size]
        of_both = zip(
            projections_alone(teacher, TEACHER_LAYER, ids_1L, start),
            projections_alone(student, STUDENT_LAYER, ids_1L, start),
            strict=True,
        )
        total += size / len(row_L) * sum(relation_kl_reference(t, s, HEADS).item() for t, s in of_both)
        start += size
    return total


def mixed_batch(source: BatchSource) -> Batch:
    """A batch from the prefetcher, as in training; some rows hold several documents."""
    with Prefetcher(source, [np.arange(24)]) as batches:
        batch = next(iter(batches))
    assert batch.segments_BS is not None
    assert ((batch.segments_BS > 0).sum(1) > 1).any()
    return batch


def test_losses_are_those_of_each_document_alone(source: BatchSource, models) -> None:
    teacher, student, module = models
    batch = mixed_batch(source)
    by_row = module.losses_by_row(batch.input_ids_BL, segments=batch.segments_BS)
    documents = [[n for n in row if n] for row in batch.segments_BS.tolist()]
    expected = [
        loss_of_documents_alone(teacher, student, row_L, parts)
        for row_L, parts in zip(batch.input_ids_BL, documents, strict=True)
    ]
    assert by_row.tolist() == pytest.approx(expected, rel=1e-4)
    assert module(batch.input_ids_BL, segments=batch.segments_BS)[0].item() == pytest.approx(
        np.mean(expected), rel=1e-4
    )
    joined = module.losses_by_row(batch.input_ids_BL)
    several = torch.tensor([len(parts) > 1 for parts in documents])
    assert not torch.isclose(by_row, joined, rtol=1e-3)[several].any()


def test_heldout_losses_keep_documents_apart(source: BatchSource, models) -> None:
    _, _, module = models
    (losses,) = heldout_losses([module.losses_by_row], source, 5, Launch(0, 1, 0, torch.device("cpu")), lambda: None)
    for language in source.languages:
        rows, segments = source.heldout_batch([language])
        assert losses[language] == pytest.approx(module.losses_by_row(rows, segments=segments).mean().item(), rel=1e-5)


def test_relation_maps_are_block_diagonal(source: BatchSource, models) -> None:
    batch = mixed_batch(source)
    several = int((batch.segments_BS > 0).sum(1).argmax())
    segments = batch.segments_BS[several : several + 1]
    maps = models[2].relation_maps(batch.input_ids_BL[several : several + 1], "v-v", segments=segments)
    first = int(segments[0, 0])
    assert maps[..., :first, first:].abs().max() == 0
    assert torch.allclose(maps.sum(-1), torch.ones(()), atol=1e-5)


def test_the_key_is_part_of_the_resume_critical_config(tiny_recipe: Path) -> None:
    joined, separate = (
        resume_critical_config(load_recipe(tiny_recipe, [f"documents={x}"])) for x in ("joined", "separate")
    )
    assert joined == resume_critical_config(load_recipe(tiny_recipe, []))
    assert {key for key in joined if joined[key] != separate[key]} == {"documents"}


def test_a_run_that_began_without_the_key_counts_positions_along_the_row(tiny_recipe: Path) -> None:
    """As runs of versions before it did: such a run resumes, and not with other positions."""
    recipe = load_recipe(tiny_recipe, ["documents=separate"])
    begun = {key: value for key, value in resume_critical_config(recipe).items() if key != "positions"}
    assert changed_keys(begun, recipe, by_path=True) == []
    restart = load_recipe(tiny_recipe, ["documents=separate", "positions=restart"])
    assert changed_keys(begun, restart, by_path=True) == ["positions: continue -> restart"]


def test_positions_of_joined_documents_do_not_restart(tiny_recipe: Path) -> None:
    with pytest.raises(UserError, match=r"positions is restart.*--set documents=separate"):
        load_recipe(tiny_recipe, ["positions=restart"])
