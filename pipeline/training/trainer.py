"""The training loop: sample numbers in, distilled students out, in one run directory.

    recipe + DeepSpeed JSON -> build.py -> Run -> resume.py -> TrainStates -> Trainer.train():
        batch -> teacher -> for each student: relation loss -> optimizer step; log, evaluate, save

The state of a run is one integer, the number of finished steps, plus what a checkpoint holds. So an interrupted run and
an uninterrupted one end in the same student, bit for bit. So do students that are trained together and alone: each has its
own engine, loss scale, learning rate, counters and random numbers, and shares with the others rows and teacher.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.config import recipe_to_yaml
from pipeline.data.batches import Batch, Prefetcher
from pipeline.data.heldout import heldout_losses
from pipeline.distillation.distiller import STUDENT
from pipeline.errors import DivergedRunError
from pipeline.runtime import dist, preflight
from pipeline.runtime.anomalies import NonFiniteStepCounter
from pipeline.runtime.deferred_numbers import DeferredNumbers
from pipeline.runtime.ds_config import loss_scale_floor
from pipeline.runtime.evaluations import reason_to_stop
from pipeline.runtime.noncritical_files import write_file_or_warn
from pipeline.runtime.optimizer import learning_rate
from pipeline.runtime.step_clock import OPTIMIZER, OTHER
from pipeline.runtime.zero_step import StepResult
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


@dataclass
class Learner:
    """One student in training, and what is to be done in each of its steps when all forwards have been launched."""

    parts: Parts
    state: TrainState
    meanwhile: Callable[[], object] = str  # the time to read the step before


class Stepper:
    """Takes optimizer steps of all students, each on the rows that follow from its number. It writes nothing.

    Between a batch's arrival and the end of its step nothing is read from the device, so that the host can launch the work of
    the next step meanwhile. The figures of a step are read by `UnreadStep.read`.
    """

    def __init__(self, learners: Sequence[Learner]):
        self.learners, self.parts = learners, learners[0].parts  # the latter for what all students share
        self.recipe, self.launch = self.parts.recipe, self.parts.launch

    def train_step(self, step: int, batches: Iterator[Batch]) -> list[UnreadStep | None]:
        """Launch one optimizer step of each student over one global batch: `accumulation` micro-batches on every rank.

        Returns:
            the step of each learner; None for one that has ended
        """
        clock, teacher = self.parts.clock, self.parts.shared_teacher
        clock.begin_step()
        steps = [_StudentStep(learner, step) for learner in self.learners if learner.state.ended is None]
        for _ in range(self.parts.batch.accumulation):
            input_ids_BL, segments_BS = next(batches)
            input_ids_BL = input_ids_BL.to(self.launch.device, non_blocking=True)
            clock.mark(OTHER)
            for of_student in steps:
                is_last = of_student is steps[-1]
                after_forward = teacher.release if teacher is not None and is_last else str
                of_student.micro_batch(input_ids_BL, segments_BS, after_forward)
        seconds = clock.end_step()
        launched = {id(of_student.learner): of_student.unread(seconds) for of_student in steps}
        return [launched.get(id(learner)) for learner in self.learners]

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


class _StudentStep:
    """One optimizer step of one student, micro-batch by micro-batch."""

    def __init__(self, learner: Learner, step: int):
        self.learner, self._parts, self._state, self._step = learner, learner.parts, learner.state, step
        recipe = self._parts.recipe
        self._rate = learning_rate(recipe.optimizer, step, recipe.steps)
        self._left = self._parts.batch.accumulation  # micro-batches
        self._totals: torch.Tensor | None = None
        self._result: StepResult | None = None
        self._random: RandomState | None = None

    def micro_batch(
        self, input_ids_BL: torch.Tensor, segments_BS: torch.Tensor | None, after_forward: Callable[[], object]
    ) -> None:
        """Forward, backward, and after the last micro-batch the optimizer step."""
        parts, launch, clock = self._parts, self._parts.launch, self._parts.clock
        if self._totals is None:
            torch.manual_seed(dropout_seed(parts.recipe.seed, self._step, launch.rank))
        elif self._random is not None:  # other students have drawn numbers since
            self._random.restore()
        loss, parts_P = parts.engine(input_ids_BL, segments=segments_BS)
        after_forward()
        losses = torch.cat([loss.detach().float().reshape(1), parts_P.float()])
        self._totals = losses if self._totals is None else self._totals + losses
        self._left -= 1
        if self._left == 0:
            dist.sum_over_ranks(self._totals).div_(parts.batch.accumulation * launch.world_size)
            self.learner.meanwhile()
            if self._state.ended is not None:  # by the step before, which has been read just now
                return
            loss = self._not_a_number_if_spike(loss, self._totals[0])
        parts.engine.backward(loss)
        clock.mark(STUDENT)
        self._result = parts.engine.step(self._rate)
        clock.mark(OPTIMIZER)
        if self._left and parts.shared_teacher is not None:
            self._random = RandomState(launch.device)

    def _not_a_number_if_spike(self, loss: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
        """With `guard.spikes: skip` the loss of a spike becomes NaN: every rank skips a step without a finite gradient."""
        limit = self._state.spikes.skip_above
        return loss if limit is None else loss * torch.ones_like(loss).masked_fill(total.double() > limit, float("nan"))

    def unread(self, seconds: Callable[[], dict[str, float]]) -> UnreadStep | None:
        """The launched step; None where the student ended in it."""
        if self._state.ended is not None:
            return None
        assert self._totals is not None
        assert self._result is not None, "the last micro-batch must close the optimizer step"
        of_step = [self._result.gradient_norm, self._result.skipped, self._result.loss_scale]
        figures = DeferredNumbers(torch.cat([self._totals, *(figure.float().reshape(1) for figure in of_step)]))
        return UnreadStep(self._step, self._rate, figures, seconds)


class RandomState:
    """The state of torch's generators, from which dropout draws."""

    def __init__(self, device: torch.device):
        self._device = device
        self._of_cpu = torch.get_rng_state()
        self._of_gpu = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def restore(self) -> None:
        """Draw from here on what would have been drawn next when the state was taken."""
        torch.set_rng_state(self._of_cpu)
        if self._of_gpu is not None:
            torch.cuda.set_rng_state(self._of_gpu, self._device)


class _Member(Learner):
    """A student in a run: its log, and its last step, whose figures may still be on the device."""

    def __init__(self, trainer: Trainer, parts: Parts, state: TrainState):
        super().__init__(parts, state, self.read_step)
        self._trainer, run = trainer, trainer.run
        paths = run.paths_of(parts)
        self.logger = RunLogger(parts, paths, state.first_step, leads=parts is run.shared)
        floor = loss_scale_floor(parts.ds_config)
        self._bad_steps = NonFiniteStepCounter(parts.recipe.guard, paths.bad_batch, floor, parts.launch.is_main)
        self._unread: UnreadStep | None = None

    def launched(self, unread: UnreadStep | None) -> None:
        """Take note of a step that has been launched, or of the end of this student in it."""
        if unread is not None:
            self._unread = unread
            self.logger.advance(unread.step + 1)

    def read_step(self) -> None:
        """Take note of the last launched step, unless that is done: report a spike, count a step without a finite gradient.

        Too many of these in a row end the student, and, where it is the only one, the run with a `DivergedRunError`.
        """
        if self._unread is None:
            return
        step, report, self._unread = self._unread.step, self._unread.read(), None
        self.logger.observe(report)
        z_score = self.state.observe(report.loss, report.skipped)
        rows = partial(self._trainer.stepper.rows_of, step)
        if z_score is not None:
            self.logger.spike(step, report, z_score, rows())
        try:
            self._bad_steps.observe(step, report.loss, report.skipped, report.loss_scale, rows)
        except DivergedRunError as error:
            if self._trainer.active == [self]:
                raise
            self.end(step + 1, f"diverged: {error}")

    def evaluated(self, step: int, losses: Mapping[str, float]) -> bool:
        """Take note of the held-out losses after `step` steps. Returns whether they are the best so far."""
        is_best = self.state.evaluated(step, self.logger.heldout(step, losses))
        if step < self.parts.recipe.steps and (
            reason := reason_to_stop(self.state.evaluations, self.parts.recipe.stop_when)
        ):
            self.end(step, reason)
        return is_best

    def end(self, step: int, reason: str) -> None:
        """Train this student no further."""
        self.state.ended = {"step": step, "reason": reason}
        self.logger.say(f"ends after step {step}: {reason}")


class Trainer:
    """Trains steps `[state.first_step, recipe.steps)`, and logs, evaluates and saves on the way."""

    def __init__(self, run: Run, states: Sequence[TrainState]):
        self.run, self.recipe, self.first_step = run, run.recipe, states[0].first_step
        self.members = [_Member(self, *of_one) for of_one in zip(run.members, states, strict=True)]
        self.stepper = Stepper(self.members)
        self.loggers = [member.logger for member in self.members]
        self.saver = Saver(run, states, self.loggers)

    @property
    def active(self) -> list[_Member]:
        """The students that are still trained."""
        return [member for member in self.members if member.state.ended is None]

    def train(self) -> None:
        """Train to the last step or to a stop request, save, and write a marker file."""
        with contextlib.ExitStack() as stack:
            for logger in self.loggers:
                stack.enter_context(contextlib.closing(logger))
            if self.first_step >= self.recipe.steps or not self.active:
                self._confirm_end()
                return
            self._begin()
            with self.stepper.batches(self.first_step) as batches:
                self._loop(batches)

    def _loop(self, batches: Prefetcher) -> None:
        stream = iter(batches)
        periods = (self.recipe.metrics.log_every, self.recipe.eval_every, self.recipe.save_every)
        self.run.watchdog.feed_before_slow_work()
        for logger in self.loggers:
            logger.begin_interval()
        for step in range(self.first_step, self.recipe.steps):
            done = step + 1
            for member, unread in zip(self.members, self.stepper.train_step(step, stream), strict=True):
                member.launched(unread)
            self.run.watchdog.feed()
            self.saver.poll()
            reason, is_last = self._stop_reason(), done == self.recipe.steps
            logs, evaluates, saves = (is_last or done % every == 0 for every in periods)
            if reason or logs or evaluates or saves:
                for member in self.members:
                    member.read_step()
            if logs:
                for member in self.active:
                    member.logger.step(done, member.state.skipped_steps, batches.wait_s)
            if reason:  # save first: time is short
                self.saver.save(done, required=True)
            is_best = (is_last or (evaluates and not reason)) and self._evaluate(
                done
            )  # else the next attempt evaluates
            is_over = is_last or not self.active
            if saves or is_over or (is_best and self.recipe.checkpoint.keep_best):
                self.saver.save(done, required=is_over)
            if is_over:
                self._finish(self.run.paths.done, f"done: {self.recipe.steps} steps{self._early_ends()}")
                return
            if reason:
                self._finish(self.run.paths.preempted, f"stopped on request ({reason}) after step {done}")
                return

    def _early_ends(self) -> str:
        """What to add to the end of a run about students that ended before its last step."""
        ended = [(member.parts.name, member.state.ended) for member in self.members if member.state.ended]
        return "".join(f"; {name or 'ended'} after step {e['step']}: {e['reason']}" for name, e in ended)

    def _evaluate(self, step: int) -> bool:
        """Held-out loss per language and pictures of the relations. All ranks take part: ZeRO-3 gathers parameters.

        Returns:
            whether a student is better than ever
        """
        began, members = time.monotonic(), self.active
        shared, launch = self.run.shared, self.run.launch
        for member in members:
            member.parts.engine.train(False)
        losses = heldout_losses(
            [member.parts.distiller.losses_by_row for member in members],
            shared.source,
            shared.batch.micro_batch,
            launch,
            self.run.watchdog.feed,
        )
        for member in members if self.recipe.metrics.images else ():
            self._show_relations(member, step)
        is_best = [member.evaluated(step, of_member) for member, of_member in zip(members, losses, strict=True)]
        for member in members:
            member.parts.engine.train(True)
        if shared.shared_teacher is not None:
            shared.shared_teacher.release()
        for logger in self.loggers:
            logger.pause(time.monotonic() - began)
        return any(is_best)

    def _show_relations(self, member: _Member, step: int) -> None:
        parts = member.parts
        rows_BL, segments_BS = parts.source.heldout_batch(parts.source.languages[:1])
        rows_BL = rows_BL.to(parts.launch.device)
        for pair in parts.distiller.part_names[: len(parts.recipe.relations.pairs)]:
            maps = parts.distiller.relation_maps(rows_BL, pair, segments=segments_BS)
            member.logger.relation_maps(step, pair, maps)

    # -- beginning and end

    def _begin(self) -> None:
        """Everything that is written before the first step of this attempt."""
        self._describe()
        if self.run.launch.is_main:
            preflight.ensure_run_dir(self.run.paths)
            preflight.remove_markers(self.run.paths.directory)
            self.run.stop.forget_leftover()
        is_evaluated = dist.broadcast_json(all(member.logger.first_step_is_evaluated for member in self.active))
        decides = self.recipe.checkpoint.keep_best or self.recipe.stop_when.no_better_for
        if decides:  # a curve may have a point that the checkpoint does not know
            is_evaluated = is_evaluated and all(member.state.is_evaluated for member in self.active)
        if self.first_step % self.recipe.eval_every == 0 and not is_evaluated:
            self._evaluate(self.first_step)

    def _describe(self) -> None:
        for logger in self.loggers:
            logger.describe()
        if self.recipe.students is not None and self.run.launch.is_main:
            write_file_or_warn(self.run.paths.recipe, recipe_to_yaml(self.recipe))

    def _stop_reason(self) -> str | None:
        """A reason on any rank is a reason on all of them."""
        stop = self.run.stop
        if not dist.any_rank(stop.reason is not None):
            return None
        return next(reason for reason in dist.gather_json(stop.reason) if reason)

    def _finish(self, marker: Path, line: str) -> None:
        if self.run.launch.is_main:
            self.run.restarts.end(marker.name)
            for logger in self.loggers:
                logger.complete_description()
            write_file_or_warn(marker, line + "\n")
        self.loggers[0].say_of_run(f"{line}. Checkpoints: {self.run.paths.checkpoints}")

    def _confirm_end(self) -> None:
        """The run has all its steps: write what is missing because it was deleted, or because of a kill after the last save."""
        paths, line = self.run.paths, f"done: {self.recipe.steps} steps{self._early_ends()}"
        self.loggers[0].say_of_run(f"{paths.directory} already has its {self.recipe.steps} steps; nothing to do")
        if dist.broadcast_json(any(logger.lacks_description for logger in self.loggers)):
            self._describe()
        if self.run.launch.is_main and not paths.done.exists():
            write_file_or_warn(paths.done, line + "\n")


def dropout_seed(seed: int, step: int, rank: int) -> int:
    """Seed of torch's generator for one step on one rank: dropout needs no state in a checkpoint."""
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0] >> np.uint64(1))
