"""Run real training steps on real ranks and count the bytes that they hold and send: what a plan is compared with.

    python benchmarks/plan_ranks.py OPTIONS.json REPORT.json

Options: `{"cases": [case, ...]}` with cases of `plan_cases.Case.for_ranks`. All libraries are imported once. Each case forks
its ranks, which run two optimizer steps on random rows.
"""

from __future__ import annotations

import collections
import json
import multiprocessing
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("OMP_NUM_THREADS", "1")

import deepspeed
import torch
import torch.distributed
from torch.distributed.elastic.utils.distributed import get_free_port
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModel

from pipeline.config import Recipe, load_recipe
from pipeline.distillation.distiller import DistillModule
from pipeline.distillation.models.architectures import architecture_of
from pipeline.distillation.models.student import build_student
from pipeline.distillation.models.teacher import load_teacher
from pipeline.planning.meta_models import read_config
from pipeline.runtime import dist
from pipeline.runtime.ds_config import DTYPES, split_batch
from pipeline.runtime.engine import StudentEngine, partition_teacher

GATHER_LIMITS = ("stage3_max_live_parameters", "stage3_max_reuse_distance", "stage3_prefetch_bucket_size")
COLLECTIVES = ("all_reduce", "reduce", "all_gather_into_tensor", "reduce_scatter_tensor", "all_gather", "broadcast")


def build(case: dict[str, Any], recipe: Recipe, launch: dist.Launch) -> tuple[StudentEngine, int, int]:
    """The objects that pipeline/training/build.py builds, with random weights: engine, micro-batch, accumulation."""
    relations = recipe.relations
    torch.manual_seed(0)
    config = read_config(recipe.teacher, Path(case["config"]))
    pooler = {"add_pooling_layer": False} if architecture_of(config).has_pooler else {}
    model = AutoModel.from_config(config, dtype=torch.float32, **pooler)
    student = build_student(model, recipe.student, 0, relations)
    dtype = DTYPES[case["precision"]]
    teacher = load_teacher(model, relations.teacher_taps, dtype, "cpu", **relations.tap_options)
    del model
    placed = teacher
    if case.get("keep_gathered"):
        use_default_limits()
    if recipe.teacher_options.placement == "zero3":
        placed = partition_teacher(teacher, case["precision"])  # type: ignore[assignment]
    batch = split_batch(recipe.global_batch, recipe.micro_batch_per_gpu, launch.world_size)
    zero = {"stage": case["stage"], "overlap_comm": False, "contiguous_gradients": True, **case.get("zero", {})}
    ds_config = {
        "train_batch_size": recipe.global_batch,
        "train_micro_batch_size_per_gpu": batch.micro_batch,
        "gradient_accumulation_steps": batch.accumulation,
        "gradient_clipping": 1.0,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "torch_adam": True}},
        "zero_optimization": zero,
        "fp16": {"enabled": False},
        "bf16": {"enabled": case["precision"] == "bf16"},
        "steps_per_print": 2**62,
    }
    module = DistillModule(placed, student.tapped, relations)
    return StudentEngine(module, student.trained, recipe.optimizer, ds_config), batch.micro_batch, batch.accumulation


def use_default_limits() -> None:
    """Make all later engines of this rank keep as many gathered parameters as DeepSpeed does by default."""
    initialize = deepspeed.initialize

    def without_limits(config: dict[str, Any], **keywords: Any) -> Any:
        zero = {key: value for key, value in config["zero_optimization"].items() if key not in GATHER_LIMITS}
        return initialize(config={**config, "zero_optimization": zero}, **keywords)

    deepspeed.initialize = without_limits


def optimizer_step(engine: StudentEngine, ids_BL: torch.Tensor, accumulation: int) -> None:
    for _ in range(accumulation):
        loss, _ = engine(ids_BL)
        engine.backward(loss)
        engine.step(1e-4)
        del loss


def run_rank(case: dict[str, Any], rank: int, port: int, report: Path) -> None:
    """Run one rank of one case. Reports the peak bytes of tensors in the second step, and the traffic of its collectives."""
    environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": case["ranks"], "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in environment.items()}, MASTER_ADDR="127.0.0.1")
    torch.set_num_threads(1)
    traffic = count_collectives()  # before DeepSpeed stores references to them
    launch = dist.read_launch()
    dist.init_process_group(launch, 120)
    recipe = load_recipe(Path(case["recipe"]), case["set"])
    generator = torch.Generator().manual_seed(rank)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        engine, rows, accumulation = build(case, recipe, launch)
        ids_BL = torch.randint(4, case["vocabulary"], (rows, recipe.seq_len), generator=generator)
        optimizer_step(engine, ids_BL, accumulation)
        with torch.profiler.record_function("second step"):
            traffic.clear()
            optimizer_step(engine, ids_BL, accumulation)
    result = {"peak_bytes": peak_bytes(profiler), "collectives": dict(traffic)}
    report.write_text(json.dumps(result))
    os._exit(0)


def peak_bytes(profiler: profile) -> int:
    """Most bytes of tensors allocated at any moment since the mark "second step"."""
    events = profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
    begin = min(event.start_ns() for event in events if event.name() == "second step")
    alive = peak = 0
    for time_ns, size in sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"):
        alive += size
        if time_ns >= begin:
            peak = max(peak, alive)
    return peak


def count_collectives() -> dict[str, list[int]]:
    """Per kind: the number of calls, and the bytes of the complete tensors (of all ranks together)."""
    traffic: dict[str, list[int]] = collections.defaultdict(lambda: [0, 0])

    def wrap(kind: str, original: Any) -> Any:
        def counted(*arguments: Any, **keywords: Any) -> Any:
            tensors = [a for a in [*arguments, *keywords.values()] if isinstance(a, torch.Tensor)]
            traffic[kind][0] += 1
            traffic[kind][1] += max((t.numel() * t.element_size() for t in tensors), default=0)
            return original(*arguments, **keywords)

        return counted

    for kind in COLLECTIVES:
        setattr(torch.distributed, kind, wrap(kind, getattr(torch.distributed, kind)))
    return traffic


def run_case(case: dict[str, Any]) -> list[dict[str, Any]]:
    """Fork the ranks of one case, and collect their reports."""
    context = multiprocessing.get_context("fork")
    port = get_free_port()
    with tempfile.TemporaryDirectory() as temporary:
        files = [Path(temporary) / f"{rank}.json" for rank in range(case["ranks"])]
        ranks = [context.Process(target=run_rank, args=(case, rank, port, file)) for rank, file in enumerate(files)]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join(240)
            if process.exitcode != 0:
                for other in ranks:
                    other.kill()
                raise RuntimeError(f"case {case['name']}: a rank ended with {process.exitcode}")
        return [json.loads(file.read_text()) for file in files]


def main() -> None:
    options = json.loads(Path(sys.argv[1]).read_text())
    report = {case["name"]: run_case(case) for case in options["cases"]}
    Path(sys.argv[2]).write_text(json.dumps(report))


if __name__ == "__main__":
    main()
