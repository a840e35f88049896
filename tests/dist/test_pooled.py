"""Runs with `relations.tail: pooled`: equal on one and two ranks, resumed bit for bit, and exported with their projection.

tests/dist/test_family.py trains such students at every ZeRO stage and in every precision.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.config import load_recipe
from pipeline.distillation.models.student import SENTENCE_PROJECTION
from pipeline.errors import EXIT_USER
from pipeline.evaluation.pooling import read_dense
from pipeline.export.hf import export_run
from pipeline.export.sentence_transformers_files import add_sentence_transformers
from pipeline.runtime.checkpoint import read_model_weights
from tests.dist.runs import curve
from tests.faults.sweeps.lab import Lab, newest, same_end, state_of

SIMILARITY: dict[str, Any] = {
    "steps": 3,
    "relations.tail": "pooled",
    "relations.pooled_distance": "similarity",
    "relations.tail_weight": 5.0,
    "documents": "separate",
}
COSINE: dict[str, Any] = {"steps": 6, "save_every": 3, "relations.tail": "pooled", "relations.tail_weight": 5.0}


def test_similarities_are_those_of_all_ranks(lab: Lab) -> None:
    """One rank with 8 rows, and two with 4, whose rows have different numbers of documents."""
    one, two = (lab.untouched(ranks, {**SIMILARITY, "micro_batch_per_gpu": 8 // ranks}) for ranks in (1, 2))
    assert curve(two) == pytest.approx(curve(one), rel=1e-5)
    ours, theirs = (state_of(newest(run)) for run in (one, two))
    for key, tensor in ours.items():
        assert torch.allclose(tensor, theirs[key], rtol=1e-3, atol=1e-5), key
    halves = lab.untouched(1, {**SIMILARITY, "micro_batch_per_gpu": 4})
    first = [next(iter(curve(run).values())) for run in (one, halves)]
    assert abs(first[0] - first[1]) > 1e-3, "a micro-batch decides which sentences are compared"


def test_one_row_has_no_similarity(lab: Lab) -> None:
    run_dir = lab.fresh("single")
    assert lab.run(run_dir, 1, {**SIMILARITY, "micro_batch_per_gpu": 1}) == EXIT_USER
    log = run_dir.with_suffix(".log").read_text()
    assert "that is one row" in log
    assert "Raise micro_batch_per_gpu" in log


def test_a_projection_is_resumed_and_exported(lab: Lab, tmp_path: Path) -> None:
    """Of a student that is narrower than its teacher, whose files name pooling and a prefix."""
    teacher = shutil.copytree(load_recipe(lab.recipe, []).teacher, lab.directory / "teacher-with-files")
    modules = [{"type": "sentence_transformers.models.Pooling", "path": "1_Pooling"}]
    (teacher / "modules.json").write_text(json.dumps(modules))
    (teacher / "1_Pooling").mkdir()
    pooling = teacher / "1_Pooling" / "config.json"
    pooling.write_text(json.dumps({"pooling_mode": "lasttoken"}))
    (teacher / "config_sentence_transformers.json").write_text(json.dumps({"prompts": {"query": "query: "}}))
    settings = {**COSINE, "teacher": str(teacher)}
    undisturbed = lab.untouched(2, settings, 3)
    stopped = lab.fresh("stopped")
    assert lab.run(stopped, 2, settings, 3, [{"kind": "signal", "signal": "SIGUSR1", "step": 3}]) == 0
    pooling.write_text(json.dumps({"pooling_mode": "cls"}))
    assert lab.run(stopped, 2, settings, 3) == EXIT_USER
    assert "pooling of sentence vectors: last -> cls" in stopped.with_suffix(".log").read_text()
    pooling.write_text(json.dumps({"pooling_mode": "lasttoken"}))
    assert lab.run(stopped, 2, settings, 3) == 0
    assert same_end(stopped, undisturbed)
    output = stopped.with_suffix(".log").read_text()
    assert "the teacher's users put a prefix before their text (query 'query: ')" in output
    assert "--set documents=separate" in output
    assert f"sentence vectors by last pooling (the modules.json of {teacher}), compared by cosine" in output

    student = export_run(stopped, tmp_path / "student", [add_sentence_transformers])
    weights, _ = read_model_weights(stopped)
    exported = read_dense(student)
    assert exported is not None
    assert exported.weight_Ed.shape == (48, 24)
    assert torch.equal(exported.weight_Ed, weights[SENTENCE_PROJECTION])
    kinds = [module["type"].rpartition(".")[2] for module in json.loads((student / "modules.json").read_text())]
    assert kinds == ["Transformer", "Pooling", "Dense"], "the teacher does not normalise"
    assert json.loads((student / "1_Pooling" / "config.json").read_text())["pooling_mode_lasttoken"] is True
    assert json.loads((student / "config_sentence_transformers.json").read_text())["prompts"] == {"query": "query: "}
