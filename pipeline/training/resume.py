"""Resume: choose a checkpoint, check that this is still the same run, load it; and what `state.json` holds.

In: a `Run`. Out: a `TrainState` per student, and each engine filled with the checkpoint's weights and moments. Rank 0 chooses, and
every rank follows its one decision. Where the directory has no checkpoint, the run begins at step 0.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_prep.shards import DataError
from pipeline.distillation.models.student import dropout_of
from pipeline.errors import DivergedRunError, UserError
from pipeline.provenance import changed_keys, fingerprint, library_versions, resume_critical_config, rounding_changes
from pipeline.runtime import dist
from pipeline.runtime.anomalies import GuardConfig, SpikeDetector
from pipeline.runtime.checkpoint import CheckpointReader, newest_valid
from pipeline.runtime.evaluations import DIVERGED, Evaluation, best_evaluation, reason_to_stop
from pipeline.runtime.restarts import FALL_BACK_AFTER, GIVE_UP_AFTER
from pipeline.training.agreement import environment_warnings
from pipeline.training.build import MadeFrom, Parts, Run
from pipeline.training.groups import Group
from pipeline.training.identity import changes
from pipeline.training.sentences import batch_warnings, sentence_identity, settings_of
from pipeline.training.student_start import start_hashes


@dataclass
class TrainState:
    """What changes from step to step besides weights and moments. Each save writes it, each resume reads it."""

    spikes: SpikeDetector
    first_step: int = 0  # steps that were done when this attempt began
    skipped_steps: int = 0
    evaluations: list[Evaluation] = field(default_factory=list)
    ended: dict[str, Any] | None = None  # "step" and "reason", where the student is trained no further than that step

    @property
    def has_diverged(self) -> bool:
        """Whether the student has ended because its steps were not finite."""
        return self.ended is not None and self.ended["reason"].startswith(DIVERGED)

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


def is_over(states: Sequence[TrainState], steps: int) -> bool:
    """Whether nothing is left to train: the last step is done, or every student has ended before it."""
    return states[0].first_step >= steps or all(state.ended is not None for state in states)


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
        "identity": parts.made_from.identity,
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
    decision = dist.broadcast_json(_choose(run, group, allow_change) if run.launch.is_main else None)
    if decision["crash_loop"]:
        raise DivergedRunError(decision["crash_loop"])
    if decision["error"]:
        raise UserError(decision["error"])
    for problem in decision["problems"]:
        run.say(f"warning: checkpoint passed over: {problem}")
    path = Path(decision["path"]) if decision["path"] else None
    readers = [CheckpointReader(path, member.name) for member in run.members] if path else []
    removed = [f"--allow-change: continues without {', '.join(group.removed)}"] if group.removed else []
    warnings = [*removed, *decision["warnings"], *_warnings_of_members(run, readers, allow_change)]
    saved = [reader.state for reader in readers] or [{} for _ in run.members]
    states = [TrainState.restore(of_student, run.recipe.guard) for of_student in saved]
    for member, state in zip(run.members, states, strict=True):
        warnings += _reopened(member, state)
    for line in dict.fromkeys(warnings):
        run.say(f"warning: {line}")
    first_step = states[0].first_step
    if counts_as_start and run.launch.is_main and not is_over(states, run.recipe.steps):
        run.restarts.begin(first_step, run.launch.world_size)  # before the load, so that a crash in it counts
    for member, reader in zip(run.members, readers, strict=False):
        _load(member, reader)
    if path is not None:
        run.say(f"resumed from {path}")
    return states


def _warnings_of_members(run: Run, readers: Sequence[CheckpointReader], allow_change: bool) -> list[str]:
    """What differs from the checkpoint. Raises `UserError` where nothing may."""
    warnings = []
    for member, reader in zip(run.members, readers, strict=False):
        warnings += check_changes(reader.state, member.made_from, run.paths.directory, allow_change)
        dropout = max(dropout_of(member.student.model.config).values(), default=0.0)
        warnings += environment_warnings(reader.state, member.ds_config, dropout)
        warnings += batch_warnings(reader.state, member.recipe, member.batch.micro_batch * member.launch.world_size)
        reader.check_shapes(member.engine.shapes, member.student.untrained)
    return warnings


def _reopened(member: Parts, state: TrainState) -> list[str]:
    """Continue a student that stopped early where the recipe's `stop_when` no longer asks for it; else a warning."""
    if state.ended is None or state.has_diverged or reason_to_stop(state.evaluations, member.recipe.stop_when):
        return []
    if state.ended["step"] == state.first_step:
        state.ended = None
        return []
    return [
        f"{member.name} ended after step {state.ended['step']} ({state.ended['reason']}). `stop_when` no longer asks for "
        "that, but the others are further, so it stays as it is"
    ]


def _choose(run: Run, group: Group, allow_change: bool) -> dict[str, Any]:
    """Rank 0's decision: which checkpoint, or why none; and what differs from the students that are finished."""
    crashes = run.restarts.crashes_in_a_row
    decision: dict[str, Any] = {"error": None, "crash_loop": None, "path": None, "problems": [], "warnings": []}
    if crashes >= GIVE_UP_AFTER:
        remove = shlex.join(["rm", str(run.paths.restarts)])
        return decision | {
            "crash_loop": f"the last {crashes} starts in {run.paths.directory} all ended without a new checkpoint and "
            f"without a stop request. Read the end of their logs, fix the cause, and then: {remove}"
        }
    try:
        warnings = _warnings_of_finished(run, group, allow_change)
        path, problems = newest_valid(run.paths.checkpoints, skip=int(crashes >= FALL_BACK_AFTER))
    except (UserError, DataError, OSError) as error:
        return decision | {"error": str(error)}
    return decision | {"path": str(path) if path else None, "problems": problems, "warnings": warnings}


def _warnings_of_finished(run: Run, group: Group, allow_change: bool) -> list[str]:
    """As `_warnings_of_members`, for the recipe's students that are not trained because they have all their steps.

    Raises `UserError` also where the last checkpoint of one is not valid.
    """
    recipes, shared, warnings = run.recipe.members(), run.shared.made_from, []
    for name, place in group.finished.items():
        checkpoint = Path(place).parent
        found, problems = newest_valid(checkpoint.parent)
        if found != checkpoint:
            raise UserError(
                f"student {name} is finished, but its last checkpoint is not valid ({'; '.join(problems)}). Restore it from a "
                "backup, or choose another --run-dir"
            )
        own = start_hashes(recipes[name]) | sentence_identity(settings_of(recipes[name]))
        made_from = MadeFrom(recipes[name], run.shared.identity | own, shared.data_fingerprint, name)
        warnings += check_changes(
            CheckpointReader(found, name).state, made_from, run.paths.directory, allow_change, True
        )
    return warnings


def check_changes(
    saved: dict[str, Any], now: MadeFrom, run_dir: Path, allow_change: bool, is_finished: bool = False
) -> list[str]:
    """Compare a checkpoint's `state.json` with what this attempt would make the student from. Teacher, vocabulary and the
    encoder of a start are compared by content where the checkpoint knows it, else by path.

    Args:
        is_finished: the student is trained no further

    Returns:
        warnings about what differs and may differ

    Raises:
        UserError: recipe, teacher or data differ, and `allow_change` is False
    """
    warnings, known = [], saved.get("identity")
    where = f"{run_dir}, student {now.name}," if now.name else f"{run_dir}"
    changed = changed_keys(saved["recipe"], now.recipe, by_path=known is None)
    if saved["data_fingerprint"] != now.data_fingerprint:
        changed.append(f"data: {saved['data_fingerprint']} -> {now.data_fingerprint}")
    if known is None:
        warnings.append(
            "this checkpoint was made before checkpoints held the hash of their teacher: if the weights at "
            f"{now.recipe.teacher} have changed since, nothing notices"
        )
    else:
        changed += changes(known, now.identity)
    if changed and not allow_change:
        raise UserError(
            f"{where} was begun with another recipe, teacher or data ({'; '.join(changed)}). Set it back, choose "
            "another --run-dir, or add --allow-change to continue from this checkpoint with the changes"
        )
    if changed:
        what = f"student {now.name}" if now.name else "this run"
        does = "is finished, and the recipe has changed since" if is_finished else "continues with changes"
        warnings.append(f"--allow-change: {what} {does} ({'; '.join(changed)})")
    if not is_finished and (rounded := rounding_changes(saved["recipe"], now.recipe)):
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
