"""Saves of a run: when a checkpoint is begun, what follows when it has ended, which older ones are deleted.

In: a `Run`, the number of finished steps. Out: checkpoints, the entries of the restarts file, warnings of saves that
failed. How a checkpoint is written: runtime/checkpoint_writer.py. All ranks make the same calls in the same order.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from pipeline.errors import UserError
from pipeline.runtime.checkpoint import committed_steps, prune
from pipeline.runtime.checkpoint_writer import CheckpointWriter, SaveOutcome
from pipeline.runtime.evaluations import best_evaluation
from pipeline.training.build import Run
from pipeline.training.resume import TrainState, checkpoint_state
from pipeline.training.run_logger import RunLogger


class Saver:
    """One save at a time, written in the background."""

    def __init__(self, run: Run, states: Sequence[TrainState], loggers: Sequence[RunLogger]):
        """`states` and `loggers` of the run's members."""
        self._run, self._states, self._loggers = run, states, loggers
        checkpoints, first_step = run.paths.checkpoints, states[0].first_step
        students = {member.name: (member.engine, member.student.untrained) for member in run.members}
        self._writer = CheckpointWriter(checkpoints, students, run.launch.rank, run.recipe.checkpoint)
        self._saved_step = first_step if first_step else -1
        self._known_steps = set(committed_steps(checkpoints))  # other programs' checkpoints are never pruned

    def save(self, step: int, required: bool) -> None:
        """Begin the save of `step`, unless it is saved already.

        Args:
            required: wait for its end

        Raises:
            UserError: a required save has failed, or too many in a row have
        """
        if step == self._saved_step:
            return
        self._run.watchdog.feed_before_slow_work()
        began = time.monotonic()
        self._after_save(self._writer.wait())
        pairs = zip(self._run.members, self._states, strict=True)
        self._writer.begin({member.name: checkpoint_state(member, state, step) for member, state in pairs})
        if required:
            outcome = self._writer.wait()
            self._after_save(outcome)
            if outcome is not None and outcome.problem:
                raise UserError(
                    f"the checkpoint of step {step} could not be written: {outcome.problem}. Free space and start again"
                )
        for logger in self._loggers:
            logger.pause(time.monotonic() - began)
        self._run.watchdog.feed()

    def changed(self, step: int) -> None:
        """An evaluation has changed a student's state after `step` steps: a checkpoint of that step lacks it."""
        if self._saved_step == step:
            self._saved_step = -1

    def poll(self) -> None:
        """After every step: take note of a save that has ended in the background."""
        self._after_save(self._writer.poll())

    def _after_save(self, outcome: SaveOutcome | None) -> None:
        """Count a save that has ended, or warn and continue with the older checkpoints."""
        if outcome is None:
            return
        self._run.stop.saw_save(outcome.seconds)
        for logger in self._loggers:
            logger.saved(outcome.step, outcome.stopped_s)
        if outcome.problem:
            self._loggers[0].say_of_run(
                f"warning: checkpoint of step {outcome.step} not written, the run continues: {outcome.problem}"
            )
            self._writer.check_failed_saves(outcome)
            return
        self._saved_step = outcome.step
        if self._run.launch.is_main:
            self._run.restarts.saved(outcome.step, outcome.seconds)
            self._known_steps.add(outcome.step)
            keeping = self._run.recipe.checkpoint
            prune(self._run.paths.checkpoints, keeping, outcome.step, self._known_steps, self._best_steps())

    def _best_steps(self) -> set[int]:
        """The steps at which a student was best, where `checkpoint.keep_best` asks for them."""
        if self._run.recipe.checkpoint.keep_best is None:
            return set()
        # Of the steps that have a checkpoint: a better one that is still being written may never be committed.
        saved = ([e for e in state.evaluations if e[0] in self._known_steps] for state in self._states)
        return {best[0] for best in map(best_evaluation, saved) if best is not None}
