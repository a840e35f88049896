"""The training loop: sample numbers in, a distilled student out, in one run directory.

    recipe + DeepSpeed JSON -> build.py -> Run -> resume.py -> TrainState -> Trainer.train():
        batch -> teacher and student -> relation loss -> optimizer step -> log, evaluate, save

The state of a run is one integer, the number of finished steps, plus what a checkpoint holds. So an interrupted run and
an uninterrupted one end in the same student, bit for bit.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.data.batches import Batch, Prefetcher
from pipeline.data.heldout import heldout_losses
from pipeline.distillation.distiller import STUDENT
from pipeline.runtime import dist, preflight
from pipeline.runtime.anomalies import NonFiniteStepCounter
from pipeline.runtime.deferred_numbers import DeferredNumbers
from pipeline.runtime.ds_config import loss_scale_floor
from pipeline.runtime.noncritical_files import write_file_or_warn
from pipeline.runtime.optimizer import learning_rate
from pipeline.runtime.step_clock import OPTIMIZER, OTHER
from pipeline.training.build import Parts, Run
from pipeline.training.resume import TrainState
from pipeline.training.run_logger import RunLogger, StepReport
from pipeline.training.saving import Saver


@dataclass(frozen=True)
class UnreadStep:
    """A step that has been launched. Its figures are on the device."""

    step: int
    learning_rate: float
    figures: DeferredNumbers
    seconds: Callable[[], dict[str, float]]

    def read(self) -> StepReport:
        """Wait until the device has finished the step."""
        loss, *parts, gradient_norm, skipped, loss_scale = self.figures.read()
        return StepReport(loss, parts, gradient_norm, bool(skipped), loss_scale, self.learning_rate, self.seconds())


class Stepper:
    """Takes optimizer steps, each on the rows that follow from its number. It writes nothing.

    Between a batch's arrival and the end of its step nothing is read from the device, so that the host can launch the work of
    the next step meanwhile. The figures of a step are read by `UnreadStep.read`.
    """

    def __init__(self, parts: Parts, state: TrainState, meanwhile: Callable[[], object] = str):
        """`meanwhile` is called in each step when all its forwards have been launched: the time to read the step before."""
        self.parts, self.state, self.meanwhile = parts, state, meanwhile
        self.recipe, self.launch, self.engine = parts.recipe, parts.launch, parts.engine

    def train_step(self, step: int, batches: Iterator[Batch]) -> UnreadStep:
        """Launch one optimizer step over one global batch: `accumulation` micro-batches on every rank."""
        torch.manual_seed(dropout_seed(self.recipe.seed, step, self.launch.rank))
        clock = self.parts.clock
        clock.begin_step()
        rate = learning_rate(self.recipe.optimizer, step, self.recipe.steps)
        accumulation, totals, result = self.parts.batch.accumulation, None, None
        for micro in range(accumulation):
            input_ids_BL, segments_BS = next(batches)
            input_ids_BL = input_ids_BL.to(self.launch.device, non_blocking=True)
            clock.mark(OTHER)
            loss, parts_P = self.engine(input_ids_BL, segments=segments_BS)
            losses = torch.cat([loss.detach().float().reshape(1), parts_P.float()])
            totals = losses if totals is None else totals + losses
            if micro == accumulation - 1:
                dist.sum_over_ranks(totals).div_(accumulation * self.launch.world_size)
                self.meanwhile()
                loss = self._not_a_number_if_spike(loss, totals[0])
            self.engine.backward(loss)
            clock.mark(STUDENT)
            result = self.engine.step(rate)
            clock.mark(OPTIMIZER)
        assert totals is not None
        assert result is not None, "the last micro-batch must close the optimizer step"
        of_step = [result.gradient_norm, result.skipped, result.loss_scale]
        figures = DeferredNumbers(torch.cat([totals, *(figure.float().reshape(1) for figure in of_step)]))
        return UnreadStep(step, rate, figures, clock.end_step())

    def _not_a_number_if_spike(self, loss: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
        """With `guard.spikes: skip` the loss of a spike becomes NaN: every rank skips a step without a finite gradient."""
        limit = self.state.spikes.skip_above
        return loss if limit is None else loss * torch.ones_like(loss).masked_fill(total.double() > limit, float("nan"))

    def batches(self, first_step: int) -> Prefetcher:
        """This rank's micro-batches from `first_step` to the end of the run; a context manager."""
        pin = self.launch.device.type == "cuda"
        return Prefetcher(self.parts.source, self.sample_numbers(first_step), pin_memory=pin)

    def sample_numbers(self, first_step: int) -> Iterator[np.ndarray]:
        """This rank's share of each global batch, int64 `[micro_batch]` each: the same order for any number of ranks."""
        per_rank = self.recipe.global_batch // self.launch.world_size
        for step in range(first_step, self.recipe.steps):
            start = step * self.recipe.global_batch + self.launch.rank * per_rank
            for micro in range(start, start + per_rank, self.parts.batch.micro_batch):
                yield np.arange(micro, micro + self.parts.batch.micro_batch, dtype=np.int64)

    def rows_of(self, step: int) -> list[dict[str, Any]]:
        """Language, row number and shard files of every row in the global batch of `step`."""
        numbers = np.arange(step * self.recipe.global_batch, (step + 1) * self.recipe.global_batch, dtype=np.int64)
        return [
            {"language": language, "row": row, "shards": self.parts.source.shard_files(language, row)}
            for language, row in self.parts.source.locate(numbers)
        ]


class Trainer:
    """Trains steps `[state.first_step, recipe.steps)`, and logs, evaluates and saves on the way."""

    def __init__(self, run: Run, state: TrainState):
        self.run, self.state, self.recipe, self.first_step = run, state, run.recipe, state.first_step
        self.stepper = Stepper(run.parts, state, self._read_step)
        self.unread: UnreadStep | None = None
        self.logger = RunLogger(run.parts, run.paths, state.first_step)
        self.saver = Saver(run, state, self.logger)
        floor = loss_scale_floor(run.parts.ds_config)
        self.bad_steps = NonFiniteStepCounter(run.recipe.guard, run.paths.bad_batch, floor, run.launch.is_main)

    def train(self) -> None:
        """Train to the last step or to a stop request, save, and write a marker file."""
        with contextlib.closing(self.logger):
            if self.first_step >= self.recipe.steps:
                self._confirm_end()
                return
            self._begin()
            with self.stepper.batches(self.first_step) as batches:
                self._loop(batches)

    def _loop(self, batches: Prefetcher) -> None:
        stream = iter(batches)
        periods = (self.recipe.metrics.log_every, self.recipe.eval_every, self.recipe.save_every)
        self.run.watchdog.feed_before_slow_work()
        self.logger.begin_interval()
        for step in range(self.first_step, self.recipe.steps):
            self.unread = self.stepper.train_step(step, stream)
            self.run.watchdog.feed()
            done = step + 1
            self.logger.advance(done)
            self.saver.poll()
            reason, is_last = self._stop_reason(), done == self.recipe.steps
            logs, evaluates, saves = (is_last or done % every == 0 for every in periods)
            if reason or logs or evaluates or saves:
                self._read_step()
            if logs:
                self.logger.step(done, self.state.skipped_steps, batches.wait_s)
            if reason:  # save first: time is short
                self.saver.save(done, required=True)
            if is_last or (evaluates and not reason):  # after a stop the next attempt evaluates
                self._evaluate(done)
            if saves:
                self.saver.save(done, required=is_last)
            if reason and not is_last:
                self._finish(self.run.paths.preempted, f"stopped on request ({reason}) after step {done}")
                return
        self._finish(self.run.paths.done, f"done: {self.recipe.steps} steps")

    def _read_step(self) -> None:
        """Take note of the last launched step, unless that is done: report a spike, count a step without a finite gradient.

        Raises `DivergedRunError` after too many of these in a row.
        """
        if self.unread is None:
            return
        step, report, self.unread = self.unread.step, self.unread.read(), None
        self.logger.observe(report)
        z_score = self.state.observe(report.loss, report.skipped)
        if z_score is not None:
            self.logger.spike(step, report, z_score, self.stepper.rows_of(step))
        rows = partial(self.stepper.rows_of, step)
        self.bad_steps.observe(step, report.loss, report.skipped, report.loss_scale, rows)

    def _evaluate(self, step: int) -> None:
        """Held-out loss per language and pictures of the relations. All ranks take part: ZeRO-3 gathers parameters."""
        began = time.monotonic()
        parts, launch = self.run.parts, self.run.launch
        parts.engine.train(False)
        losses = heldout_losses(
            parts.distiller.losses_by_row,
            parts.source,
            parts.batch.micro_batch,
            launch,
            self.run.watchdog.feed,
        )
        self.logger.heldout(step, losses)
        if self.recipe.metrics.images:
            rows_BL, segments_BS = parts.source.heldout_batch(parts.source.languages[:1])
            rows_BL = rows_BL.to(launch.device)
            for pair in parts.distiller.part_names[: len(self.recipe.relations.pairs)]:
                maps = parts.distiller.relation_maps(rows_BL, pair, segments=segments_BS)
                self.logger.relation_maps(step, pair, maps)
        parts.engine.train(True)
        self.logger.pause(time.monotonic() - began)

    # -- beginning and end

    def _begin(self) -> None:
        """Everything that is written before the first step of this attempt."""
        self.logger.describe()
        if self.run.launch.is_main:
            preflight.ensure_run_dir(self.run.paths.directory)
            preflight.remove_markers(self.run.paths.directory)
            self.run.stop.forget_leftover()
        is_evaluated = dist.broadcast_json(self.logger.first_step_is_evaluated)
        if self.first_step % self.recipe.eval_every == 0 and not is_evaluated:
            self._evaluate(self.first_step)

    def _stop_reason(self) -> str | None:
        """A reason on any rank is a reason on all of them."""
        stop = self.run.stop
        if not dist.any_rank(stop.reason is not None):
            return None
        return next(reason for reason in dist.gather_json(stop.reason) if reason)

    def _finish(self, marker: Path, line: str) -> None:
        if self.run.launch.is_main:
            self.run.restarts.end(marker.name)
            self.logger.complete_description()
            write_file_or_warn(marker, line + "\n")
        self.logger.say(f"{line}. Checkpoints: {self.run.paths.checkpoints}")

    def _confirm_end(self) -> None:
        """The run has all its steps: write what is missing because it was deleted, or because of a kill after the last save."""
        paths, steps = self.run.paths, self.recipe.steps
        self.logger.say(f"{paths.directory} already has its {steps} steps; nothing to do")
        if dist.broadcast_json(self.logger.lacks_description):
            self.logger.describe()
        if self.run.launch.is_main and not paths.done.exists():
            write_file_or_warn(paths.done, f"done: {steps} steps\n")


def dropout_seed(seed: int, step: int, rank: int) -> int:
    """Seed of torch's generator for one step on one rank: dropout needs no state in a checkpoint."""
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0] >> np.uint64(1))
