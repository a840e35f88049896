"""One training step of the XLM-R-large-shaped job by phase: as it is, and with each change on and off.

Each row is a new engine in this process. The first row is repeated at the end: the difference between the two is the
noise. `of as it is` is the ratio of the step's time to that of the first row.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModel

from benchmarks.gpu_check.figures import Figures, NotHere, Row
from benchmarks.gpu_check.job import Job, job_of
from benchmarks.gpu_check.setting import RECIPE, Setting
from benchmarks.gpu_check.timing import added_peak_mib, device, free_memory, half_precision, median_ms, on_gpu, profiled
from benchmarks.naive_baseline import HookedEncoder, naive_relation
from pipeline.config import load_recipe
from pipeline.distillation.models.student import StudentConfig
from pipeline.distillation.relations.backends import BACKENDS

TABLE = "Steps"
STAGE = 2
FIRST_ID = 5  # below are special tokens


def measure(setting: Setting, figures: Figures) -> None:
    """All rows but the one without deterministic kernels, which needs a process of its own."""
    first = figures.attempt(TABLE, {"variant": "as it is"}, partial(row_of, setting))
    first_ms = first["step ms"] if first else None
    # All rows use the backend that the first one chose: a choice by measured times could differ.
    same = {"relations.backend": first["backend"]} if first else {}

    def add(name: str, measure_row: Callable[[], Row]) -> None:
        def row() -> Row:
            found = measure_row()
            return {"of as it is": found["step ms"] / first_ms if first_ms else None, **found}

        figures.attempt(TABLE, {"variant": name}, row)

    add("DeepSpeed's own engine", lambda: row_of(setting, same, prepare=Job.use_stock_engine))
    for backend in BACKENDS:
        add(f"relation backend {backend}", partial(row_of, setting, {"relations.backend": backend}))
    for fused in ("true", "false"):
        add(f"AdamW fused: {fused}", partial(row_of, setting, same, _adam(setting, fused)))
    add("guard.spikes: skip", lambda: row_of(setting, same | {"guard.spikes": "skip"}))
    add("teacher compiled", lambda: row_of(setting, same | {"teacher_options.compile": "true"}))
    add("student compiled", lambda: row_of(setting, same | _compiled_student()))
    add("both compiled", lambda: row_of(setting, same | _compiled_student() | {"teacher_options.compile": "true"}))
    add("as it is, again", partial(row_of, setting, same))
    add("the naive method", partial(_naive, setting))


def measure_any_order(setting: Setting, figures: Figures) -> None:
    """Without deterministic kernels. cuBLAS reads its workspace setting once per process, so this is a process of its own."""
    figures.attempt(TABLE, {"variant": "deterministic: false"}, lambda: row_of(setting, {"deterministic": "false"}))


def row_of(
    setting: Setting,
    changes: dict[str, Any] | None = None,
    ds_json: Path | None = None,
    prepare: Callable[[Job], None] = lambda job: None,
) -> Row:
    """The step of the job with these changes; `prepare` may change the job before it is measured."""
    with job_of(setting, ds_json or setting.ds_json(STAGE), changes) as job:
        prepare(job)
        row = job.measure()
        return {"precision": job.parts.precision, "backend": job.parts.distiller.backend, **row}


def _adam(setting: Setting, fused: str) -> Path:
    return setting.ds_json(STAGE, name=f"fused-{fused}", optimizer={"params": {"fused": fused == "true"}})


def _compiled_student() -> dict[str, Any]:
    if "compile" not in {field.name for field in dataclasses.fields(StudentConfig)}:
        raise NotHere("`student.compile` is not in this version")
    return {"student.compile": "true"}


def _naive(setting: Setting) -> Row:
    """The same step as most code has it: hooks on complete models, all maps, autocast, AdamW on everything."""
    free_memory()  # of the engines before it
    recipe, dtype = load_recipe(RECIPE, setting.overrides()), half_precision()
    teacher = AutoModel.from_pretrained(setting.teacher, dtype=dtype, trust_remote_code=False, add_pooling_layer=False)
    config = AutoConfig.from_pretrained(setting.teacher, trust_remote_code=False)
    config.hidden_size, config.num_attention_heads = recipe.student.hidden, recipe.student.heads
    config.num_hidden_layers, config.intermediate_size = recipe.student.layers, 4 * recipe.student.hidden
    student = AutoModel.from_config(config, dtype=torch.float32, trust_remote_code=False, add_pooling_layer=False)
    student.to(device()).train()
    optimizer = torch.optim.AdamW(student.parameters(), lr=recipe.optimizer.lr)
    scaler = torch.amp.GradScaler(device().type, enabled=on_gpu())
    of_teacher = HookedEncoder(teacher.eval().to(device()), recipe.relations.teacher_layer or 1)
    of_student = HookedEncoder(student, recipe.student.layers)
    shape = (setting.scale.rows, setting.scale.seq_len)
    ids_BL = torch.randint(FIRST_ID, setting.scale.teacher["vocab_size"], shape, device=device())

    def once() -> None:
        with torch.autocast(device().type, dtype=dtype):
            with torch.no_grad():
                targets = of_teacher(ids_BL)
            related = zip(targets, of_student(ids_BL), strict=True)
            loss = torch.stack([naive_relation(t_BLD, s_BLD, recipe.relations.heads) for t_BLD, s_BLD in related]).sum()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(student.parameters(), recipe.optimizer.gradient_clipping)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        loss.item()

    peak_mib, ms = added_peak_mib(once), median_ms(once, setting.scale.steps, setting.scale.warm_up)
    counts = profiled(once)
    memory = {"peak GiB": peak_mib / 1024 if peak_mib else None}
    return {"step ms": ms, "tokens/s": round(1e3 * ids_BL.numel() / ms), **memory, **counts}
