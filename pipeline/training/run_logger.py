"""What a run says while it runs: what it is, each interval's figures, held-out losses, pictures of the relations.

In: the parts of a run and a `StepReport` per optimizer step. Out: console, TensorBoard and metrics.jsonl through
`Metrics`, and the files that describe the run. Used by trainer.py.
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from pipeline.config import Recipe, recipe_to_yaml
from pipeline.distillation.models.student import dropout_of
from pipeline.provenance import describe_run, resume_critical_config
from pipeline.runtime import dist
from pipeline.runtime.dist import Launch
from pipeline.runtime.metrics import Metrics
from pipeline.runtime.noncritical_files import write_file_or_warn
from pipeline.training.build import Parts

RUN_FILE = "run.json"
DESCRIPTION = (RUN_FILE, "recipe.yaml", "deepspeed.json", "student_config.json")


@dataclass
class StepReport:
    """One optimizer step, averaged over the global batch."""

    loss: float
    parts: list[float]
    gradient_norm: float
    skipped: bool
    loss_scale: float
    learning_rate: float


class Reporter:
    """One life of a run, seen from outside. On ranks other than 0 it does nothing that leaves a trace."""

    def __init__(self, recipe: Recipe, parts: Parts, launch: Launch, run_dir: Path, first_step: int):
        self.recipe, self.parts, self.launch, self.run_dir = recipe, parts, launch, run_dir
        self.metrics = Metrics(run_dir, launch.is_main, first_step, recipe.steps)
        self._first_step = first_step
        self._interval = _Interval()

    @property
    def first_is_evaluated(self) -> bool:
        """Whether an earlier life has logged the held-out loss of the step that this one begins after. For rank 0."""
        return "heldout/mean" in self.metrics.known_of_first_step

    def begin_interval(self) -> None:
        self._interval = _Interval()

    def pause(self, seconds: float) -> None:
        """Time spent on a save or an evaluation, which is no training time."""
        self._interval.pause(seconds)

    def describe(self, first_step: int) -> None:
        """Write what this run is, before its first step."""
        self._facts = {
            "world_size": self.launch.world_size,
            "hosts": dist.gather_json(socket.gethostname(), self.launch.device),  # in the order of the ranks
            "device": str(self.launch.device.type),
            "precision": self.parts.precision,
            "teacher_precision": self.parts.teacher_precision,
            "teacher": self.recipe.teacher,
            "vocabulary": self.recipe.vocabulary,
            "identity": self.parts.identity,
            "data_fingerprint": self.parts.source.fingerprint,
            "languages": list(self.parts.source.languages),
            "matched_layers": self.parts.student.matched,
            # what `export` writes into config.json instead of the distillation's, with or without the teacher at hand
            "dropout": {
                "distillation": dropout_of(self.parts.student.model.config),
                "config": self.parts.student.own_dropout,
            },
            "first_step": first_step,
            "relation_backend": self.parts.distiller.backend,  # "auto" until the first batch has chosen
        }
        ds_json = json.dumps(self.parts.ds_config, indent=1)
        recipe_yaml = recipe_to_yaml(self.recipe)
        if self.launch.is_main:
            self._files = {
                "recipe.yaml": recipe_yaml,
                "deepspeed.json": ds_json,
                "student_config.json": self.parts.student.model.config.to_json_string(use_diff=False),
            }
            for name, text in self._files.items():
                write_file_or_warn(self.run_dir / name, text)
            self._write_facts()
        self.metrics.describe(recipe_yaml, ds_json, resume_critical_config(self.recipe))
        for warning in self.parts.warnings:
            self.metrics.say(f"warning: {warning}")
        self.metrics.say(
            f"student in {self.parts.precision}: {self.parts.num_trained / 1e6:.1f} M parameters trained, "
            f"{self.parts.num_untrained / 1e6:.1f} M carried "
            f"along, start: {self.parts.student.start}; teacher in {self.parts.teacher_precision}; {len(self.parts.source.languages)} languages; "
            f"{self.launch.world_size} rank(s) x {self.parts.batch.micro_batch} rows x {self.parts.batch.accumulation}"
        )

    def _write_facts(self) -> None:
        write_file_or_warn(self.run_dir / RUN_FILE, json.dumps(describe_run(self.recipe, **self._facts), indent=1))

    @property
    def lacks_description(self) -> bool:
        """Whether files that `export` reads are missing. For rank 0."""
        return not all((self.run_dir / name).is_file() for name in DESCRIPTION)

    def describe_again(self) -> None:
        """Write what somebody deleted while the run went on: without it no student could be exported. For rank 0."""
        for name, text in self._files.items():
            if not (self.run_dir / name).is_file():
                write_file_or_warn(self.run_dir / name, text)
        if not (self.run_dir / RUN_FILE).is_file():
            self._write_facts()

    def _backend_is_chosen(self) -> None:
        for line in self.parts.distiller.backend_report:
            self.metrics.say(line)
        self._facts["relation_backend"] = self.parts.distiller.backend
        if self.launch.is_main:
            self._write_facts()

    def step(self, done: int, report: StepReport, skipped_steps: int, wait_s: float) -> None:
        """Counts every step; says something at the end of an interval."""
        self.metrics.advance()
        if done == self._first_step + 1:
            self._backend_is_chosen()
        self._interval.steps += 1
        if done % self.recipe.metrics.log_every and done != self.recipe.steps:
            return
        tokens = self._interval.steps * self.recipe.global_batch * self.recipe.seq_len
        seconds, wait_share = self._interval.close(wait_s)
        values = {
            "loss/total": report.loss,
            **{f"loss/{name}": v for name, v in zip(self.parts.distiller.part_names, report.parts, strict=True)},
            "optimizer/learning_rate": report.learning_rate,
            "optimizer/gradient_norm": report.gradient_norm,
            "optimizer/loss_scale": report.loss_scale,
            "optimizer/skipped_steps": skipped_steps,
            "speed/tokens_per_second": tokens / seconds,
            "speed/data_wait_share": wait_share,
        }
        self.metrics.write(done, done * self.recipe.global_batch, values)
        eta_min = (self.recipe.steps - done) * seconds / (tokens / self.recipe.global_batch / self.recipe.seq_len) / 60
        self.metrics.say(
            f"step {done}/{self.recipe.steps}  loss {report.loss:.4f}  lr {report.learning_rate:.2e}  "
            f"grad {report.gradient_norm:.2f}  {tokens / seconds:,.0f} tokens/s  data wait {wait_share:.1%}  "
            f"{eta_min:.1f} min left"
        )

    def saved(self, step: int, stopped_s: float) -> None:
        """How long training stood still for the checkpoint of `step`: snapshot, commit, and waiting for either."""
        self.metrics.write(step, step * self.recipe.global_batch, {"speed/save_stall_seconds": stopped_s})

    def heldout(self, step: int, losses: Mapping[str, float]) -> None:
        """Held-out relation loss per language."""
        mean = float(np.mean(list(losses.values())))
        values = {"heldout/mean": mean, **{f"heldout/{language}": loss for language, loss in losses.items()}}
        self.metrics.write(step, step * self.recipe.global_batch, values)
        worst = max(losses, key=losses.__getitem__)
        self.metrics.say(f"step {step}  held-out loss {mean:.4f}, highest {worst} {losses[worst]:.4f}")

    def relation_maps(self, step: int, name: str, maps_2HLL: torch.Tensor) -> None:
        """Teacher above student, one column per relation head. Square roots: most probabilities are too small to be seen."""
        rows = [torch.cat(list((maps_HLL / maps_HLL.amax()).sqrt()), dim=1) for maps_HLL in maps_2HLL]
        self.metrics.image(f"relations/{name}", step, torch.cat(rows, dim=0).float().cpu().unsqueeze(0))


class _Interval:
    """Wall time and data waiting between two console lines, without saves and evaluations."""

    def __init__(self) -> None:
        self.steps, self._began, self._paused, self._wait_before = 0, time.monotonic(), 0.0, 0.0

    def pause(self, seconds: float) -> None:
        self._paused += seconds

    def close(self, wait_s: float) -> tuple[float, float]:
        """Seconds of training, and the share of them spent waiting for data; begins the next interval."""
        now = time.monotonic()
        seconds = max(now - self._began - self._paused, 1e-9)
        share = (wait_s - self._wait_before) / seconds
        self.steps, self._began, self._paused, self._wait_before = 0, now, 0.0, wait_s
        return seconds, share
