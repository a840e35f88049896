"""One teacher for several students: its forward runs once for each batch, and every student reads its own layers.

In: a teacher that is tapped at all layers which any student reads. Out: a `TeacherView` per student, with the call and the
results of a teacher that is tapped for this student alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from pipeline.distillation.config import RelationsConfig
from pipeline.distillation.documents import Documents
from pipeline.distillation.tap import layer_numbers


def layers_of_all(relations: Sequence[RelationsConfig], last: int) -> list[int]:
    """The teacher's layers that any of several students reads, ascending. `last`: the number of the teacher's last layer."""
    return sorted({layer for config in relations for layer in layer_numbers(config.teacher_taps or last)})


def tap_options_of_all(relations: Sequence[RelationsConfig]) -> dict[str, bool]:
    """The other options of `tap` for this teacher: complete where any of the students has a tail term."""
    return {**relations[0].tap_options, "with_output": any(config.tail != "none" for config in relations)}


class SharedTeacher:
    """Runs the teacher when a batch is seen for the first time, and keeps the results until the next one or `release`.

    Args:
        teacher: a callable with the call and results of `tap`, tapped at `layers` (a list) and with `with_output`
        layers: the tapped layers, counted from 1
        widths: channels of Q of each of them
        with_output: whether it returns its last hidden state too
    """

    def __init__(self, teacher: Callable, layers: Sequence[int], widths: Sequence[int], with_output: bool) -> None:
        self._teacher, self._with_output = teacher, with_output
        self._width_of = dict(zip(layers, widths, strict=True))
        self._batch_BL: torch.Tensor | None = None
        self._result: Any = None

    def view(self, config: RelationsConfig) -> TeacherView:
        """The teacher of the student whose relations are `config`."""
        return TeacherView(self, config.teacher_taps or max(self._width_of), config.tail != "none", self._width_of)

    def results(
        self, input_ids_BL: torch.Tensor, attention_mask: torch.Tensor | Documents | None
    ) -> tuple[dict[int, Any], Any]:
        """Q, K and V of every tapped layer, and the last hidden state or None. A batch is the same if it is the same tensor."""
        if self._batch_BL is not input_ids_BL:
            self.release()
            result = self._teacher(input_ids_BL, attention_mask)
            layers, output_BLD = result if self._with_output else (result, None)
            self._batch_BL, self._result = input_ids_BL, (dict(zip(self._width_of, layers, strict=True)), output_BLD)
        return self._result

    def release(self) -> None:
        """Forget the last batch, when the last student has read it: its backward needs the memory."""
        self._batch_BL = self._result = None


class TeacherView:
    """What one student sees of a shared teacher: the call and results of `tap` with this student's layers."""

    def __init__(
        self, shared: SharedTeacher, taps: int | list[int], with_output: bool, width_of: dict[int, int]
    ) -> None:
        self._shared, self._taps, self._with_output = shared, taps, with_output
        self.widths = [width_of[layer] for layer in layer_numbers(taps)]

    def __call__(self, input_ids_BL: torch.Tensor, attention_mask: torch.Tensor | Documents | None = None):
        of_layers, output_BLD = self._shared.results(input_ids_BL, attention_mask)
        taken = [of_layers[layer] for layer in layer_numbers(self._taps)]
        result = taken[0] if isinstance(self._taps, int) else taken
        return (result, output_BLD) if self._with_output else result
