"""A fine-tuning resumes from its checkpoint, also from one that was written under the former file name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pipeline.evaluation.finetuning.checkpoint import resume, save
from pipeline.evaluation.ranks import alone
from pipeline.runtime.checkpoint_files import FORMER_UNTRAINED_FILE, fsync_and_hash, manifest_text, untrained_file


@pytest.mark.parametrize("name", ["untrained.safetensors", FORMER_UNTRAINED_FILE])
def test_the_best_weights_are_read_under_either_name(name: str, tmp_path: Path) -> None:
    model = torch.nn.Linear(3, 2)
    adam = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    adam.step()
    best = {"weight": torch.full((2, 3), 7.0)}
    save(tmp_path, model, adam, best, {"step": 1, "parameters": {"weight": [2, 3], "bias": [2]}})
    (checkpoint,) = tmp_path.iterdir()
    untrained_file(checkpoint).rename(checkpoint / name)
    files = {path.name: fsync_and_hash(path) for path in checkpoint.iterdir() if path.name != "manifest.json"}
    (checkpoint / "manifest.json").write_text(manifest_text(files))
    other = torch.nn.Linear(3, 2)
    found = resume(tmp_path, other, torch.optim.AdamW(other.parameters()), alone())
    assert found is not None
    assert torch.equal(found[0]["weight"], best["weight"])
    assert torch.equal(other.weight, model.weight)
