"""The training loop: sample numbers in, a distilled student out, in one run directory.

    recipe + DeepSpeed JSON -> assembly.py -> Trainer.run():  batch -> teacher and student -> relation loss -> step
    runs/NAME/  recipe.yaml deepspeed.json run.json student_config.json metrics.jsonl tensorboard/ checkpoints/ DONE

Resuming is what happens when the directory already holds a checkpoint. State is one integer - the number of finished
steps - plus what checkpoint.py keeps, so an interrupted run and an uninterrupted one end in the same student.
"""

from __future__ import annotations

import shlex
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data_prep.shards import UnreadableError
from pipeline.config import Recipe
from pipeline.data.batches import Batch, Prefetcher
from pipeline.data.heldout import heldout_losses
from pipeline.distillation.models.student import dropout_of
from pipeline.errors import DivergedRunError, UserError
from pipeline.provenance import changed_keys, fingerprint, library_versions, resume_critical_config
from pipeline.runtime import checkpoint, dist, preflight
from pipeline.runtime.anomalies import BadStepCounter, SpikeDetector, record_spike
from pipeline.runtime.checkpoint_writer import CheckpointWriter, SaveOutcome
from pipeline.runtime.dist import Launch
from pipeline.runtime.ds_config import loss_scale_floor
from pipeline.runtime.noncritical_files import write_file_or_warn
from pipeline.runtime.optimizer import learning_rate
from pipeline.runtime.restarts import FALL_BACK_AFTER, GIVE_UP_AFTER, Restarts
from pipeline.runtime.stop import StopRequests
from pipeline.runtime.watchdog import Watchdog
from pipeline.training.agreement import other_surroundings
from pipeline.training.build import Parts
from pipeline.training.identity import changes
from pipeline.training.run_logger import Reporter, StepReport


class Trainer:
    """Runs steps `[resumed, recipe.steps)`, saving, evaluating and reporting on the way."""

    def __init__(
        self, recipe: Recipe, parts: Parts, launch: Launch, run_dir: Path, stop: StopRequests, watchdog: Watchdog
    ):
        self.recipe, self.parts, self.launch, self.run_dir = recipe, parts, launch, run_dir
        self.stop, self.watchdog = stop, watchdog
        self.engine, self.source = parts.engine, parts.source
        self.checkpoints = run_dir / "checkpoints"
        self.writer = CheckpointWriter(
            self.checkpoints, parts.engine, parts.student.untrained, launch.rank, recipe.checkpoint
        )
        self.data_fingerprint: str = parts.source.fingerprint
        self.skipped_steps = 0
        self.saved_step = -1
        self.known_steps = set(checkpoint.committed_steps(self.checkpoints))  # those that this attempt may prune
        self.spikes = SpikeDetector(recipe.guard)

    # -- one step -----------------------------------------------------------------------------------------------------

    def train_step(self, step: int, batches: Iterator[Batch]) -> StepReport:
        """One optimizer step over one global batch: `accumulation` micro-batches on every rank."""
        torch.manual_seed(dropout_seed(self.recipe.seed, step, self.launch.rank))
        rate = learning_rate(self.recipe.optimizer, step, self.recipe.steps)
        totals: torch.Tensor | None = None
        result = None
        for micro in range(self.parts.batch.accumulation):
            input_ids_BL, segments_BS = next(batches)
            input_ids_BL = input_ids_BL.to(self.launch.device, non_blocking=True)
            loss, parts_P = self.engine(input_ids_BL, segments=segments_BS)
            losses = torch.cat([loss.detach().float().reshape(1), parts_P.float()])
            totals = losses if totals is None else totals + losses
            if micro == self.parts.batch.accumulation - 1:
                dist.sum_over_ranks(totals).div_(self.parts.batch.accumulation * self.launch.world_size)
                if self.spikes.is_to_skip(totals[0].item()):
                    loss = loss * float("nan")  # a gradient that is not finite on any rank is a step on none
            self.engine.backward(loss)
            result = self.engine.step(rate)
        assert totals is not None
        assert result is not None, "the last micro-batch must close the optimizer step"
        total, *relations = totals.tolist()
        return StepReport(total, relations, result.gradient_norm, result.skipped, result.loss_scale, rate)

    # -----------------------------------------------------------------------------------------------------------------

    def run(self, allow_change: bool) -> None:
        """Resume or begin, train to the last step or to a stop request, save, and leave a marker file."""
        self._check_before()
        first = self._resume(allow_change)
        self.reporter = Reporter(self.recipe, self.parts, self.launch, self.run_dir, first)
        try:
            if first >= self.recipe.steps:
                self.reporter.metrics.say(f"{self.run_dir} already has its {self.recipe.steps} steps; nothing to do")
                if dist.broadcast_json(self.reporter.lacks_description, self.launch.device):
                    self.reporter.describe(first)
                if self.launch.is_main and not (self.run_dir / "DONE").exists():  # killed after its last save
                    write_file_or_warn(self.run_dir / "DONE", f"done: {self.recipe.steps} steps\n")
                return
            self._begin(first)
            pin = self.launch.device.type == "cuda"
            with Prefetcher(self.source, self._sample_numbers(first), pin_memory=pin) as batches:
                self._train(first, batches)
        finally:
            self.reporter.metrics.close()

    def prepare(self, allow_change: bool) -> int:
        """What `run` does before its first step: the number of steps that are done."""
        self._check_before()
        return self._resume(allow_change, counts_as_start=False)

    def steps_from(self, first: int) -> Iterator[StepReport]:
        """Training steps and nothing else: no report, no save."""
        with Prefetcher(self.source, self._sample_numbers(first), self.launch.device.type == "cuda") as batches:
            stream = iter(batches)
            for step in range(first, self.recipe.steps):
                yield self.train_step(step, stream)
                self.watchdog.feed()

    def _train(self, first: int, batches: Prefetcher) -> None:
        floor = loss_scale_floor(self.parts.ds_config)
        bad_steps = BadStepCounter(self.recipe.guard, self.run_dir / "bad_batch.json", floor, self.launch.is_main)
        stream = iter(batches)
        self.watchdog.feed_before_slow_work()
        self.reporter.begin_interval()
        for step in range(first, self.recipe.steps):
            report = self.train_step(step, stream)
            self.watchdog.feed()
            self._observe(step, report, bad_steps)
            done = step + 1
            self.reporter.step(done, report, self.skipped_steps, batches.wait_s)
            self._after_save(self.writer.poll())
            reason = self._stop_reason()
            last = done == self.recipe.steps
            if reason:  # before all else: time is short
                self._save(done, required=True)
            if last or (done % self.recipe.eval_every == 0 and not reason):  # else the next life does
                self._evaluate(done)
            if last or done % self.recipe.save_every == 0:
                self._save(done, required=last)
            if reason and not last:
                return self._finish("PREEMPTED", f"stopped on request ({reason}) after step {done}")
        self._finish("DONE", f"done: {self.recipe.steps} steps")

    def _check_before(self) -> None:
        """Can this run save, and do all ranks run the same thing? Nothing is trained before both are known."""
        found: dict[str, Any] = {"problem": None, "shards": [], "host": socket.gethostname()}
        if self.launch.is_main:
            found["problem"] = self._problem_on_disk()
        if self.recipe.guard.verify_shards:
            mine = preflight.my_share(self.source.shards.all_shards(), self.launch)
            try:
                found["shards"] = preflight.corrupt_shards(mine, self.watchdog.feed_before_slow_work)
            except UnreadableError as error:
                found["problem"] = str(error)  # on every rank, or the others would wait for this one
        preflight.check_problems(dist.gather_json(found, self.launch.device), self.recipe.data)
        preflight.check_shared(self.run_dir, self.launch)

    def _problem_on_disk(self) -> str | None:
        try:
            present, keeping = checkpoint.committed_steps(self.checkpoints), self.recipe.checkpoint
        except UnreadableError as error:
            return str(error)
        every = keeping.keep_every or self.recipe.steps + 1
        milestones = self.recipe.steps // every - sum(step % every == 0 for step in present)
        disk = (self.checkpoint_bytes, keeping.keep, len(present), milestones)
        return preflight.problem_on_disk(self.run_dir, *disk)

    def _begin(self, first: int) -> None:
        """Everything that is written before the first step of this life."""
        self.reporter.describe(first)
        if self.launch.is_main:
            preflight.ensure_run_dir(self.run_dir)
            preflight.remove_markers(self.run_dir)
            self.stop.forget_leftover()
        is_evaluated = dist.broadcast_json(self.reporter.first_is_evaluated, self.launch.device)
        if first % self.recipe.eval_every == 0 and not is_evaluated:
            self._evaluate(first)

    @property
    def checkpoint_bytes(self) -> int:
        """fp32 weights and both moments of what is trained, and what is carried along."""
        return 12 * self.parts.num_trained + sum(tensor.nbytes for tensor in self.parts.student.untrained.values())

    # -- data

    def _sample_numbers(self, first_step: int) -> Iterator[np.ndarray]:
        """This rank's share of each global batch, micro-batch by micro-batch: the same order for any number of ranks."""
        per_rank = self.recipe.global_batch // self.launch.world_size
        for step in range(first_step, self.recipe.steps):
            start = step * self.recipe.global_batch + self.launch.rank * per_rank
            for micro in range(start, start + per_rank, self.parts.batch.micro_batch):
                yield np.arange(micro, micro + self.parts.batch.micro_batch, dtype=np.int64)

    def _rows_of(self, step: int) -> list[dict[str, Any]]:
        numbers = np.arange(step * self.recipe.global_batch, (step + 1) * self.recipe.global_batch, dtype=np.int64)
        return [
            {"language": language, "row": row, "shards": self.source.shard_files(language, row)}
            for language, row in self.source.locate(numbers)
        ]

    # -- checkpoints

    def _resume(self, allow_change: bool, counts_as_start: bool = True) -> int:
        """Load the newest whole checkpoint, chosen by rank 0 for all. Returns the number of finished steps."""
        self.restarts = Restarts(self.run_dir, writes=self.launch.is_main)
        self.stop.saw_earlier_saves(dist.broadcast_json(self.restarts.slowest_save_s, self.launch.device))
        decision = dist.broadcast_json(self._choose() if self.launch.is_main else None, self.launch.device)
        if decision["crash_loop"]:
            raise DivergedRunError(decision["crash_loop"])
        if decision["error"]:
            raise UserError(decision["error"])
        for problem in decision["problems"]:
            if self.launch.is_main:
                print(f"warning: checkpoint passed over: {problem}", flush=True)
        reader = checkpoint.CheckpointReader(Path(decision["path"])) if decision["path"] else None
        if reader is not None:
            self._check_changes(reader.state, allow_change)
            dropout = max(dropout_of(self.parts.student.model.config).values(), default=0.0)
            for line in other_surroundings(reader.state, self.parts.ds_config, dropout):
                self._say(f"warning: {line}")
            reader.check_shapes(self.engine.shapes, self.parts.student.untrained)
        first = reader.state["step"] if reader is not None else 0
        if counts_as_start and self.launch.is_main and first < self.recipe.steps:
            self.restarts.begin(first, self.launch.world_size)  # before the load: a crash in it is counted
        if reader is None:
            return 0
        self.engine.load(reader.read, reader.state["adam_step"], reader.state["scaler"])
        student = self.parts.student
        student.untrained.update(reader.untrained())
        self.engine.load_frozen(student.frozen, student.untrained)
        self.parts.distiller.basis_Dd = student.basis_Dd
        self.skipped_steps = reader.state["skipped_steps"]
        self.parts.distiller.keep_backend(reader.state.get("relation_backend"))
        self.spikes.losses.extend(reader.state.get("last_losses", []))
        self.saved_step = reader.state["step"]
        if self.launch.is_main:
            print(f"resumed from {decision['path']}", flush=True)
        return reader.state["step"]

    def _choose(self) -> dict[str, Any]:
        """Rank 0's decision: which checkpoint, or why none."""
        crashes = self.restarts.crashes_in_a_row
        decision: dict[str, Any] = {"error": None, "crash_loop": None, "path": None, "problems": []}
        if crashes >= GIVE_UP_AFTER:
            decision["crash_loop"] = (
                f"the last {crashes} starts in {self.run_dir} all ended without a new checkpoint and without having been "
                f"asked to stop. Read the end of their logs, fix the cause, and then: rm {shlex.quote(str(self.run_dir / 'restarts.json'))}"
            )
            return decision
        try:
            path, problems = checkpoint.newest_valid(self.checkpoints, skip=int(crashes >= FALL_BACK_AFTER))
        except (UserError, UnreadableError) as error:
            return {**decision, "error": str(error)}
        return {**decision, "path": str(path) if path else None, "problems": problems}

    def _check_changes(self, state: dict[str, Any], allow_change: bool) -> None:
        """Teacher and vocabulary are compared by content where the checkpoint knows it, else by path."""
        known = state.get("identity")
        changed = changed_keys(state["recipe"], self.recipe, by_path=known is None)
        if state["data_fingerprint"] != self.data_fingerprint:
            changed.append(f"data: {state['data_fingerprint']} -> {self.data_fingerprint}")
        if known is None:
            self._say(
                "warning: this checkpoint was made before checkpoints knew their teacher by content: if other weights are at "
                f"{self.recipe.teacher} by now, nothing notices"
            )
        else:
            changed += changes(known, self.parts.identity)
        if changed and not allow_change:
            raise UserError(
                f"{self.run_dir} was begun with another recipe, teacher or data ({'; '.join(changed)}). Set it back, take "
                "another --run-dir, or add --allow-change to go on from this checkpoint all the same"
            )
        if changed:
            self._say(f"warning: --allow-change: this run goes on with something else ({'; '.join(changed)})")

    def _say(self, line: str) -> None:
        if self.launch.is_main:
            print(line, flush=True)

    def _save(self, step: int, required: bool) -> None:
        """Begin a save; the files are written beside the training. With `must` it is waited for and may not fail."""
        if step == self.saved_step:
            return
        self.watchdog.feed_before_slow_work()
        began = time.monotonic()
        self._after_save(self.writer.wait())
        self.writer.begin(self._state(step))
        if required:
            outcome = self.writer.wait()
            self._after_save(outcome)
            if outcome is not None and outcome.problem:
                raise UserError(
                    f"the checkpoint of step {step} could not be written: {outcome.problem}. Free space and start again"
                )
        self.reporter.pause(time.monotonic() - began)
        self.watchdog.feed()

    def _state(self, step: int) -> dict[str, Any]:
        """What a checkpoint knows beside tensors."""
        return {
            "step": step,
            "samples": step * self.recipe.global_batch,
            "adam_step": self.engine.adam_step(),
            "skipped_steps": self.skipped_steps,
            "last_losses": list(self.spikes.losses),
            "scaler": self.engine.scaler_state(),
            "world_size": self.launch.world_size,
            "zero_stage": self.engine.stage,
            "precision": self.parts.precision,
            "relation_backend": self.parts.distiller.backend,
            "recipe": resume_critical_config(self.recipe),
            "recipe_fingerprint": fingerprint(resume_critical_config(self.recipe)),
            "data_fingerprint": self.data_fingerprint,
            "identity": self.parts.identity,
            "versions": library_versions(),
            "deepspeed": self.parts.ds_config,
            "parameters": self.engine.shapes,
        }

    def _after_save(self, outcome: SaveOutcome | None) -> None:
        """A save has ended, now or some steps ago: count it, or warn and go on with the older checkpoints."""
        if outcome is None:
            return
        self.stop.saw_save(outcome.seconds)
        self.reporter.saved(outcome.step, outcome.stopped_s)
        if outcome.problem:
            self.reporter.metrics.say(
                f"warning: checkpoint of step {outcome.step} not written, going on: {outcome.problem}"
            )
            self.writer.check_failed_saves(outcome)
            return
        self.saved_step = outcome.step
        if self.launch.is_main:
            self.restarts.saved(outcome.step, outcome.seconds)
            self.known_steps.add(outcome.step)
            checkpoint.prune(self.checkpoints, self.recipe.checkpoint, outcome.step, self.known_steps)

    def _observe(self, step: int, report: StepReport, bad_steps: BadStepCounter) -> None:
        self.skipped_steps += report.skipped
        score = self.spikes.z_score(report.loss)
        if score is not None:
            self.reporter.metrics.say(
                f"warning: loss {report.loss:.4f} at step {step + 1} is {score:.0f} sigmas above the last steps"
            )
            self.reporter.metrics.write(step + 1, (step + 1) * self.recipe.global_batch, {"loss/spike_sigmas": score})
            if self.launch.is_main:
                record_spike(
                    self.run_dir / "spikes.jsonl", step, report.loss, score, report.skipped, self._rows_of(step)
                )
        bad_steps.observe(step, report.loss, report.skipped, report.loss_scale, lambda: self._rows_of(step))

    def _evaluate(self, step: int) -> None:
        """Held-out loss per language and pictures of the relations. All ranks take part: ZeRO-3 gathers parameters."""
        began = time.monotonic()
        self.engine.train(False)
        losses = heldout_losses(
            self.parts.distiller.losses_by_row,
            self.source,
            self.parts.batch.micro_batch,
            self.launch,
            dist.sum_over_ranks,
            self.watchdog.feed,
        )
        self.reporter.heldout(step, losses)
        if self.recipe.metrics.images:
            rows_BL, segments_BS = self.source.heldout_batch(self.source.languages[:1])
            rows_BL = rows_BL.to(self.launch.device)
            for pair in self.parts.distiller.part_names[: len(self.recipe.relations.pairs)]:
                maps = self.parts.distiller.relation_maps(rows_BL, pair, segments=segments_BS)
                self.reporter.relation_maps(step, pair, maps)
        self.engine.train(True)
        self.reporter.pause(time.monotonic() - began)

    # -- the end

    def _stop_reason(self) -> str | None:
        """A reason on any rank is a reason on all of them."""
        if not dist.any_rank(self.stop.reason is not None, self.launch.device):
            return None
        reasons = dist.gather_json(self.stop.reason, self.launch.device)
        return next(reason for reason in reasons if reason)

    def _finish(self, marker: str, line: str) -> None:
        if self.launch.is_main:
            self.restarts.end(marker)
            self.reporter.describe_again()
            write_file_or_warn(self.run_dir / marker, line + "\n")
        self.reporter.metrics.say(f"{line}. Checkpoints: {self.checkpoints}")


def dropout_seed(seed: int, step: int, rank: int) -> int:
    """Seed of torch's generator for one step on one rank: dropout needs no state in a checkpoint."""
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0] >> np.uint64(1))
