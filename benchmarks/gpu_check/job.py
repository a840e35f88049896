"""The XLM-R-large-shaped job in this process: built by the pipeline's own functions, stepped and measured by phase.

In: a `Setting`, a DeepSpeed JSON, recipe changes. Out: milliseconds of each phase, launches, host reads, memory. Phases are
told apart by hooks on the distiller and on the student: the teacher runs between the beginnings of both.
"""

from __future__ import annotations

import contextlib
import itertools
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed
import torch

from benchmarks.gpu_check.figures import Row
from benchmarks.gpu_check.setting import RECIPE, Setting
from benchmarks.gpu_check.timing import Moment, free_memory, median_ms, on_gpu, profiled, synchronize
from pipeline.config import load_recipe
from pipeline.distillation.distiller import DistillModule
from pipeline.distillation.models.teacher import load_encoder, load_teacher
from pipeline.runtime import dist
from pipeline.runtime.determinism import deterministic_kernels
from pipeline.runtime.ds_config import DTYPES
from pipeline.runtime.optimizer import learning_rate, parameter_groups
from pipeline.training.build import build, student_of
from pipeline.training.resume import TrainState
from pipeline.training.stepper import Learner, Stepper

COLLECTIVE_TIMEOUT_S = 300
PHASES = ("batch", "teacher", "student forward", "loss", "backward", "optimizer")
END = "end"


class PhaseClock:
    """Marks where each phase of a step begins. `medians()` after the last step."""

    def __init__(self) -> None:
        self._steps: list[list[tuple[str, Moment]]] = []
        self._is_running = False

    def begin_step(self) -> None:
        self._is_running = True
        self._steps.append([])
        self.mark(PHASES[0])

    def mark(self, phase: str) -> None:
        if self._is_running:
            self._steps[-1].append((phase, Moment()))

    def end_step(self) -> None:
        self.mark(END)
        self._is_running = False

    def medians(self) -> dict[str, float]:
        """Median milliseconds of each phase over the steps, and of the step."""
        synchronize()
        found: dict[str, list[float]] = {name: [] for name in ("step", *PHASES)}
        for marks in self._steps:
            spent = dict.fromkeys(PHASES, 0.0)
            for (phase, began), (_, ended) in itertools.pairwise(marks):
                spent[phase] += began.ms_until(ended)
            for name, ms in spent.items():
                found[name].append(ms)
            found["step"].append(marks[0][1].ms_until(marks[-1][1]))
        return {name: statistics.median(values) for name, values in found.items()}


class Job:
    """One engine of the job, and its training step."""

    def __init__(self, setting: Setting, ds_json: Path, changes: dict[str, Any] | None = None) -> None:
        began = time.monotonic()
        self.setting = setting
        self.launch = dist.read_launch()
        recipe = load_recipe(RECIPE, setting.overrides(changes))
        dist.init_process_group(self.launch, COLLECTIVE_TIMEOUT_S)
        (self.parts,) = build(recipe, RECIPE, ds_json, self.launch)
        self.engine: Any = self.parts.engine
        self.recipe, self.step_number, self.clock = recipe, 0, PhaseClock()
        self.stepper = Stepper([Learner(self.parts, TrainState.restore({}, recipe.guard))])
        self._batches = contextlib.ExitStack()
        self._stream = iter(self._batches.enter_context(self.stepper.batches(0)))
        self._watch_phases(self.parts.distiller)
        self.build_s = time.monotonic() - began

    def _watch_phases(self, distiller: DistillModule) -> None:
        """Hooks of the module and of the student inside it; `use_stock_engine` brings a second module."""
        distiller.register_forward_pre_hook(lambda *_: self.clock.mark("teacher"))
        distiller.student.register_forward_pre_hook(lambda *_: self.clock.mark("student forward"))
        distiller.student.register_forward_hook(lambda *_: self.clock.mark("loss"))

    @property
    def rate(self) -> float:
        return learning_rate(self.recipe.optimizer, self.step_number, self.recipe.steps)

    def forward(self) -> torch.Tensor:
        """The loss of the next batch."""
        ids_BL, segments_BS = next(self._stream)
        ids_BL = ids_BL.to(self.launch.device, non_blocking=True)
        loss, _ = self.engine(ids_BL, segments=segments_BS)
        return loss

    def step(self, times_loss: float = 1.0) -> tuple[torch.Tensor, Any]:
        """One optimizer step that reads nothing back: the loss, and what the engine returns."""
        self.clock.begin_step()
        loss = self.forward()
        self.clock.mark("backward")
        self.engine.backward(loss if times_loss == 1.0 else loss * times_loss)
        self.clock.mark("optimizer")
        result = self.engine.step(self.rate)
        self.clock.end_step()
        self.step_number += 1
        return loss.detach(), result

    def _trainer_step(self) -> None:
        """The step as the trainer launches it."""
        self.stepper.train_step(self.step_number, self._stream)
        self.step_number += 1

    def _optimizer_counts(self) -> dict[str, float | int | None]:
        """Kernels and host reads of the optimizer phase alone."""
        self.engine.backward(self.forward())
        counts = profiled(lambda: self.engine.step(self.rate))
        self.step_number += 1
        return counts

    def use_stock_engine(self) -> None:
        """Step with DeepSpeed's own engine around an equal module, instead of the pipeline's engine."""
        recipe, relations = self.recipe, self.recipe.relations
        model = load_encoder(recipe.teacher)
        student = student_of(recipe, model, self.parts.source, self.launch.device)
        dtype = DTYPES[self.parts.teacher_precision]
        teacher = load_teacher(model, relations.teacher_taps, dtype, self.launch.device, **relations.tap_options)
        module = DistillModule(teacher, student.tapped, relations)
        module.keep_backend(self.parts.distiller.backend)
        self._watch_phases(module)
        self.engine = StockEngine(module, parameter_groups(student.trained, recipe.optimizer.weight_decay), self)

    def measure(self) -> Row:
        """Phases in milliseconds, tokens per second, peak memory, launches and host reads."""
        scale, began = self.setting.scale, time.monotonic()
        self.step()
        synchronize()
        first_step_s = time.monotonic() - began
        for _ in range(scale.warm_up):
            self.step()
        synchronize()
        if on_gpu():
            torch.cuda.reset_peak_memory_stats()
        self.clock = PhaseClock()
        for _ in range(scale.steps):
            self.step()
        row: Row = {f"{name} ms": ms for name, ms in self.clock.medians().items()}
        self.clock = PhaseClock()  # without the marks of what follows
        row["tokens/s"] = round(1e3 * self.recipe.global_batch * self.recipe.seq_len / row["step ms"])
        is_own_engine = self.engine is self.parts.engine  # else the memory of both engines would be counted
        row["peak GiB"] = torch.cuda.max_memory_allocated() / 2**30 if on_gpu() and is_own_engine else None
        row |= {"first step s": first_step_s, "build s": self.build_s}
        complete, optimizer = profiled(self.step), self._optimizer_counts()
        row |= complete | {"optimizer kernels": optimizer["kernels"], "optimizer reads": optimizer["host reads"]}
        if is_own_engine:
            row["trainer's step ms"] = median_ms(self._trainer_step, scale.steps, scale.warm_up)
        return row

    def close(self) -> None:
        self._batches.close()


class StockEngine:
    """DeepSpeed's engine as its documentation uses it, with the calls and the deterministic kernels of `StudentEngine`."""

    def __init__(self, module: DistillModule, groups: list[dict[str, Any]], job: Job) -> None:
        self._kernels = partial(deterministic_kernels, job.recipe.deterministic)
        forward = contextlib.ExitStack()  # of the student: the teacher keeps the fastest kernels
        module.student.register_forward_pre_hook(lambda *_: forward.enter_context(self._kernels()))
        module.student.register_forward_hook(lambda *_: forward.close())
        self._engine, *_ = deepspeed.initialize(
            model=module, model_parameters=groups, config=job.parts.ds_config, dist_init_required=False
        )

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        return self._engine(*arguments, **keywords)

    def backward(self, loss: torch.Tensor) -> None:
        with self._kernels():
            self._engine.backward(loss)

    def step(self, learning_rate: float) -> None:
        for group in self._engine.optimizer.param_groups:
            group["lr"] = learning_rate
        self._engine.step()


@contextmanager
def job_of(setting: Setting, ds_json: Path, changes: dict[str, Any] | None = None) -> Iterator[Job]:
    """A job, after the memory of earlier ones was returned: engines refer to themselves."""
    free_memory()
    job = Job(setting, ds_json, changes)
    try:
        yield job
    finally:
        job.close()
