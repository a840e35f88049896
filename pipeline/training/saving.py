"""Saves of a run: when a checkpoint is begun, what follows when it has ended, which older ones are deleted.

In: a `Run`, the number of finished steps. Out: checkpoints, the entries of the restarts file, warnings of saves that
failed. How a checkpoint is written: runtime/checkpoint_writer.py. All ranks make the same calls in the same order.
"""

from __future__ import annotations

import time

from pipeline.errors import UserError
from pipeline.runtime.checkpoint import committed_steps, prune
from pipeline.runtime.checkpoint_writer import CheckpointWriter, SaveOutcome
from pipeline.training.build import Run
from pipeline.training.resume import TrainState, checkpoint_state
from pipeline.training.run_logger import RunLogger


class Saver:
    """One save at a time, written in the background."""

    def __init__(self, run: Run, state: TrainState, logger: RunLogger):
        self._run, self._state, self._logger = run, state, logger
        parts, checkpoints = run.parts, run.paths.checkpoints
        self._writer = CheckpointWriter(
            checkpoints, parts.engine, parts.student.untrained, run.launch.rank, run.recipe.checkpoint
        )
        self._saved_step = state.first_step if state.first_step else -1
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
        self._writer.begin(checkpoint_state(self._run.parts, self._state, step))
        if required:
            outcome = self._writer.wait()
            self._after_save(outcome)
            if outcome is not None and outcome.problem:
                raise UserError(
                    f"the checkpoint of step {step} could not be written: {outcome.problem}. Free space and start again"
                )
        self._logger.pause(time.monotonic() - began)
        self._run.watchdog.feed()

    def poll(self) -> None:
        """After every step: take note of a save that has ended in the background."""
        self._after_save(self._writer.poll())

    def _after_save(self, outcome: SaveOutcome | None) -> None:
        """Count a save that has ended, or warn and continue with the older checkpoints."""
        if outcome is None:
            return
        self._run.stop.saw_save(outcome.seconds)
        self._logger.saved(outcome.step, outcome.stopped_s)
        if outcome.problem:
            self._logger.say(
                f"warning: checkpoint of step {outcome.step} not written, the run continues: {outcome.problem}"
            )
            self._writer.check_failed_saves(outcome)
            return
        self._saved_step = outcome.step
        if self._run.launch.is_main:
            self._run.restarts.saved(outcome.step, outcome.seconds)
            self._known_steps.add(outcome.step)
            prune(self._run.paths.checkpoints, self._run.recipe.checkpoint, outcome.step, self._known_steps)
