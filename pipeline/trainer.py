"""The training loop: sample numbers in, a distilled student out, in one run directory.

    recipe + DeepSpeed JSON -> assembly.py -> Trainer.run():  batch -> teacher and student -> relation loss -> step
    runs/NAME/  recipe.yaml deepspeed.json run.json student_config.json metrics.jsonl tensorboard/ checkpoints/ DONE

Resuming is what happens when the directory already holds a checkpoint. State is one integer - the number of finished
steps - plus what checkpoint.py keeps, so an interrupted run and an uninterrupted one end in the same student.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.assembly import Parts, assemble
from pipeline.config import Recipe, load_recipe, recipe_to_yaml
from pipeline.data.batches import Prefetcher
from pipeline.errors import EXIT_DONE, UserError
from pipeline.evaluation.heldout import heldout_losses
from pipeline.lineage import describe_run, fingerprint, mathematics
from pipeline.runtime import checkpoint, dist
from pipeline.runtime.dist import Launch
from pipeline.runtime.guard import BadStepCounter, StopRequests, Watchdog
from pipeline.runtime.metrics import Metrics
from pipeline.runtime.schedule import learning_rate

COLLECTIVE_TIMEOUT_MARGIN = 1.5  # the watchdog should bite first: it knows where every thread stands


def run_from_files(
    recipe_path: Path, recipe_is_default: bool, ds_path: Path, run_dir: Path, overrides: list[str], allow_change: bool
) -> int:
    """Everything behind `pipeline/train.py`. Returns the exit code; raises what the user can mend."""
    launch = dist.read_launch()
    if launch.is_main:
        note = " (no --recipe given)" if recipe_is_default else ""
        print(f"recipe {recipe_path}{note}, run directory {run_dir}", flush=True)
    recipe = load_recipe(recipe_path, overrides)
    stop = StopRequests(run_dir / "STOP")
    stop.listen()
    dist.init_process_group(launch, recipe.guard.hang_timeout_s * COLLECTIVE_TIMEOUT_MARGIN)
    try:
        with Watchdog(recipe.guard.hang_timeout_s, run_dir / "logs" / f"stacks-rank{launch.rank}.txt") as watchdog:
            parts = assemble(recipe, recipe_path, ds_path, launch)
            Trainer(recipe, parts, launch, run_dir, stop, watchdog).run(allow_change)
    finally:
        dist.shut_down()
    return EXIT_DONE


@dataclass
class StepReport:
    """One optimizer step, averaged over the global batch."""

    loss: float
    parts: list[float]
    gradient_norm: float
    skipped: bool
    loss_scale: float
    learning_rate: float


class Trainer:
    """Runs steps `[resumed, recipe.steps)`, saving, evaluating and reporting on the way."""

    def __init__(
        self, recipe: Recipe, parts: Parts, launch: Launch, run_dir: Path, stop: StopRequests, watchdog: Watchdog
    ):
        self.recipe, self.parts, self.launch, self.run_dir = recipe, parts, launch, run_dir
        self.stop, self.watchdog = stop, watchdog
        self.engine, self.source = parts.engine, parts.source
        self.checkpoints = run_dir / "checkpoints"
        self.data_fingerprint: str = parts.source.fingerprint
        self.skipped_steps = 0
        self.saved_step = -1
        self.interval = _Interval()

    # -- one step -----------------------------------------------------------------------------------------------------

    def train_step(self, step: int, batches: Iterator[torch.Tensor]) -> StepReport:
        """One optimizer step over one global batch: `accumulation` micro-batches on every rank."""
        torch.manual_seed(dropout_seed(self.recipe.seed, step, self.launch.rank))
        rate = learning_rate(self.recipe.optimizer, step, self.recipe.steps)
        totals: torch.Tensor | None = None
        result = None
        for _ in range(self.parts.batch.accumulation):
            input_ids_BL = next(batches).to(self.launch.device, non_blocking=True)
            loss, parts_P = self.engine(input_ids_BL)
            self.engine.backward(loss)
            losses = torch.cat([loss.detach().float().reshape(1), parts_P.float()])
            totals = losses if totals is None else totals + losses
            result = self.engine.step(rate)
        assert totals is not None
        assert result is not None, "the last micro-batch must close the optimizer step"
        means = dist.sum_over_ranks(totals) / (self.parts.batch.accumulation * self.launch.world_size)
        total, *relations = means.tolist()
        return StepReport(total, relations, result.gradient_norm, result.skipped, result.loss_scale, rate)

    # -----------------------------------------------------------------------------------------------------------------

    def run(self, allow_change: bool) -> None:
        """Resume or begin, train to the last step or to a stop request, save, and leave a marker file."""
        first = self._resume(allow_change)
        self.metrics = Metrics(self.run_dir, self.launch.is_main, first, self.recipe.steps)
        if first >= self.recipe.steps:
            self.metrics.say(f"{self.run_dir} already has its {self.recipe.steps} steps; nothing to do")
            self.metrics.close()
            return
        self._describe(first)
        for marker in ("DONE", "PREEMPTED", "STOP"):
            if self.launch.is_main:
                (self.run_dir / marker).unlink(missing_ok=True)
        dist.barrier()
        bad_steps = BadStepCounter(self.recipe.guard, self.run_dir / "bad_batch.json")
        if first == 0:
            self._evaluate(0)
        batches = Prefetcher(self.source, self._sample_numbers(first), pin_memory=self.launch.device.type == "cuda")
        stream = iter(batches)
        self.interval.close(0.0)
        try:
            for step in range(first, self.recipe.steps):
                report = self.train_step(step, stream)
                self.watchdog.feed()
                self._observe(step, report, bad_steps)
                done = step + 1
                self._report(done, report, batches.wait_s)
                reason = self._stop_reason()
                last = done == self.recipe.steps
                if last or done % self.recipe.eval_every == 0:
                    self._evaluate(done)
                if last or reason or done % self.recipe.save_every == 0:
                    self._save(done, must=last or reason is not None)
                if reason and not last:
                    return self._finish("PREEMPTED", f"stopped on request ({reason}) after step {done}")
            self._finish("DONE", f"done: {self.recipe.steps} steps")
        finally:
            batches.close()
            self.metrics.close()

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
        return [{"language": language, "row": int(row)} for language, row in self.source.locate(numbers)]

    # -- checkpoints

    def _resume(self, allow_change: bool) -> int:
        """Load the newest whole checkpoint, chosen by rank 0 for all. Returns the number of finished steps."""
        if self.launch.is_main:
            self.run_dir.mkdir(parents=True, exist_ok=True)
        decision = dist.broadcast_json(self._choose() if self.launch.is_main else None, self.launch.device)
        if decision["error"]:
            raise UserError(decision["error"])
        for problem in decision["problems"]:
            if self.launch.is_main:
                print(f"warning: damaged checkpoint passed over: {problem}", flush=True)
        if decision["path"] is None:
            return 0
        reader = checkpoint.CheckpointReader(Path(decision["path"]))
        self._refuse_changes(reader.state, allow_change)
        reader.check_names(self.parts.student.trained)
        self.engine.load(reader.read, reader.state["adam_step"], reader.state["scaler"])
        self.parts.student.carried.update(reader.carried())
        self.skipped_steps = reader.state["skipped_steps"]
        self.saved_step = reader.state["step"]
        if self.launch.is_main:
            print(f"resumed from {decision['path']}", flush=True)
        return reader.state["step"]

    def _choose(self) -> dict[str, Any]:
        try:
            path, problems = checkpoint.newest_whole(self.checkpoints)
        except UserError as error:
            return {"error": str(error), "path": None, "problems": []}
        return {"error": None, "path": str(path) if path else None, "problems": problems}

    def _refuse_changes(self, state: dict[str, Any], allow_change: bool) -> None:
        # A key that a newer version of this code has added counts with its default.
        now, then = mathematics(self.recipe), {**mathematics(Recipe()), **state["recipe"]}
        changed = [f"{key}: {then.get(key)} -> {now.get(key)}" for key in now if now[key] != then.get(key)]
        if state["data_fingerprint"] != self.data_fingerprint:
            changed.append(f"data: {state['data_fingerprint']} -> {self.data_fingerprint}")
        if changed and not allow_change:
            raise UserError(
                f"{self.run_dir} was begun with another recipe or other data ({'; '.join(changed)}). Set it back, take "
                "another --run-dir, or add --allow-change to go on from this checkpoint all the same"
            )

    def _save(self, step: int, must: bool) -> None:
        if step == self.saved_step:
            return
        began = time.monotonic()
        state = {
            "step": step,
            "samples": step * self.recipe.global_batch,
            "adam_step": self.engine.adam_step(),
            "skipped_steps": self.skipped_steps,
            "scaler": self.engine.scaler_state(),
            "world_size": self.launch.world_size,
            "zero_stage": self.engine.stage,
            "precision": self.parts.precision,
            "recipe": mathematics(self.recipe),
            "recipe_fingerprint": fingerprint(mathematics(self.recipe)),
            "data_fingerprint": self.data_fingerprint,
            "parameters": self.engine.shapes,
        }
        problem = checkpoint.save(self.checkpoints, self.engine, self.parts.student.carried, state, self.launch.rank)
        self.watchdog.feed()
        self.interval.pause(time.monotonic() - began)
        if problem and must:
            raise UserError(
                f"the checkpoint of step {step} could not be written: {problem}. Free space and start again"
            )
        if problem:
            self.metrics.say(f"warning: checkpoint of step {step} not written, going on: {problem}")
            return
        self.saved_step = step
        if self.launch.is_main:
            checkpoint.prune(self.checkpoints, self.recipe.checkpoint)

    # -- reports

    def _observe(self, step: int, report: StepReport, bad_steps: BadStepCounter) -> None:
        self.skipped_steps += report.skipped
        bad_steps.observe(step, report.loss, report.skipped, report.loss_scale, lambda: self._rows_of(step))

    def _describe(self, first_step: int) -> None:
        """Write what this run is, before its first step."""
        facts = {
            "world_size": self.launch.world_size,
            "device": str(self.launch.device.type),
            "precision": self.parts.precision,
            "teacher_precision": self.parts.teacher_precision,
            "teacher": self.recipe.teacher,
            "data_fingerprint": self.data_fingerprint,
            "languages": list(self.source.languages),
            "first_step": first_step,
            "relation_backend": self.recipe.relations.backend,
        }
        ds_json = json.dumps(self.parts.ds_config, indent=1)
        recipe_yaml = recipe_to_yaml(self.recipe)
        if self.launch.is_main:
            (self.run_dir / "recipe.yaml").write_text(recipe_yaml, encoding="utf-8")
            (self.run_dir / "deepspeed.json").write_text(ds_json, encoding="utf-8")
            (self.run_dir / "run.json").write_text(json.dumps(describe_run(self.recipe, **facts), indent=1))
            self.parts.student.model.config.to_json_file(self.run_dir / "student_config.json", use_diff=False)
        self.metrics.describe(recipe_yaml, ds_json, mathematics(self.recipe))
        for warning in self.parts.warnings:
            self.metrics.say(f"warning: {warning}")
        trained = sum(int(np.prod(shape)) for shape in self.engine.shapes.values())
        carried = sum(tensor.numel() for tensor in self.parts.student.carried.values())
        self.metrics.say(
            f"student in {self.parts.precision}: {trained / 1e6:.1f} M parameters trained, {carried / 1e6:.1f} M carried "
            f"along; teacher in {self.parts.teacher_precision}; {len(self.source.languages)} languages; "
            f"{self.launch.world_size} rank(s) x {self.parts.batch.micro_batch} rows x {self.parts.batch.accumulation}"
        )

    def _report(self, done: int, report: StepReport, wait_s: float) -> None:
        self.metrics.advance()
        self.interval.add(report, wait_s)
        if done % self.recipe.metrics.log_every and done != self.recipe.steps:
            return
        tokens = self.interval.steps * self.recipe.global_batch * self.recipe.seq_len
        seconds, wait_share = self.interval.close(wait_s)
        values = {
            "loss/total": report.loss,
            **{f"loss/{name}": v for name, v in zip(self.parts.distiller.part_names, report.parts, strict=True)},
            "optimizer/learning_rate": report.learning_rate,
            "optimizer/gradient_norm": report.gradient_norm,
            "optimizer/loss_scale": report.loss_scale,
            "optimizer/skipped_steps": self.skipped_steps,
            "speed/tokens_per_second": tokens / seconds,
            "speed/data_wait_share": wait_share,
        }
        self.metrics.write(done, done * self.recipe.global_batch, values)
        eta_min = (self.recipe.steps - done) * seconds / (tokens / self.recipe.global_batch / self.recipe.seq_len) / 60
        self.metrics.say(
            f"step {done}/{self.recipe.steps}  loss {report.loss:.4f}  lr {report.learning_rate:.2e}  "
            f"grad {report.gradient_norm:.2f}  {tokens / seconds:,.0f} tokens/s  data wait {wait_share:.1%}  "
            f"{eta_min:.1f} min left"
        )

    def _evaluate(self, step: int) -> None:
        began = time.monotonic()
        self.engine.train(False)
        losses = heldout_losses(
            self.parts.distiller.losses_by_row,
            self.source,
            self.parts.batch.micro_batch,
            self.launch.rank,
            self.launch.world_size,
            self.launch.device,
            self.watchdog.feed,
            dist.sum_over_ranks,
        )
        if self.recipe.metrics.images:
            self._write_relation_maps(step)
        self.engine.train(True)
        mean = float(np.mean(list(losses.values())))
        values = {"heldout/mean": mean, **{f"heldout/{language}": loss for language, loss in losses.items()}}
        self.metrics.write(step, step * self.recipe.global_batch, values)
        worst = max(losses, key=losses.__getitem__)
        self.metrics.say(f"step {step}  held-out loss {mean:.4f}, highest {worst} {losses[worst]:.4f}")
        self.interval.pause(time.monotonic() - began)

    def _write_relation_maps(self, step: int) -> None:
        """Teacher above student, one column per head, of the first held-out row. All ranks compute it (ZeRO-3 gathers)."""
        row = torch.from_numpy(self.source.heldout(self.source.languages[0])[:1]).to(self.launch.device)
        for pair in self.parts.distiller.part_names:
            maps_2HLL = self.parts.distiller.relation_maps(row, pair)
            rows = [torch.cat(list(maps_HLL / maps_HLL.amax()), dim=1) for maps_HLL in maps_2HLL]
            self.metrics.image(f"relations/{pair}", step, torch.cat(rows, dim=0).float().cpu().unsqueeze(0))

    # -- the end

    def _stop_reason(self) -> str | None:
        """A reason on any rank is a reason on all of them."""
        if not dist.any_rank(self.stop.reason is not None, self.launch.device):
            return None
        reasons = dist.gather_json(self.stop.reason, self.launch.device)
        return next(reason for reason in reasons if reason)

    def _finish(self, marker: str, line: str) -> None:
        if self.launch.is_main:
            (self.run_dir / marker).write_text(line + "\n")
        self.metrics.say(f"{line}. Checkpoints: {self.checkpoints}")


class _Interval:
    """Wall time and data waiting between two console lines, without saves and evaluations."""

    def __init__(self) -> None:
        self.steps, self._began, self._paused, self._wait_before = 0, time.monotonic(), 0.0, 0.0

    def add(self, report: StepReport, wait_s: float) -> None:
        self.steps += 1

    def pause(self, seconds: float) -> None:
        self._paused += seconds

    def close(self, wait_s: float) -> tuple[float, float]:
        """Seconds of training, and the share of them spent waiting for data; begins the next interval."""
        now = time.monotonic()
        seconds = max(now - self._began - self._paused, 1e-9)
        share = (wait_s - self._wait_before) / seconds
        self.steps, self._began, self._paused, self._wait_before = 0, now, 0.0, wait_s
        return seconds, share


def dropout_seed(seed: int, step: int, rank: int) -> int:
    """Seed of torch's generator for one step on one rank: dropout needs no state in a checkpoint."""
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0] >> np.uint64(1))
