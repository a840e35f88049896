"""Rank program: train a small real module under the engine, with saves, loads and faults; report what happened.

Options: `{"runs": [{"name", "stage", "precision", "directory", "steps", ...}]}`. The runs share one process group, so that
many cases cost one start.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import resource
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.utils import is_invalid_grad_norm

from pipeline.runtime import checkpoint, dist, zero_step
from pipeline.runtime.checkpoint_writer import CheckpointWriter
from pipeline.runtime.engine import StudentEngine
from pipeline.runtime.optimizer import MOMENTS, OptimizerConfig
from tests.host_reads import HostReads

OPTIMIZER = OptimizerConfig(lr=1e-2, warmup_steps=0, weight_decay=0.1)
ROWS = 8
zero_step.CHUNK = 100  # elements: so the gradient of `inner.weight` is summed in chunks, as that of word embeddings is


class Regressor(torch.nn.Module):
    """Odd sizes: no parameter divides by the number of ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = torch.nn.Linear(7, 33)
        self.norm = torch.nn.LayerNorm(33)
        self.outer = torch.nn.Linear(33, 3)

    def forward(self, x_BD: torch.Tensor, y_BC: torch.Tensor) -> torch.Tensor:
        x_BD = x_BD.to(self.inner.weight.dtype)
        return ((self.outer(self.norm(torch.tanh(self.inner(x_BD)))).float() - y_BC) ** 2).mean()


def make_engine(run: dict[str, Any], world_size: int) -> StudentEngine:
    torch.manual_seed(0)
    module = Regressor()
    config = {
        "train_batch_size": ROWS,
        "train_micro_batch_size_per_gpu": ROWS // world_size // run.get("accumulation", 1),
        "gradient_accumulation_steps": run.get("accumulation", 1),
        "gradient_clipping": 1.0,
        "optimizer": {
            "type": "AdamW",
            "params": {"lr": 1e-2, "torch_adam": True, "weight_decay": 0.1, "fused": not run.get("deepspeeds_step")},
        },
        "zero_optimization": {"stage": run["stage"], **run.get("zero", {})},
        "zero_force_ds_cpu_optimizer": False,
        "fp16": {
            "enabled": run["precision"] == "fp16",
            "initial_scale_power": 16,
            "loss_scale_window": run.get("window", 2),
            "hysteresis": 1,
        },
        "bf16": {"enabled": run["precision"] == "bf16"},
        "data_types": {"grad_accum_dtype": run.get("grad_accum_dtype")},
        "steps_per_print": 2**62,
    }
    return StudentEngine(module, dict(module.named_parameters()), OPTIMIZER, config)


def execute(run: dict[str, Any], launch: dist.Launch) -> dict[str, Any]:
    engine = make_engine(run, launch.world_size)
    directory = Path(run["directory"])
    report: dict[str, Any] = {
        "losses": {},
        "scales": {},
        "skipped": [],
        "unharmed": True,
        "problem": None,
        "verdicts": [],
        "verdicts_of_deepspeed": [],
        "reads": [],
        "warnings": engine.warnings,
    }
    first = 0
    if "load" in run:
        reader = checkpoint.CheckpointReader(Path(run["load"]))
        reader.check_shapes(engine.shapes)
        engine.load(reader.read, reader.state["adam_step"], reader.state["scaler"])
        first = reader.state["step"]
        if run.get("resave"):
            save(engine, Path(run["resave"]), first, launch)
    for step in range(first, run["steps"]):
        before = digest(engine)
        x, y = batch(step, launch)
        if step in run.get("poison", []) and launch.rank == launch.world_size - 1:
            x[0, 0] = float("nan")
        micro_batches = list(zip(*(rows.chunk(run.get("accumulation", 1)) for rows in (x, y)), strict=True))
        losses = []
        with HostReads() as reads:
            for micro_batch in micro_batches[:-1]:
                losses.append(engine(*micro_batch))
                engine.backward(losses[-1])
                assert engine.step(1e-2) is None
            losses.append(engine(*micro_batches[-1]))
            engine.backward(losses[-1])
        expected = verdict_of_deepspeed(engine)
        with reads:
            result = engine.step(1e-2)
        assert result is not None
        report["reads"].append(reads.count)
        report["verdicts"].append([bool(result.skipped), float(result.gradient_norm)])
        report["verdicts_of_deepspeed"].append(expected)
        loss = torch.stack(losses).detach().mean().reshape(1)
        mean = float(dist.sum_over_ranks(loss).item()) / launch.world_size
        report["losses"][step] = mean
        report["scales"][step] = float(result.loss_scale)
        if result.skipped:
            report["skipped"].append(step)
            report["unharmed"] &= digest(engine) == before
        if step + 1 in run.get("save", []):
            fault(run, step + 1)
            report["problem"] = save(engine, directory, step + 1, launch)
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    report["final"] = digest(engine)
    return report


def verdict_of_deepspeed(engine: StudentEngine) -> tuple[bool, float] | None:
    """ZeRO-1 and -2: whether DeepSpeed itself would skip the coming step, and its gradient norm (NaN if it would)."""
    zero = engine.deepspeed_engine.optimizer
    if engine.stage == 3 or not isinstance(getattr(zero.step, "__self__", None), zero_step.ZeroStep):
        return None
    before = dict(zero.averaged_gradients)
    zero.averaged_gradients.update(enumerate(zero.step.__self__.gradients()))
    norm = zero.scaled_global_norm()
    skipped = zero.has_overflow() or is_invalid_grad_norm(norm)
    zero.averaged_gradients.update(before)
    return skipped, math.nan if skipped else float(norm / engine.loss_scale)


def batch(step: int, launch: dist.Launch) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    x, y = torch.randn(ROWS, 7, generator=generator), torch.randn(ROWS, 3, generator=generator)
    share = ROWS // launch.world_size
    mine = slice(launch.rank * share, (launch.rank + 1) * share)
    return x[mine], y[mine]


def save(engine: StudentEngine, directory: Path, step: int, launch: dist.Launch) -> str | None:
    state = {"step": step, "adam_step": engine.adam_step(), "scaler": engine.scaler_state()}
    state["parameters"] = engine.shapes
    writer = CheckpointWriter(directory, {"": (engine, {"tail.weight": torch.arange(3.0)})}, launch.rank)
    writer.begin({"": state})
    outcome = writer.wait()
    assert outcome is not None
    return outcome.problem


def fault(run: dict[str, Any], step: int) -> None:
    """In the next save: a limit of the file size (as a full disk), or SIGKILL at one call of an operation."""
    if step == run.get("full_disk_at"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (run["file_limit_bytes"], resource.RLIM_INFINITY))
    if step == run.get("kill_at"):
        owner = Path if run["kill_operation"] == "rename" else os
        original, calls = getattr(owner, run["kill_operation"]), [0]

        def killer(*arguments: Any, **keywords: Any) -> Any:
            calls[0] += 1
            if calls[0] == run["kill_call"]:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*arguments, **keywords)

        setattr(owner, run["kill_operation"], killer)


def digest(engine: StudentEngine) -> dict[str, str]:
    """One hash per owned fragment and kind, keyed by its position in the parameter."""
    hashes = {}
    for f in engine.fragments():
        kinds = {"weight": f.view(f.buffer), **{m: engine.moment(f, m) for m in MOMENTS}}
        for kind, tensor in kinds.items():
            hashes[f"{kind} {f.name} {f.start} {f.numel}"] = hashlib.sha256(tensor.cpu().numpy().tobytes()).hexdigest()
    return hashes


def main(options: dict[str, Any], report: Path) -> None:
    # DeepSpeed rejects fp16 on CPUs without fp16 instructions. torch computes it slowly, which is enough to test the loss
    # scaler without a GPU.
    get_accelerator().is_fp16_supported = lambda: True
    launch = dist.read_launch()
    dist.init_process_group(launch, 120)
    reports = {run["name"]: execute(run, launch) for run in options["runs"]}
    report.write_text(json.dumps(reports))
    dist.shut_down()


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
    os._exit(0)  # as pipeline/train.py does, for the same reason
