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
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from data_prep.command_line import end_lines, module_command
from data_prep.progress import Progress
from pipeline.comparison.table import comparison_lines
from pipeline.config import recipe_to_yaml
from pipeline.data.batches import Prefetcher
from pipeline.data.heldout import heldout_losses, num_turns
from pipeline.errors import DivergedRunError, UserError
from pipeline.runtime import dist, preflight
from pipeline.runtime.anomalies import NonFiniteStepCounter
from pipeline.runtime.ds_config import loss_scale_floor
from pipeline.runtime.evaluations import DIVERGED, reason_to_stop
from pipeline.runtime.noncritical_files import write_file_or_warn
from pipeline.training.build import Parts, Run
from pipeline.training.resume import TrainState, is_over
from pipeline.training.run_logger import RunLogger
from pipeline.training.saving import Saver
from pipeline.training.stepper import Learner, Stepper, UnreadStep


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
            self.logger.launched(unread.step + 1)

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
            self.end(step + 1, f"{DIVERGED}: {error}")

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
        self.began = self.active  # students that this attempt trains

    @property
    def active(self) -> list[_Member]:
        """The students that are still trained."""
        return [member for member in self.members if member.state.ended is None]

    def train(self) -> None:
        """Train to the last step or to a stop request, save, and write a marker file."""
        with contextlib.ExitStack() as stack:
            for logger in self.loggers:
                stack.enter_context(contextlib.closing(logger))
            if is_over([member.state for member in self.members], self.recipe.steps):
                self._confirm_end()
                return
            self._begin()
            if not self.active:  # the evaluation that a stop request had left to this attempt has ended all students
                self.saver.save(self.first_step, required=True)
                self._finish(self.run.paths.done, self._end_line())
                return
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
                prints = self.loggers[0].prints_step(done)
                for member in self.active:
                    member.logger.step(done, member.state.skipped_steps, batches.wait_s, self._flops_per_row(), prints)
            self.loggers[0].advance()
            if reason:  # save first: time is short
                self.saver.save(done, required=True)
            is_best = (is_last or (evaluates and not reason)) and self._evaluate(
                done
            )  # else the next attempt evaluates
            is_over = is_last or not self.active
            if saves or is_over or (is_best and self.recipe.checkpoint.keep_best):
                self.saver.save(done, required=is_over)
            if is_over:
                self._finish(self.run.paths.done, self._end_line())
                return
            if reason:
                self._finish(self.run.paths.preempted, f"stopped on request ({reason}) after step {done}")
                return

    def _flops_per_row(self) -> int:
        """Operations that the teacher and the students that are still trained need."""
        ended = (member.parts.student_flops_per_row for member in self.members if member.state.ended is not None)
        return self.run.shared.flops_per_row - sum(ended)

    def _end_line(self) -> str:
        """The content of the marker DONE, with the students that ended before the last step."""
        ended = [(member.parts.name, member.state.ended) for member in self.members if member.state.ended]
        early = "".join(f"; {name or 'ended'} after step {e['step']}: {e['reason']}" for name, e in ended)
        steps = self.recipe.steps if self.active else max(end["step"] for _, end in ended)
        return f"done: {steps} steps{early}"

    def _evaluate(self, step: int) -> bool:
        """Held-out loss per language and pictures of the relations. All ranks take part: ZeRO-3 gathers parameters.

        Returns:
            whether a student is better than ever
        """
        began, members = time.monotonic(), self.active
        shared, launch = self.run.shared, self.run.launch
        for member in members:
            member.parts.engine.train(False)
        size = shared.batch.micro_batch
        forwards = num_turns(shared.source, size, launch) * len(members)
        with Progress("held-out loss", forwards, "batch", is_shown=launch.is_main) as shown:

            def after_forward() -> None:
                self.run.watchdog.feed()
                shown.update()

            models = [member.parts.distiller.losses_by_row for member in members]
            losses = heldout_losses(models, shared.source, size, launch, after_forward)
        if self.recipe.metrics.images:
            self._show_relations(members, step)
        is_best = [member.evaluated(step, of_member) for member, of_member in zip(members, losses, strict=True)]
        self.saver.changed(step)
        for member in members:
            member.parts.engine.train(True)
        if shared.shared_teacher is not None:
            shared.shared_teacher.release()
        for logger in self.loggers:
            logger.pause(time.monotonic() - began)
        return any(is_best)

    def _show_relations(self, members: Sequence[_Member], step: int) -> None:
        source = self.run.shared.source
        rows_BL, segments_BS = source.heldout_batch(source.languages[:1])
        row_1L = rows_BL[:1].to(self.run.launch.device)  # one tensor for all, which a shared teacher reads once
        for member in members:
            distiller = member.parts.distiller
            for pair in distiller.part_names[: len(member.parts.recipe.relations.pairs)]:
                maps = distiller.relation_maps(row_1L, pair, segments=segments_BS)
                member.logger.relation_maps(step, pair, maps)

    # -- beginning and end

    def _begin(self) -> None:
        """Everything that is written before the first step of this attempt."""
        try:
            self._describe()
        except UserError:
            if self.run.launch.is_main:
                self.run.restarts.end("NOT_BEGUN")
            raise
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
        for member in self.active or self.members:  # the description of one that has ended has its speed
            member.logger.describe()
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
            for member in self.began:
                member.logger.complete_description()
            write_file_or_warn(marker, line + "\n")
        if self.recipe.students is not None and self.run.launch.is_main:
            for row in comparison_lines(self.run.paths.directory):
                self.loggers[0].say_of_run(row)
        self.loggers[0].say_of_run(line)
        self._say_end(resumes=marker == self.run.paths.preempted)

    def _say_end(self, resumes: bool = False) -> None:
        """The last lines: where the checkpoints are, and the next command."""
        run_dir = self.run.paths.directory
        then = module_command("pipeline", "export", run_dir, "--output", run_dir / "student")
        if self.recipe.students is not None:
            then = module_command("pipeline", "compare", run_dir)
        about, then = ("the same command resumes", "") if resumes else ("", then)
        self.loggers[0].say_of_run(end_lines(self.run.paths.checkpoints, about=about, then=then))

    def _confirm_end(self) -> None:
        """The run has all its steps: write what is missing because it was deleted, or because of a kill after the last save."""
        paths = self.run.paths
        what = f"already has its {self.recipe.steps} steps" if self.active else f"is {self._end_line()}"
        self.loggers[0].say_of_run(f"{paths.directory} {what}; nothing to do")
        if dist.broadcast_json(any(logger.lacks_description for logger in self.loggers)):
            self._describe()
        if self.run.launch.is_main and not paths.done.exists():
            write_file_or_warn(paths.done, self._end_line() + "\n")
        self._say_end()
