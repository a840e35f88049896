"""Bugs that are likely in a distillation, as replacements of text, and the test that catches each.

With each of them training runs without an error message and gives a slightly worse student. A bug without effect, such as
a factor that Adam divides away, cannot be caught by a test. The probe of a bug shows that it has an effect.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


class StaleBugError(AssertionError):
    """The text that a bug replaces does not occur exactly once."""


@dataclass(frozen=True)
class Bug:
    """`before` becomes `after` in `file`. `test` passes without the bug and fails with it.

    `probe` names a function of probes.py whose figures the bug changes. A bug without a probe is checked by `test` itself.
    """

    name: str
    file: str
    before: str
    after: str
    test: str
    probe: str = ""

    def plant(self, root: Path) -> None:
        """Change the file below `root`. Raises `StaleBugError` where the text does not occur exactly once."""
        path = root / self.file
        text = path.read_text(encoding="utf-8")
        if text.count(self.before) != 1:
            raise StaleBugError(
                f"{self.name}: {self.file} holds the text to be replaced {text.count(self.before)} times, not once. "
                "The code has changed: update the bug in tests/mutants/bugs.py"
            )
        path.write_text(text.replace(self.before, self.after), encoding="utf-8")


BUGS = (
    Bug(
        "mask dropped",
        "pipeline/distillation/documents.py",
        "            return self.real_tokens(input_ids_BL)\n",
        "            return None\n",
        "tests/unit/distillation/test_distill_module.py::test_losses_are_the_papers",
        "loss_of_padded_rows",
    ),
    Bug(
        "off-by-one layer",
        "pipeline/distillation/tap.py",
        "self.layers = layer_numbers(layer)",
        "self.layers = [max(1, number - 1) for number in layer_numbers(layer)]",
        "tests/golden/test_tap_architectures.py::test_packed_rows",
        "tapped_projections",
    ),
    Bug(
        "moments not restored",
        "pipeline/runtime/engine.py",
        "fragment.view(state[name]).copy_(read(name, fragment.name, fragment.start, fragment.numel))",
        "read(name, fragment.name, fragment.start, fragment.numel)",
        "tests/dist/test_checkpoint.py::test_resumed_is_uninterrupted_bit_for_bit",
        "resumed_moments",
    ),
    Bug(
        "sampler reset at a resume",
        "pipeline/training/stepper.py",
        "start = step * self.recipe.global_batch + self.launch.rank * per_rank",
        "start = (step - first_step) * self.recipe.global_batch + self.launch.rank * per_rank",
        "tests/dist/test_train.py::test_kill_and_resume_repeats_the_losses[1]",
        "sample_numbers_of_a_resumed_run",
    ),
    Bug(
        "wrong head split",
        "pipeline/distillation/relations/chunked.py",
        "return x_GND.unflatten(-1, (num_heads, -1)).transpose(1, 2).to(dtype).flatten(0, 1).mT",
        "return x_GND.unflatten(-1, (-1, num_heads)).permute(0, 3, 1, 2).to(dtype).flatten(0, 1).mT",
        "tests/unit/distillation/test_relation_loss.py::test_far_student",
        "relation_losses",
    ),
    Bug(
        "sqrt of the wrong size",
        "pipeline/distillation/relations/chunked.py",
        "scale_T, scale_S = teacher_HdR.shape[1] ** -0.5, student_HdR.shape[1] ** -0.5",
        "scale_T, scale_S = student_HdR.shape[1] ** -0.5, student_HdR.shape[1] ** -0.5",
        "tests/unit/distillation/test_relation_loss.py::test_far_student",
        "relation_losses",
    ),
    Bug(
        "padded query counted",
        "pipeline/distillation/relations/loss.py",
        "weights = [1.0 / (num_heads * sum(parts)) if parts else 0.0 for parts in stretches]",
        "weights = [1.0 / (num_heads * max(1, *map(sum, stretches))) for _ in stretches]",
        "tests/unit/distillation/test_relation_loss.py::test_any_shape_and_padding",
        "relation_losses",
    ),
    Bug(
        "stale held-out split",
        "pipeline/data/sampler.py",
        "return self._place_to_row(language_index, number + self.heldout_per_language[language_index])",
        "return self._place_to_row(language_index, number)",
        "tests/unit/data/test_batches.py::test_held_out_rows_are_never_in_a_batch",
        "training_rows",
    ),
    Bug(
        "frozen weights decayed",
        "pipeline/distillation/models/student.py",
        "in_use = {id(parameter) for parameter in tapped.parameters() if parameter.requires_grad}",
        "in_use = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}",
        "tests/dist/test_train.py::test_export_is_the_trained_student",
        "trained_names",
    ),
    Bug(
        "last micro-batch overweighted",
        "pipeline/training/stepper.py",
        "parts.engine.backward(loss)",
        "parts.engine.backward(loss * (1.5 if self._left == 0 < parts.batch.accumulation - 1 else 1.0))",
        "tests/dist/test_train.py::test_two_ranks_give_the_losses_of_one",
        "direction_of_a_step",
    ),
    Bug(
        "overflow guard for the teacher",
        "pipeline/distillation/relations/chunked.py",
        "models = (inputs.teacher_BLD, inputs.student_BLD)",
        "models = (inputs.teacher_BLD,)",
        "tests/unit/distillation/test_relation_loss.py::test_the_limit_of_the_fixed_shift_is_checked_for_both_models",
        "loss_of_a_large_student",
    ),
    Bug(
        "row order ignores the seed",
        "pipeline/data/sampler.py",
        "mix(self.seed, _ROW_STREAM, language, epoch)",
        "mix(0, _ROW_STREAM, language, epoch)",
        "tests/unit/data/test_sampler.py::test_rows_of_a_language_come_in_another_order_under_another_seed",
        "rows_by_seed",
    ),
    Bug(
        "same dropout on every rank",
        "pipeline/training/stepper.py",
        "torch.manual_seed(dropout_seed(parts.recipe.seed, self._step, launch.rank))",
        "torch.manual_seed(dropout_seed(parts.recipe.seed, self._step, 0))",
        "tests/unit/test_train_step.py::test_dropout_differs_by_rank_step_and_seed",
        "random_numbers_by_rank",
    ),
    Bug(
        "samples written as steps",
        "pipeline/training/resume.py",
        '"samples": step * parts.recipe.global_batch,',
        '"samples": step,',
        "tests/dist/test_train.py::test_a_checkpoint_counts_rows",
        "samples_in_a_checkpoint",
    ),
    Bug(
        "second xz stream dropped",
        "data_prep/unpack.py",
        "        data, number = _after_padding(raw, decoder.unused_data, padding), number + 1\n",
        '        data, number = b"", number + 1\n',
        "tests/unit/data_prep/test_unpack.py::test_everything_after_the_first_stream_is_read",
    ),
    Bug(
        "a task that leaves the model in training mode",
        "pipeline/distillation/tap.py",
        "            part.training = training\n",
        "            part.training = True\n",
        "tests/unit/evaluation/test_independent_tasks.py::test_held_out_losses_leave_every_module_in_its_own_mode",
    ),
)
