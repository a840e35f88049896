"""What a run reports while it runs: what it is, figures of each interval, held-out losses, pictures of the relations.

In: the parts of a run and a `StepReport` per optimizer step. Out: console, TensorBoard and metrics.jsonl through
`Metrics`, and the files that describe the run.
"""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.config import recipe_to_yaml
from pipeline.data.batches import BatchSource
from pipeline.distillation.models.student import dropout_of
from pipeline.errors import UserError
from pipeline.planning.devices import peak_flops_per_s
from pipeline.provenance import describe_run, resume_critical_config
from pipeline.runtime import dist
from pipeline.runtime.anomalies import record_spike
from pipeline.runtime.device_facts import device_name, peak_memory_bytes
from pipeline.runtime.metrics import Metrics
from pipeline.runtime.noncritical_files import write_file_or_warn
from pipeline.runtime.run_paths import RunPaths
from pipeline.runtime.step_clock import PARTS
from pipeline.training.build import Parts


@dataclass
class StepReport:
    """One optimizer step, averaged over the global batch."""

    loss: float
    parts: list[float]
    gradient_norm: float
    skipped: bool
    loss_scale: float
    learning_rate: float
    seconds: dict[str, float]  # of each part of the step, on this rank's device


class RunLogger:
    """Reports one attempt of one student's run. Ranks other than 0 write and print nothing."""

    def __init__(self, parts: Parts, paths: RunPaths, first_step: int, leads: bool = True):
        """
        Args:
            first_step: steps that are done already; what an earlier attempt logged after them is dropped
            leads: shows the progress of the run, in which other students may take part
        """
        self._parts, self._paths, self._first_step = parts, paths, first_step
        self._recipe, self._is_main = parts.recipe, parts.launch.is_main
        if self._is_main:
            with contextlib.suppress(OSError):  # a full disk: each file that is not written gives a warning
                paths.files.mkdir(parents=True, exist_ok=True)
        recipe = parts.recipe
        self._metrics = Metrics(paths, self._is_main, first_step, recipe.steps, leads, recipe.metrics.loggers)
        self._interval = _Interval()
        self._speed: dict[str, float] = {}  # of the last interval
        self._peak_flops_per_s = peak_flops_per_s(device_name(parts.launch.device), parts.precision)
        self._facts: dict[str, Any] = {}  # in run.json
        self._files: dict[Path, str] = {}  # the other files that describe the run

    def close(self) -> None:
        self._metrics.close()

    def say(self, line: str) -> None:
        """One line on rank 0's console about this student."""
        self._metrics.say(f"{self._parts.name}: {line}" if self._parts.name else line)

    def say_of_run(self, line: str) -> None:
        """One line on rank 0's console about the run."""
        self._metrics.say(line)

    @property
    def first_step_is_evaluated(self) -> bool:
        """Whether an earlier attempt has logged the held-out loss of the step that this one begins after. For rank 0."""
        return "heldout/mean" in self._metrics.known_of_first_step

    @property
    def lacks_description(self) -> bool:
        """Whether files that `export` reads are missing. For rank 0."""
        return not all(path.is_file() for path in self._paths.needed_by_export)

    # -- what the run is

    def describe(self) -> None:
        """Write what this run is, before its first step. All ranks call it.

        Raises:
            UserError: on every rank, a logger cannot be opened at the first start
        """
        parts, student = self._parts, self._parts.student
        hosts = dist.gather_json(socket.gethostname())  # in the order of the ranks
        self._facts = {
            "world_size": parts.launch.world_size,
            "hosts": hosts,
            "device": str(parts.launch.device.type),
            "device_names": dist.gather_json(device_name(parts.launch.device)),
            "flops_per_row": parts.flops_per_row,
            "precision": parts.precision,
            "teacher_precision": parts.teacher_precision,
            "teacher": self._recipe.teacher,
            **({"student": parts.name} if parts.name else {}),
            "vocabulary": self._recipe.vocabulary,
            "identity": parts.made_from.identity,
            "student_start": student.start,
            "trained_length": student.trained_length,
            **_about_text(parts.source),
            "matched_layers": student.matched,
            # `export` writes "config" into the student's config.json, whether or not the teacher is still there
            "dropout": {"distillation": dropout_of(student.model.config), "config": student.own_dropout},
            "first_step": self._first_step,
            # `export` writes it into the settings of sentence-transformers
            **({"sentences": parts.sentences.settings.recorded()} if parts.sentences else {}),
            "relation_backend": parts.distiller.backend,  # "auto" until the first batch has chosen
        }
        recipe_yaml, ds_json = recipe_to_yaml(self._recipe), json.dumps(parts.ds_config, indent=1)
        self._files = {
            self._paths.recipe: recipe_yaml,
            self._paths.deepspeed: ds_json,
            self._paths.student_config: student.model.config.to_json_string(use_diff=False),
        }
        if self._is_main:
            for path, text in self._files.items():
                write_file_or_warn(path, text)
            self._write_facts()
        problem = None
        try:
            settings, weights = resume_critical_config(self._recipe), parts.distiller.part_weights
            self._metrics.describe(recipe_yaml, ds_json, settings, weights)
        except UserError as error:  # on every rank, or the others would wait for rank 0
            problem = str(error)
        if problem := dist.broadcast_json(problem):
            raise UserError(problem)
        for warning in parts.warnings:
            self.say_of_run(f"warning: {warning}")
        self.say(
            f"student in {parts.precision}: {parts.num_trained / 1e6:.1f} M parameters trained, "
            f"{parts.num_untrained / 1e6:.1f} M frozen, start: {student.start}; teacher in {parts.teacher_precision}; "
            f"{len(parts.source.languages)} languages; {parts.launch.world_size} rank(s) x {parts.batch.micro_batch} rows "
            f"x {parts.batch.accumulation}"
        )
        if parts.sentences is not None:
            how, distance = parts.sentences, self._recipe.relations.pooled_distance
            self.say(f"sentence vectors by {how.settings.pooling} pooling ({how.origin}), compared by {distance}")

    def _write_facts(self) -> None:
        write_file_or_warn(self._paths.description, json.dumps(describe_run(self._recipe, **self._facts), indent=1))

    def complete_description(self) -> None:
        """Add the speed of the last interval, and write again what somebody deleted during the run: without it no student
        could be exported. For rank 0."""
        for path, text in self._files.items():
            if not path.is_file():
                write_file_or_warn(path, text)
        self._facts["speed"] = self._speed
        self._write_facts()

    def _report_backend(self) -> None:
        for line in self._parts.distiller.backend_report:
            self.say(line)
        self._facts["relation_backend"] = self._parts.distiller.backend
        if self._is_main:
            self._write_facts()

    # -- what it does

    def begin_interval(self) -> None:
        self._interval = _Interval()

    def pause(self, seconds: float) -> None:
        """Time of a save or an evaluation, which is not training time."""
        self._interval.pause(seconds)

    def advance(self) -> None:
        """Show that one more step of the run has been launched."""
        self._metrics.advance()

    def launched(self, done: int) -> None:
        """Take note of a launched step of this student. `done`: launched steps, with this one."""
        if done == self._first_step + 1:
            self._report_backend()

    def observe(self, report: StepReport) -> None:
        """Take note of a finished step."""
        self._interval.add_step(report)

    def step(self, done: int, skipped_steps: int, wait_s: float, flops_per_row: int) -> None:
        """Report the interval that ends with the step observed last.

        Args:
            done: finished steps, with this one
            skipped_steps: number since the start of the run
            wait_s: seconds that all steps of this attempt have waited for data
            flops_per_row: that the teacher and all students in training need
        """
        report, steps, recipe = self._interval.last, self._interval.steps, self._recipe
        assert report is not None
        seconds, shares = self._interval.shares(wait_s)
        self._interval = _Interval(wait_s)
        rows_per_second = steps * recipe.global_batch / seconds
        tokens_per_second = rows_per_second * recipe.seq_len
        flops_per_s = rows_per_second * flops_per_row / self._parts.launch.world_size
        self._speed = {
            "speed/tokens_per_second": tokens_per_second,
            **{f"speed/{name}_share": share for name, share in shares.items()},
            "speed/model_tflops_per_device": flops_per_s / 1e12,
            **({"speed/mfu": flops_per_s / self._peak_flops_per_s} if self._peak_flops_per_s else {}),
            "speed/peak_memory_gib": peak_memory_bytes(self._parts.launch.device) / 2**30,
        }
        values = {
            "loss/total": report.loss,
            **{f"loss/{name}": v for name, v in zip(self._parts.distiller.part_names, report.parts, strict=True)},
            "optimizer/learning_rate": report.learning_rate,
            "optimizer/gradient_norm": report.gradient_norm,
            "optimizer/loss_scale": report.loss_scale,
            "optimizer/skipped_steps": skipped_steps,
            **self._speed,
        }
        self._write(done, values)
        self.say(
            f"step {done}/{self._recipe.steps}  loss {report.loss:.4f}  lr {report.learning_rate:.2e}  "
            f"grad {report.gradient_norm:.2f}  {tokens_per_second:,.0f} tokens/s  data wait {shares['data_wait']:.1%}  "
            f"{(self._recipe.steps - done) * seconds / steps / 60:.1f} min left"
        )

    def spike(self, step: int, report: StepReport, z_score: float, rows: list[dict[str, Any]]) -> None:
        """A loss far above the last ones, in step number `step` (from 0), with the `rows` of its global batch."""
        self.say(f"warning: loss {report.loss:.4f} at step {step + 1} is {z_score:.0f} sigmas above the last steps")
        self._write(step + 1, {"loss/spike_sigmas": z_score})
        if self._is_main:
            record_spike(self._paths.spikes, step, report.loss, z_score, report.skipped, rows)

    def saved(self, step: int, stopped_s: float) -> None:
        """How long training waited for the checkpoint of `step`: snapshot, commit, and waiting for either."""
        self._write(step, {"speed/save_stall_seconds": stopped_s})

    def heldout(self, step: int, losses: Mapping[str, float]) -> float:
        """Held-out relation loss per language. Returns the mean."""
        mean = float(np.mean(list(losses.values())))
        self._write(step, {"heldout/mean": mean, **{f"heldout/{language}": loss for language, loss in losses.items()}})
        worst = max(losses, key=losses.__getitem__)
        self.say(f"step {step}  held-out loss {mean:.4f}, highest {worst} {losses[worst]:.4f}")
        return mean

    def relation_maps(self, step: int, name: str, maps_2HLL: torch.Tensor) -> None:
        """Teacher above student, one column per relation head. Square roots make small probabilities visible."""
        rows = [torch.cat(list((maps_HLL / maps_HLL.amax()).sqrt()), dim=1) for maps_HLL in maps_2HLL]
        self._metrics.image(f"relations/{name}", step, torch.cat(rows, dim=0).float().cpu().unsqueeze(0))

    def _write(self, step: int, values: Mapping[str, float]) -> None:
        self._metrics.write(step, step * self._recipe.global_batch, values)


def _about_text(source: BatchSource) -> dict[str, Any]:
    data_sets = source.shards.manifest.get("data_sets", {})  # of a hub
    return {"data_fingerprint": source.fingerprint, "languages": list(source.languages), "data_sets": list(data_sets)}


class _Interval:
    """Time, its shares and data waiting between two console lines, without saves and evaluations."""

    def __init__(self, wait_s: float = 0.0) -> None:
        """`wait_s`: seconds that this attempt has waited for data before."""
        self.last: StepReport | None = None
        self.steps, self._began, self._paused, self._wait_before = 0, time.monotonic(), 0.0, wait_s
        self._seconds: Counter[str] = Counter()

    def add_step(self, report: StepReport) -> None:
        self.last = report
        self.steps += 1
        self._seconds.update(report.seconds)

    def pause(self, seconds: float) -> None:
        self._paused += seconds

    def shares(self, wait_s: float) -> tuple[float, dict[str, float]]:
        """Seconds of training, and what share of them each part of a step and waiting for data took.

        What the parts of a step leave is time between steps: waiting for data, and for the host.
        """
        seconds = max(time.monotonic() - self._began - self._paused, 1e-9)
        parts = {**{part: self._seconds[part] for part in PARTS}, "data_wait": wait_s - self._wait_before}
        return seconds, {part: of_part / seconds for part, of_part in parts.items()}
