"""Checkpoints of a fine-tuning: one after each epoch, in the format of training checkpoints.

`step-N/` has fp32 weights, Adam's moments, the weights of the best epoch so far (in the file for untrained weights) and
`state.json`. The manifest has size and sha256 of each file. Nothing is pickled.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from data_prep.durable_files import unique_name
from pipeline.errors import UserError
from pipeline.runtime.checkpoint import CheckpointConfig, newest_valid, prune
from pipeline.runtime.checkpoint_files import UNTRAINED_FILE, checkpoint_path, commit, fsync_and_hash, untrained_file
from pipeline.runtime.dist import Launch
from pipeline.runtime.json_files import read_json
from pipeline.runtime.optimizer import MOMENTS
from pipeline.runtime.tensor_files import save_tensors

Weights = dict[str, torch.Tensor]


def weights_of(model: torch.nn.Module) -> Weights:
    """Copies of the parameters on the CPU, by name."""
    return {name: p.detach().to("cpu", copy=True).contiguous() for name, p in model.named_parameters()}


@torch.no_grad()
def put_weights(model: torch.nn.Module, weights: Weights) -> None:
    """Copy weights by name into the model."""
    for name, parameter in model.named_parameters():
        parameter.copy_(weights[name])


def save(
    directory: Path, model: torch.nn.Module, adam: torch.optim.Optimizer, best: Weights, state: dict[str, Any]
) -> None:
    """Commit the state after an epoch and delete the one before. Only rank 0 calls it; all ranks have the same state."""
    final = checkpoint_path(directory, state["step"])
    partial = unique_name(final, ".tmp")
    partial.mkdir(parents=True)
    moments = {
        kind: {
            name: adam.state[parameter][kind].cpu().contiguous()
            for name, parameter in model.named_parameters()
            if parameter in adam.state
        }
        for kind in MOMENTS
    }
    contents = {"weight": weights_of(model), **moments}
    # As in a training checkpoint of one rank: flat tensors, named by parameter and offset.
    files = {
        f"{kind}-00000-of-00001.safetensors": {f"{name}:0": tensor.flatten() for name, tensor in tensors.items()}
        for kind, tensors in contents.items()
    }
    files[UNTRAINED_FILE] = best
    for name, tensors in files.items():
        save_tensors(tensors, partial / name)
    (partial / "state.json").write_text(json.dumps(state), encoding="utf-8")
    commit(partial, final, {name: fsync_and_hash(partial / name) for name in [*files, "state.json"]})
    prune(directory, CheckpointConfig(keep=1))


def resume(
    directory: Path, model: torch.nn.Module, adam: torch.optim.Optimizer, ranks: Launch
) -> tuple[Weights, dict[str, Any]] | None:
    """Load the newest valid state into model and optimizer. Returns the best weights and the state; None without one."""
    path = Path(chosen) if (chosen := ranks.from_main(_newest(directory) if ranks.is_main else None)) else None
    if path is None:
        return None
    state = read_json(path / "state.json")
    tensors = {kind: load_file(path / f"{kind}-00000-of-00001.safetensors") for kind in ("weight", *MOMENTS)}
    put_weights(model, {name: tensors["weight"][f"{name}:0"].view(p.shape) for name, p in model.named_parameters()})
    for name, parameter in model.named_parameters():
        if f"{name}:0" in tensors[MOMENTS[0]]:
            moments = {kind: tensors[kind][f"{name}:0"].view(parameter.shape).to(parameter.device) for kind in MOMENTS}
            num_updates = state["step"] - state.get("skipped", 0)
            adam.state[parameter] = {"step": torch.tensor(float(num_updates)), **moments}
    return load_file(untrained_file(path)), state


def _newest(directory: Path) -> str | None:
    try:
        path, _ = newest_valid(directory)
    except UserError as error:
        raise UserError(f"{error}. To start this fine-tuning again, delete {directory}") from None
    return str(path) if path else None
