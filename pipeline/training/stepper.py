"""One optimizer step of every student on one global batch: teacher once, then forward, backward and update of each.

In: the students' parts, a step's number, an iterator of micro-batches. Out: `UnreadStep`s, whose figures are still on the
device. It writes nothing, and reads nothing from the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from pipeline.data.batches import Batch, Prefetcher
from pipeline.distillation.distiller import STUDENT
from pipeline.runtime import dist
from pipeline.runtime.deferred_numbers import DeferredNumbers
from pipeline.runtime.optimizer import learning_rate
from pipeline.runtime.step_clock import OPTIMIZER, OTHER
from pipeline.runtime.zero_step import StepResult
from pipeline.training.build import Parts
from pipeline.training.resume import TrainState
from pipeline.training.run_logger import StepReport


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
    """One student in training, and what is to be done in each of its steps when its forwards have been launched."""

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


def dropout_seed(seed: int, step: int, rank: int) -> int:
    """Seed of torch's generator for one step on one rank: dropout needs no state in a checkpoint."""
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0] >> np.uint64(1))
