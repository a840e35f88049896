"""Spikes, corrupt shards, offload and stop requests in real runs, and the files of a run directory."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import socket
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModel

from data_prep.shards import ShardSet
from pipeline.config import load_recipe
from pipeline.errors import EXIT_USER
from pipeline.export.hf import export_run
from pipeline.provenance import code_fingerprint
from pipeline.runtime.checkpoint import read_model_weights
from pipeline.runtime.checkpoint_files import UNTRAINED_FILE, committed_steps
from tests.conftest import write_fp32_config
from tests.dist.fork_server import ForkServer
from tests.dist.runs import curve, end_group, metrics
from tests.faults.sweeps.lab import Lab, same_end, same_state, wait_until

STEPS = {"steps": 8, "save_every": 1, "eval_every": 8, "checkpoint.keep": 10}


@pytest.mark.parametrize("stage", [1, 3])
def test_a_spike_changes_nothing_and_its_rows_are_recorded(stage: int, lab: Lab) -> None:
    """Rank 1 has a loss that is a hundred times too high: all ranks skip the step, and so does a resumed run."""
    settings = {**STEPS, "guard.spikes": "skip", "guard.spike_window": 20, "guard.spike_sigmas": 10}
    spike = {"kind": "spike", "steps": [5], "rank": 1}
    run_dir = lab.untouched(2, settings, stage, [spike])
    at = {step: run_dir / "checkpoints" / f"step-{step:08d}" for step in range(1, 9)}
    assert same_state(at[5], at[6])
    assert not same_state(at[6], at[7])
    (entry,) = [json.loads(line) for line in (run_dir / "spikes.jsonl").read_text().splitlines()]
    assert entry["step"] == 5
    assert entry["skipped"]
    assert len(entry["rows"]) == 8
    assert all(
        (Path(load_recipe(lab.recipe, []).data) / file).is_file() for row in entry["rows"] for file in row["shards"]
    )
    assert json.loads((at[8] / "state.json").read_text())["skipped_steps"] == 1
    stopped = lab.fresh("stopped")  # the window of losses is part of the checkpoint
    assert lab.run(stopped, 2, settings, stage, [spike, {"kind": "signal", "signal": "SIGUSR1", "step": 3}]) == 0
    assert (stopped / "PREEMPTED").exists()
    assert lab.run(stopped, 2, settings, stage, [spike]) == 0
    assert same_end(stopped, run_dir)


@pytest.mark.parametrize(("stage", "deterministic"), [(2, True), (3, True), (2, False)])
def test_gradients_are_computed_by_deterministic_kernels(stage: int, deterministic: bool, lab: Lab) -> None:
    """By default, in the student's forward (which decides the kernel of its backward on a GPU) and in backward."""
    notes = lab.directory / "notes"
    settings = {"steps": 1, "eval_every": 1} | ({} if deterministic else {"deterministic": False})
    assert lab.run(lab.fresh("run"), 1, settings, stage, [{"kind": "kernels", "file": str(notes)}]) == 0
    assert notes.read_text().splitlines()[:2] == [f"forward {deterministic}", f"backward {deterministic}"]


@pytest.mark.parametrize(("stage", "freeze"), [(2, True), (3, True), (1, False)])
def test_a_projected_student_keeps_its_basis_over_restarts(stage: int, freeze: bool, lab: Lab, tmp_path: Path) -> None:
    """A second attempt that would measure another basis uses that of the first, also in embeddings and tail term."""
    settings = {
        **STEPS,
        "student.init": "project",
        "student.freeze": ["embeddings"] if freeze else [],
        "relations.tail": "mse",
        "relations.tail_weight": 10.0,
    }
    undisturbed = lab.untouched(2, settings, stage)
    stopped = lab.fresh("stopped")
    assert lab.run(stopped, 2, settings, stage, [{"kind": "signal", "signal": "SIGUSR1", "step": 3}]) == 0
    assert lab.run(stopped, 2, settings, stage, [{"kind": "other text", "tokens": 70}]) == 0
    assert same_end(stopped, undisturbed)
    first, last = (
        (run / "checkpoints" / f"step-{8:08d}" / UNTRAINED_FILE).read_bytes() for run in (undisturbed, stopped)
    )
    assert first == last
    unlike = lab.untouched(2, settings, stage, [{"kind": "other text", "tokens": 70, "rank": 1}])
    assert same_end(unlike, undisturbed), "all ranks use the basis of rank 0"
    other = lab.untouched(2, settings, stage, [{"kind": "other text", "tokens": 70}])
    assert not same_end(other, undisturbed), "another basis gives other losses"
    model = AutoModel.from_pretrained(export_run(stopped, tmp_path / "student"))
    assert model.config.hidden_size == 24


def test_corrupt_shards_are_found_before_step_1_with_verify_shards(lab: Lab) -> None:
    data = shutil.copytree(load_recipe(lab.recipe, []).data, lab.directory / "shards")
    victim = ShardSet(data).all_shards()[-1].path
    content = bytearray(victim.read_bytes())
    content[5000] ^= 1
    victim.write_bytes(content)
    settings = {**STEPS, "data": str(data), "guard.verify_shards": True}
    run_dir = lab.fresh("run")
    assert lab.run(run_dir, 2, settings) == EXIT_USER
    for rank in range(2):
        assert f"{victim}: corrupt" in (run_dir / "logs" / f"rank{rank}.log").read_text()
    assert not (run_dir / "metrics.jsonl").exists()


def test_a_directory_that_is_not_shared_by_all_ranks_is_rejected(lab: Lab) -> None:
    """Two nodes with separate disks under the same name; here a relative name in two directories."""
    ends = []
    for name in ("one", "other"):
        (lab.directory / name).mkdir()
        ends.append({"kind": "elsewhere", "rank": len(ends), "directory": str(lab.directory / name)})
    log = lab.directory / "log"
    job = lab.server.start(2, [*lab.arguments(2, STEPS), "--run-dir", "runs/new"], log, faults=ends)
    assert job.wait(120) == EXIT_USER
    assert "runs/new is not one directory for all ranks" in log.read_text()
    assert socket.gethostname() in log.read_text()
    assert "step 1 of" not in log.read_text()
    assert not list(lab.directory.rglob(".shared-*"))


def test_a_stop_file_made_during_the_start_stops_the_run_and_an_older_one_does_not(lab: Lab) -> None:
    run_dir = lab.fresh("run")
    settings = {**STEPS, "steps": 3, "eval_every": 3}
    assert lab.run(run_dir, 1, settings, faults=[{"kind": "stop file"}]) == 0
    assert "file STOP) after step 1" in (run_dir / "PREEMPTED").read_text()
    assert lab.run(run_dir, 1, settings) == 0, "the file is still there"
    assert (run_dir / "DONE").exists()
    assert not (run_dir / "STOP").exists()


def test_ctrl_c_ends_a_rank_that_waits_for_the_others(lab: Lab) -> None:
    run_dir = lab.fresh("run")
    job = lab.begin(run_dir, 1, STEPS, faults=[{"kind": "elsewhere", "environment": {"WORLD_SIZE": "2"}}])
    try:
        wait_until(lambda: "run directory" in run_dir.with_suffix(".log").read_text())
        time.sleep(1.0)  # now it waits for rank 1, which never comes
        os.kill(job.ranks[0], signal.SIGINT)
        assert job.wait(30) != 0
    finally:
        end_group(job)


def test_after_a_stop_the_next_attempt_evaluates(lab: Lab) -> None:
    """The rest of the job's time is used for the save. The final curves are those of an undisturbed run."""
    settings = {**STEPS, "eval_every": 4}
    run_dir = lab.fresh("run")
    assert lab.run(run_dir, 2, settings, faults=[{"kind": "signal", "signal": "SIGTERM", "step": 3}]) == 0
    assert list(curve(run_dir, "heldout/mean")) == [0]
    assert lab.run(run_dir, 2, settings) == 0
    assert same_end(run_dir, lab.untouched(2, settings))
    assert list(curve(run_dir, "heldout/mean")) == [0, 4, 8]


def test_a_stop_in_the_last_step_saves_before_it_evaluates(lab: Lab) -> None:
    settings, run_dir = {**STEPS, "steps": 2}, lab.fresh("run")
    assert lab.run(run_dir, 1, settings, faults=[{"kind": "signal", "signal": "SIGTERM", "step": 1}]) == 0
    in_the_end = [row for row in metrics(run_dir) if row["step"] == 2]
    order = [tag for row in in_the_end for tag in row if tag in ("speed/save_stall_seconds", "heldout/mean")]
    assert order == ["speed/save_stall_seconds", "heldout/mean", "speed/save_stall_seconds"], (
        "saved again with the evaluation"
    )
    assert (run_dir / "DONE").exists()


def test_a_crash_while_loading_is_counted(lab: Lab) -> None:
    """An attempt that ends before its first step counts: otherwise a crash loop would never be noticed."""
    run_dir = lab.fresh("run")
    assert lab.run(run_dir, 1, {**STEPS, "steps": 2}) == 0
    assert lab.run(run_dir, 1, STEPS, faults=[{"kind": "bug", "after load": True}]) == 1
    first, second = json.loads((run_dir / "restarts.json").read_text())
    assert first["ended"] == "DONE"
    assert first["slowest_save_s"] >= 0
    assert (second["first_step"], second["ended"], second["saved_steps"]) == (2, None, [])


def test_a_crash_before_the_engine_leaves_its_traceback_and_a_user_error_nothing(lab: Lab) -> None:
    run_dir = lab.fresh("run")
    assert lab.run(run_dir, 2, STEPS, faults=[{"kind": "bug"}]) == 1
    for rank in range(2):
        lines = (run_dir / "logs" / f"rank{rank}.log").read_text().splitlines()
        assert lines[0].startswith("-- ")
        assert (lines[1], "IndexError" in lines[-1]) == ("Traceback (most recent call last):", True)
    assert [file.name for file in run_dir.iterdir()] == ["logs"]
    rejected = lab.fresh("rejected")
    assert lab.run(rejected, 2, {**STEPS, "teacher": str(lab.directory / "nowhere")}) == EXIT_USER
    assert not rejected.exists()


def test_an_old_process_number_is_not_an_old_exit_code(server: ForkServer, tmp_path: Path) -> None:
    """Process numbers repeat after 32768 processes, and a sweep starts more."""
    script = tmp_path / "short.py"
    script.write_text("import time\ntime.sleep(0.5)\n")
    server.codes |= dict.fromkeys(range(1, 1 << 17), 7)
    job = server.start(1, [], tmp_path / "log", script=str(script))
    assert job.poll() is None
    assert job.wait(30) == 0
    server.codes.clear()


def test_run_directory_tells_ranks_hosts_and_backend(lab: Lab) -> None:
    """Also where one rank has no git: ranks compare the code itself."""
    run_dir = lab.untouched(2, STEPS, faults=[{"kind": "elsewhere", "rank": 1, "environment": {"PATH": ""}}])
    run = json.loads((run_dir / "run.json").read_text())
    assert run["code_fingerprint"] == code_fingerprint()
    assert len(run["hosts"]) == 2
    assert len(run["device_names"]) == 2
    assert run["relation_backend"] == "chunked", "the chosen backend, not `auto`"
    assert "step 8 of 8" in (run_dir / "logs" / "rank0.log").read_text()
    assert (run_dir / "logs" / "rank1.log").exists()
    assert not list((run_dir / "logs").glob("stacks-*")), "stacks of a run that never hung"


@pytest.mark.parametrize("ranks", [1, 2])
def test_offload_saves_and_resumes_bit_for_bit(ranks: int, lab: Lab) -> None:
    """ds_configs/zero3_offload.json as shipped, in fp32. Its checkpoint also loads without offload."""
    write_fp32_config(lab.directory / "zero3.json", "zero3_offload")
    settings = {**STEPS, "save_every": 3}
    undisturbed, run_dir = lab.untouched(ranks, settings, 3), lab.fresh("run")
    assert (
        json.loads((undisturbed / "deepspeed.json").read_text())["zero_optimization"]["offload_optimizer"]["device"]
        == "cpu"
    )
    assert lab.run(run_dir, ranks, settings, 3, [{"kind": "signal", "signal": "SIGUSR1", "step": 3}]) == 0
    assert lab.run(run_dir, ranks, settings, 3) == 0
    assert same_end(run_dir, undisturbed)
    copy = lab.fresh("copy")
    assert lab.run(run_dir, ranks, {**settings, "steps": 9}, 2, [{"kind": "resave", "to": str(copy)}]) == 0
    assert same_state(copy / "step-00000008", undisturbed / "checkpoints" / "step-00000008")


@pytest.mark.parametrize(("keep", "keep_every"), [(1, 2), (1, 3), (2, None)])
def test_the_two_newest_checkpoints_share_no_bytes(keep: int, keep_every: int | None, lab: Lab) -> None:
    """Frozen weights are linked from save to save, but never from the checkpoint that is kept next to the new one."""
    settings = {**STEPS, "checkpoint.keep": keep, "checkpoint.keep_every": keep_every, "metrics.log_every": 1}
    run_dir = lab.fresh("run")
    for steps in (7, 8):
        assert lab.run(run_dir, 1, {**settings, "steps": steps}) == 0
        kept = committed_steps(run_dir / "checkpoints")
        before, newest = (run_dir / "checkpoints" / f"step-{step:08d}" / UNTRAINED_FILE for step in kept[-2:])
        assert not newest.samefile(before), kept
        copies = {file.stat().st_ino for file in run_dir.glob(f"checkpoints/*/{UNTRAINED_FILE}")}
        assert len(copies) == 2, "as many copies as checkpoints: nothing was linked"


@pytest.mark.parametrize("error", ["MemoryError", "SystemExit"])  # one that is caught, one that ends the thread
def test_a_save_that_dies_on_one_rank_is_no_checkpoint(error: str, lab: Lab) -> None:
    """If it were committed, the valid checkpoints before it would be pruned."""
    settings = {**STEPS, "save_every": 2, "checkpoint.keep": 2, "steps": 6, "eval_every": 6}
    run_dir = lab.fresh("run")
    dies = {"kind": "at call", "save": 4, "rank": 1, "operation": "fsync", "call": 2, "error": error}
    assert lab.run(run_dir, 2, settings, faults=[dies]) == 0
    assert (
        "warning: checkpoint of step 4 not written, the run continues: rank 1"
        in run_dir.with_suffix(".log").read_text()
    )
    assert committed_steps(run_dir / "checkpoints") == [2, 6]
    assert same_end(run_dir, lab.untouched(2, settings))


def test_without_memory_for_a_snapshot_a_save_is_written_directly(lab: Lab) -> None:
    run_dir = lab.fresh("run")
    assert lab.run(run_dir, 2, STEPS, faults=[{"kind": "no memory"}]) == 0
    assert same_end(run_dir, lab.untouched(2, STEPS))


def test_the_exported_student_has_its_teachers_dropout(lab: Lab, tmp_path: Path) -> None:
    """Distilled without dropout from several layers of a teacher whose config is deleted before the export."""
    recipe = load_recipe(lab.recipe, [])
    teacher = tmp_path / "teacher"
    shutil.copytree(recipe.teacher, teacher)
    config = json.loads((teacher / "config.json").read_text())
    dropout = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.2}
    (teacher / "config.json").write_text(json.dumps({**config, **dropout}))
    layers = [{"teacher": 2, "student": 1}, {"teacher": 4, "student": 2, "weight": 0.5}]
    settings = {**STEPS, "steps": 2, "eval_every": 2, "teacher": str(teacher)}
    run_dir = lab.untouched(
        1, {**settings, "relations.teacher_layer": None, "relations.layers": layers, "student.dropout": 0.0}
    )
    (teacher / "config.json").unlink()
    student = export_run(run_dir, tmp_path / "student")
    assert dropout.items() <= json.loads((student / "config.json").read_text()).items()
    lineage = json.loads((student / "lineage.json").read_text())
    assert lineage["dropout"] == {"distillation": dict.fromkeys(dropout, 0.0), "config": dropout}
    assert lineage["recipe"]["student"]["dropout"] == 0.0
    assert (lineage["teacher_layer"], lineage["student_layer"]) == ([2, 4], [1, 2])
    weights, _ = read_model_weights(run_dir)
    model = AutoModel.from_pretrained(student, add_pooling_layer=False)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("stage", "documents", "ranks"), [(1, "joined", 1), (2, "separate", 1), (1, "separate", 2), (2, "joined", 2)]
)
def test_nothing_is_read_from_the_device_between_two_reports(stage: int, documents: str, ranks: int, lab: Lab) -> None:
    """A GPU would be idle while the host waits for such a number and then launches the next kernels."""
    notes, every = lab.fresh("notes"), 4
    settings = {"steps": 9, "metrics.log_every": every, "eval_every": 100, "save_every": 100, "guard.spikes": "skip"}
    settings |= {"guard.spike_window": 20, "documents": documents}
    counted = {"kind": "host reads", "file": str(notes), "rank": 0}
    assert lab.run(lab.fresh("run"), ranks, settings, stage, [counted]) == 0
    counts = [int(line) for line in notes.read_text().split()]
    assert counts[0] > 0, "the evaluation before the first step reads its losses"
    per_step = [after - before for before, after in itertools.pairwise(counts)]
    silent = [reads for step, reads in enumerate(per_step, start=1) if step > 1 and step % every]
    assert len(silent) == 5
    assert set(silent) == {0}, per_step
