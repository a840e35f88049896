"""Rank program: train a small real module under the engine, with saves and loads, and report losses and state digests."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from pathlib import Path

import torch

from pipeline.runtime import checkpoint, dist
from pipeline.runtime.engine import StudentEngine
from pipeline.runtime.schedule import OptimizerConfig


class Regressor(torch.nn.Module):
    """Odd sizes on purpose: nothing divides by the number of ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = torch.nn.Linear(7, 33)
        self.norm = torch.nn.LayerNorm(33)
        self.outer = torch.nn.Linear(33, 3)

    def forward(self, x_BD: torch.Tensor, y_BC: torch.Tensor) -> torch.Tensor:
        x_BD = x_BD.to(self.inner.weight.dtype)
        return ((self.outer(self.norm(torch.tanh(self.inner(x_BD)))).float() - y_BC) ** 2).mean()


def main(options: dict, report: Path) -> None:
    launch = dist.read_launch()
    dist.init_process_group(launch, 120)
    torch.manual_seed(0)
    module = Regressor()
    trained = dict(module.named_parameters())
    optimizer = OptimizerConfig(lr=1e-2, warmup_steps=0, weight_decay=0.1)
    world = launch.world_size
    config = {
        "train_batch_size": 8,
        "train_micro_batch_size_per_gpu": 8 // world,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 1.0,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True, "weight_decay": 0.1}},
        "zero_optimization": {"stage": options["stage"], **options.get("zero", {})},
        "zero_force_ds_cpu_optimizer": False,
        "fp16": {"enabled": False},
        "bf16": {"enabled": options["precision"] == "bf16"},
        "steps_per_print": 2**62,
    }
    engine = StudentEngine(module, trained, optimizer, config)
    directory = Path(options["directory"])
    first = 0
    if options.get("load"):
        reader = checkpoint.CheckpointReader(directory / f"step-{options['load']:08d}")
        reader.check_names(trained)
        engine.load(reader.read, reader.state["adam_step"], reader.state["scaler"])
        first = reader.state["step"]
    loaded = digest(engine)
    losses, norms, skipped = [], [], []
    for step in range(first, options["steps"]):
        generator = torch.Generator().manual_seed(step)
        x, y = torch.randn(8, 7, generator=generator), torch.randn(8, 3, generator=generator)
        mine = slice(launch.rank * 8 // world, (launch.rank + 1) * 8 // world)
        if step == options.get("poison_step") and launch.rank == options["poison_rank"]:
            x[mine] = float("nan")
        loss = engine(x[mine], y[mine])
        engine.backward(loss)
        result = engine.step(1e-2)
        assert result is not None
        losses.append(float(dist.sum_over_ranks(loss.detach().clone().reshape(1)).item()) / world)
        norms.append(result.gradient_norm)
        skipped.append(result.skipped)
        if step + 1 in options.get("save", []):
            state = {"step": step + 1, "adam_step": engine.adam_step(), "scaler": engine.scaler_state()}
            state["parameters"] = engine.shapes
            problem = checkpoint.save(directory, engine, {"tail.weight": torch.arange(3.0)}, state, launch.rank)
            assert problem is None, problem
    final = digest(engine)
    report.write_text(
        json.dumps({"losses": losses, "norms": norms, "skipped": skipped, "loaded": loaded, "final": final})
    )
    dist.shut_down()


def digest(engine: StudentEngine) -> dict[str, str]:
    """One hash per owned fragment and kind, keyed by where it lies in the parameter."""
    hashes = {}
    for f in engine.fragments():
        kinds = {"weight": f.view(f.buffer), **{m: engine.moment(f, m) for m in checkpoint.MOMENTS}}
        for kind, tensor in kinds.items():
            hashes[f"{kind} {f.name} {f.start} {f.numel}"] = hashlib.sha256(tensor.cpu().numpy().tobytes()).hexdigest()
    return hashes


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
    os._exit(0)  # as pipeline/train.py does, and for its reason
