"""Resume: choose a checkpoint, check that this is still the same run, load it; and what `state.json` holds.

In: a `Run`. Out: a `TrainState` per student, and each engine filled with the checkpoint's weights and moments. Rank 0 chooses, and
every rank follows its one decision. Where the directory has no checkpoint, the run begins at step 0.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from data_prep.shards import UnreadableError
from pipeline.distillation.models.student import dropout_of
from pipeline.errors import DivergedRunError, UserError
from pipeline.provenance import changed_keys, fingerprint, library_versions, resume_critical_config, rounding_changes
from pipeline.runtime import dist
from pipeline.runtime.anomalies import GuardConfig, SpikeDetector
from pipeline.runtime.checkpoint import CheckpointReader, newest_valid
from pipeline.runtime.checkpoint_files import STATE, read_text
from pipeline.runtime.evaluations import Evaluation, best_evaluation
from pipeline.runtime.restarts import FALL_BACK_AFTER, GIVE_UP_AFTER
from pipeline.training.agreement import environment_warnings
from pipeline.training.build import Parts, Run
from pipeline.training.groups import Group
from pipeline.training.identity import changes


@dataclass
class TrainState:
    """What changes from step to step besides weights and moments. Each save writes it, each resume reads it."""

    spikes: SpikeDetector
    first_step: int = 0  # steps that were done when this attempt began
    skipped_steps: int = 0
    evaluations: list[Evaluation] = field(default_factory=list)
    ended: dict[str, Any] | None = None  # "step" and "reason", where the student is trained no further than that step

    @classmethod
    def restore(cls, saved: Mapping[str, Any], guard: GuardConfig) -> TrainState:
        """From a checkpoint's `state.json`, or from nothing at the start of a run."""
        spikes = SpikeDetector(guard)
        spikes.losses.extend(saved.get("last_losses", []))
        evaluations = [(step, loss) for step, loss in saved.get("evaluations", [])]
        return cls(spikes, saved.get("step", 0), saved.get("skipped_steps", 0), evaluations, saved.get("ended"))

    def observe(self, loss: float, skipped: bool) -> float | None:
        """Count one optimizer step. Returns the z-score of a loss that is a spike, else None."""
        self.skipped_steps += skipped
        return self.spikes.z_score(loss)

    def evaluated(self, step: int, loss: float) -> bool:
        """Take note of the mean held-out loss after `step` steps. Returns whether it is the best so far.

        The loss before the first step is none of training's results.
        """
        if step == 0:
            return False
        self.evaluations = [*(earlier for earlier in self.evaluations if earlier[0] < step), (step, loss)]
        return best_evaluation(self.evaluations) == (step, loss)

    @property
    def is_evaluated(self) -> bool:
        """Whether the step with which this attempt begins has been evaluated."""
        return any(step == self.first_step for step, _ in self.evaluations)


def checkpoint_state(parts: Parts, state: TrainState, step: int) -> dict[str, Any]:
    """The content of a checkpoint's `state.json`: everything besides tensors, after `step` finished steps."""
    critical = resume_critical_config(parts.recipe)
    return {
        "step": step,
        "samples": step * parts.recipe.global_batch,
        "adam_step": parts.engine.adam_step(),
        "skipped_steps": state.skipped_steps,
        "last_losses": list(state.spikes.losses),
        "evaluations": state.evaluations,
        "ended": state.ended,
        "scaler": parts.engine.scaler_state(),
        "world_size": parts.launch.world_size,
        "zero_stage": parts.engine.stage,
        "precision": parts.precision,
        "relation_backend": parts.distiller.backend,
        "recipe": critical,
        "recipe_fingerprint": fingerprint(critical),
        "data_fingerprint": parts.source.fingerprint,
        "identity": parts.student_identity,
        "versions": library_versions(),
        "deepspeed": parts.ds_config,
        "parameters": parts.engine.shapes,
    }


def resume(run: Run, group: Group, allow_change: bool, counts_as_start: bool = True) -> list[TrainState]:
    """Load the newest valid checkpoint. All ranks call this together.

    Args:
        allow_change: warn instead of raising where recipe, teacher or data are no longer those of the checkpoint
        counts_as_start: whether the crash-loop counter sees this start; False for a dry run

    Returns:
        the state of each of the run's members

    Raises:
        UserError: no checkpoint is valid, or it belongs to another run
        DivergedRunError: the last starts all ended in a crash
    """
    run.stop.saw_earlier_saves(dist.broadcast_json(run.restarts.slowest_save_s))
    decision = dist.broadcast_json(_choose(run) if run.launch.is_main else None)
    if decision["crash_loop"]:
        raise DivergedRunError(decision["crash_loop"])
    if decision["error"]:
        raise UserError(decision["error"])
    for problem in decision["problems"]:
        run.say(f"warning: checkpoint passed over: {problem}")
    path = Path(decision["path"]) if decision["path"] else None
    readers = [CheckpointReader(path, member.name) for member in run.members] if path else []
    for line in _warnings_of_all(run, group, readers, allow_change):
        run.say(f"warning: {line}")
    guard = run.recipe.guard
    states = [TrainState.restore(reader.state, guard) for reader in readers] or [
        TrainState.restore({}, guard) for _ in run.members
    ]
    first_step = states[0].first_step
    if counts_as_start and run.launch.is_main and first_step < run.recipe.steps:
        run.restarts.begin(first_step, run.launch.world_size)  # before the load, so that a crash in it counts
    for member, reader in zip(run.members, readers, strict=False):
        _load(member, reader)
    if path is not None:
        run.say(f"resumed from {path}")
    return states


def _warnings_of_all(run: Run, group: Group, readers: Sequence[CheckpointReader], allow_change: bool) -> list[str]:
    """What differs from the checkpoint, and from those of the students that are finished. Raises `UserError` where nothing may."""
    warnings = [f"--allow-change: continues without {', '.join(group.removed)}"] if group.removed else []
    recipes, directory = run.recipe.members(), run.paths.directory
    for name, state_dir in group.finished.items():
        state = json.loads(read_text(Path(state_dir) / STATE))
        warnings += check_changes(state, replace(run.shared, recipe=recipes[name], name=name), directory, allow_change)
    for member, reader in zip(run.members, readers, strict=False):
        warnings += check_changes(reader.state, member, directory, allow_change)
        dropout = max(dropout_of(member.student.model.config).values(), default=0.0)
        warnings += environment_warnings(reader.state, member.ds_config, dropout)
        reader.check_shapes(member.engine.shapes, member.student.untrained)
    return list(dict.fromkeys(warnings))


def _choose(run: Run) -> dict[str, Any]:
    """Rank 0's decision: which checkpoint, or why none."""
    crashes = run.restarts.crashes_in_a_row
    decision: dict[str, Any] = {"error": None, "crash_loop": None, "path": None, "problems": []}
    if crashes >= GIVE_UP_AFTER:
        remove = shlex.join(["rm", str(run.paths.restarts)])
        return decision | {
            "crash_loop": f"the last {crashes} starts in {run.paths.directory} all ended without a new checkpoint and "
            f"without a stop request. Read the end of their logs, fix the cause, and then: {remove}"
        }
    try:
        path, problems = newest_valid(run.paths.checkpoints, skip=int(crashes >= FALL_BACK_AFTER))
    except (UserError, UnreadableError) as error:
        return decision | {"error": str(error)}
    return decision | {"path": str(path) if path else None, "problems": problems}


def check_changes(saved: dict[str, Any], parts: Parts, run_dir: Path, allow_change: bool) -> list[str]:
    """Compare a checkpoint's `state.json` with this run. Teacher and vocabulary are compared by content where the
    checkpoint knows it, else by path.

    Returns:
        warnings about what differs and may differ

    Raises:
        UserError: recipe, teacher or data differ, and `allow_change` is False
    """
    warnings, known = [], saved.get("identity")
    where = f"{run_dir}, student {parts.name}," if parts.name else f"{run_dir}"
    changed = changed_keys(saved["recipe"], parts.recipe, by_path=known is None)
    if saved["data_fingerprint"] != parts.source.fingerprint:
        changed.append(f"data: {saved['data_fingerprint']} -> {parts.source.fingerprint}")
    if known is None:
        warnings.append(
            "this checkpoint was made before checkpoints held the hash of their teacher: if the weights at "
            f"{parts.recipe.teacher} have changed since, nothing notices"
        )
    else:
        changed += changes(known, parts.student_identity)
    if changed and not allow_change:
        raise UserError(
            f"{where} was begun with another recipe, teacher or data ({'; '.join(changed)}). Set it back, choose "
            "another --run-dir, or add --allow-change to continue from this checkpoint with the changes"
        )
    if changed:
        what = f"student {parts.name}" if parts.name else "this run"
        warnings.append(f"--allow-change: {what} continues with changes ({'; '.join(changed)})")
    if rounded := rounding_changes(saved["recipe"], parts.recipe):
        warnings.append(
            f"layers are not compiled as before this checkpoint ({'; '.join(rounded)}): results change by rounding, and "
            "dropout may draw other masks"
        )
    return warnings


def _load(parts: Parts, reader: CheckpointReader) -> None:
    """Weights, moments, loss scale, frozen weights, and the backend that the run has chosen."""
    student, distiller, saved = parts.student, parts.distiller, reader.state
    parts.engine.load(reader.read, saved["adam_step"], saved["scaler"])
    student.untrained.update(reader.untrained())
    parts.engine.load_frozen(student.frozen, student.untrained)
    distiller.load_basis(student.basis_Dd)
    distiller.keep_backend(saved.get("relation_backend"))
