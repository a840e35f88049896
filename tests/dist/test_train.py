"""Complete runs under every launcher: same losses, same curves on disk, and resumed runs equal uninterrupted ones."""

from __future__ import annotations

import json
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModel, AutoTokenizer

from pipeline.config import load_recipe
from pipeline.distillation.distiller import DistillModule, Hooks
from pipeline.distillation.models.student import build_student
from pipeline.distillation.models.teacher import load_encoder, load_teacher
from pipeline.errors import EXIT_DIVERGED
from pipeline.export.hf import export_run
from pipeline.runtime.checkpoint import committed_steps, read_model_weights
from pipeline.runtime.run_paths import RunPaths
from pipeline.runtime.tensorboard_tags import tensorboard_tag
from pipeline.training.checks import open_data
from tests.conftest import REPO
from tests.dist.runs import curve, end_group, finish, launcher, metrics, start, train, wait_for_line


@pytest.fixture(scope="module")
def arguments(tiny_recipe: Path, fp32_config: Path) -> list[str]:
    return ["--deepspeed", str(fp32_config), "--recipe", str(tiny_recipe)]


@pytest.fixture(scope="module")
def plain_run(tmp_path_factory: pytest.TempPathFactory, arguments: list[str]) -> Path:
    """The uninterrupted single-process run that others are compared with. It must not compile anything."""
    run_dir = tmp_path_factory.mktemp("plain") / "run"
    extensions = run_dir.parent / "extensions"
    train("python", 1, run_dir, arguments, TORCH_EXTENSIONS_DIR=str(extensions))
    assert not extensions.exists() or not list(extensions.rglob("*.so")), "an op was compiled at start"
    return run_dir


@pytest.fixture(scope="module")
def two_rank_run(tmp_path_factory: pytest.TempPathFactory, arguments: list[str]) -> Path:
    run_dir = tmp_path_factory.mktemp("two") / "run"
    train("deepspeed", 2, run_dir, arguments)
    return run_dir


def same_weights(a: Path, b: Path) -> bool:
    (one, _), (two, _) = read_model_weights(a), read_model_weights(b)
    return one.keys() == two.keys() and all((one[name] == two[name]).all() for name in one)


def test_loss_falls(plain_run: Path) -> None:
    losses = curve(plain_run)
    assert list(losses) == list(range(1, 13))
    assert losses[12] < 0.8 * losses[1]


@pytest.mark.parametrize("kind", ["deepspeed", "torchrun"])
def test_launchers_agree_bit_for_bit(kind: str, tmp_path: Path, plain_run: Path, arguments: list[str]) -> None:
    train(kind, 1, tmp_path / "run", arguments)
    assert curve(tmp_path / "run") == curve(plain_run)
    assert same_weights(tmp_path / "run", plain_run)


def test_two_ranks_give_the_losses_of_one(two_rank_run: Path, plain_run: Path) -> None:
    one, two = curve(plain_run), curve(two_rank_run)
    assert one.keys() == two.keys()
    assert two == pytest.approx(one, rel=1e-5)
    assert curve(two_rank_run, "heldout/tr") == pytest.approx(curve(plain_run, "heldout/tr"), rel=1e-5)


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_partitioned_teacher_gives_the_same_losses(
    num_ranks: int, tmp_path: Path, plain_run: Path, two_rank_run: Path, arguments: list[str]
) -> None:
    train("deepspeed", num_ranks, tmp_path / "run", [*arguments, "--set", "teacher_options.placement=zero3"])
    reference = plain_run if num_ranks == 1 else two_rank_run
    assert curve(tmp_path / "run") == curve(reference)
    assert same_weights(tmp_path / "run", reference)


def test_documents_kept_apart(tmp_path: Path, tiny_recipe: Path, arguments: list[str]) -> None:
    """`documents: separate` and `positions: restart` reach the training step and the held-out evaluation."""
    overrides = [
        "documents=separate",
        "positions=restart",
        "steps=2",
        "languages=[tr]",
        "seq_len=64",
        "global_batch=24",
        "heldout_rows=24",
    ]
    sets = [word for override in overrides for word in ("--set", override)]
    train("python", 1, tmp_path / "run", [*arguments, *sets])
    recipe = load_recipe(tiny_recipe, overrides)
    source, layer = open_data(recipe), recipe.relations.teacher_layer
    teacher = load_encoder(recipe.teacher)
    student = build_student(teacher, recipe.student, recipe.seed, recipe.relations)
    teacher = load_teacher(teacher, layer, torch.float32, "cpu")
    along_the_row, module = (
        DistillModule(teacher, student.tapped, recipe.relations, hooks=Hooks(restart_positions=restart))
        for restart in (False, True)
    )
    for batch, reported in (
        (source.training_batch(np.arange(24)), curve(tmp_path / "run")[1]),
        (source.heldout_batch(["tr"]), curve(tmp_path / "run", "heldout/tr")[0]),
    ):
        separate = module.losses_by_row(batch.input_ids_BL, segments=batch.segments_BS).mean().item()
        assert reported == pytest.approx(separate, rel=1e-5)
        assert reported != pytest.approx(module.losses_by_row(batch.input_ids_BL).mean().item(), rel=1e-4)
        continued = along_the_row.losses_by_row(batch.input_ids_BL, segments=batch.segments_BS).mean().item()
        assert reported != pytest.approx(continued, rel=1e-4)


def test_run_directory_is_complete(plain_run: Path) -> None:
    paths = RunPaths(plain_run)
    named = {path.name for path in (*vars(paths).values(), paths.restarts) if isinstance(path, Path)}
    assert {path.name for path in plain_run.iterdir()} <= named, (
        "every file of a run directory has its name in RunPaths"
    )
    assert paths.done.exists()
    assert all(path.is_file() for path in paths.needed_by_export)
    run = json.loads(paths.description.read_text())
    assert run["precision"] == "fp32"
    assert run["device_names"] == [f"CPU ({platform.machine()})"]
    logged = [row for row in metrics(plain_run) if "speed/tokens_per_second" in row]
    assert run["speed"] == {tag: logged[-1][tag] for tag in run["speed"]}
    assert run["flops_per_row"] > 0
    shares_of_rows = [[value for tag, value in row.items() if tag.endswith("_share")] for row in logged]
    assert all(share >= 0 for shares in shares_of_rows for share in shares)
    sums = [sum(shares) for shares in shares_of_rows]
    assert statistics.median(sums) > 0.5, "the parts of a step are nearly all of its time"
    assert min(sums) > 0.1, "in no row are they nearly nothing"
    assert max(sums) < 1.05
    assert run["packages"]["deepspeed"] == "0.19.8"
    assert json.loads((plain_run / "deepspeed.json").read_text())["train_batch_size"] == 8
    assert not list(plain_run.rglob("latest")), "a run writes no `latest` file of DeepSpeed"
    assert sorted(p.name for p in (plain_run / "checkpoints").iterdir()) == ["step-00000008", "step-00000012"]


def test_a_checkpoint_counts_rows(plain_run: Path) -> None:
    """Twelve steps over a global batch of eight rows. Model card and lineage repeat this number."""
    _, state = read_model_weights(plain_run)
    assert (state["step"], state["samples"]) == (12, 96)
    assert {row["step"]: row["samples"] for row in metrics(plain_run)}[12] == 96


def test_tensorboard_and_jsonl_tell_the_same(plain_run: Path) -> None:
    board = EventAccumulator(str(plain_run / "tensorboard"), size_guidance={"images": 0, "tensors": 0})
    board.Reload()
    tags = set(board.Tags()["scalars"])
    learning = {"loss/total", "loss/q-q", "loss/k-k", "loss/v-v", "heldout/mean", "heldout/hi", "heldout/tr"}
    health = {"optimizer/learning_rate", "optimizer/gradient_norm", "optimizer/loss_scale", "optimizer/skipped_steps"}
    shares = {f"speed/{part}_share" for part in ("teacher", "student", "loss", "optimizer", "data_wait")}
    speed = shares | {"speed/tokens_per_second", "speed/model_tflops_per_device", "speed/peak_memory_gib"}
    expected = learning | health | speed
    written = {tag for row in metrics(plain_run) for tag in row if "/" in tag}
    assert expected <= written
    assert {tensorboard_tag(tag) for tag in written} == tags
    for tag in written:
        on_board = {e.step: e.value for e in board.Scalars(tensorboard_tag(tag))}
        assert on_board == pytest.approx(curve(plain_run, tag), rel=1e-5)
    assert {"relations/q-q", "relations/k-k", "relations/v-v"} <= set(board.Tags()["images"])
    texts = {tag.split("/")[0] for tag in board.Tags()["tensors"]}
    assert {"recipe", "deepspeed", "hyper-parameters"} <= texts


def test_export_is_the_trained_student(plain_run: Path, tiny_recipe: Path, tmp_path: Path) -> None:
    """The model loaded with AutoModel computes exactly what training ended with. Frozen weights have not changed."""
    done = subprocess.run(
        [sys.executable, "-m", "pipeline", "export", str(plain_run), "--output", str(tmp_path / "student")],
        cwd=REPO,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    lineage = json.loads((tmp_path / "student" / "lineage.json").read_text())
    assert (lineage["steps"], lineage["teacher_layer"], lineage["student_layer"]) == (12, 3, 2)
    recipe = load_recipe(tiny_recipe, [])
    start = build_student(load_encoder(recipe.teacher), recipe.student, recipe.seed, recipe.relations)
    exported = AutoModel.from_pretrained(tmp_path / "student", add_pooling_layer=False)
    weights, state = read_model_weights(plain_run)
    assert state["step"] == 12
    assert set(start.untrained) | set(start.trained) == set(weights)
    tail = [name for name in start.untrained if "layer.1.output" in name or "layer.1.attention.output" in name]
    assert len(tail) >= 8
    for name, tensor in exported.state_dict().items():
        assert torch.equal(tensor, weights[name]), name
        if name in start.untrained:
            assert torch.equal(tensor, start.untrained[name]), f"{name} was frozen and has changed"
    assert not any(
        torch.equal(weights[name], parameter) for name, parameter in start.trained.items() if parameter.dim() > 1
    )
    start.model.load_state_dict(weights)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "student")
    batch = tokenizer(["Jambo dunia", "नमस्ते दुनिया, कैसे हो?"], padding=True, return_tensors="pt")
    batch.pop("token_type_ids", None)
    with torch.no_grad():
        ours, theirs = start.model.eval()(**batch), exported.eval()(**batch)
    assert torch.equal(ours.last_hidden_state, theirs.last_hidden_state)


def test_samples_are_rows(two_rank_run: Path, tmp_path: Path) -> None:
    """Steps times the global batch, for any number of ranks: in checkpoints, curves and the student's lineage."""
    export_run(two_rank_run, tmp_path / "student")
    lineage = json.loads((tmp_path / "student" / "lineage.json").read_text())
    assert (lineage["steps"], lineage["samples"]) == (12, 12 * 8)
    for step in (8, 12):
        state = json.loads((two_rank_run / "checkpoints" / f"step-{step:08d}" / "state.json").read_text())
        assert (state["step"], state["samples"]) == (step, step * 8)
    assert {(row["step"], row["samples"]) for row in metrics(two_rank_run)} == {(s, s * 8) for s in range(13)}


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_kill_and_resume_repeats_the_losses(
    num_ranks: int, tmp_path: Path, plain_run: Path, two_rank_run: Path, arguments: list[str]
) -> None:
    """SIGKILL to every rank between two checkpoints: the second attempt repeats losses and weights bit for bit."""
    run_dir, log = tmp_path / "run", tmp_path / "run.log"
    command = [*launcher("deepspeed", num_ranks), *arguments, "--run-dir", str(run_dir)]
    process = start(command, log)
    try:
        wait_for_line(log, "step 9 of 12", process)  # by now the save of step 4 has been waited for
    finally:
        end_group(process)
    text = finish(start(command, log), log)
    assert "resumed from" in text
    assert "relation backend chunked: kept" in text
    reference = plain_run if num_ranks == 1 else two_rank_run
    assert curve(run_dir) == curve(reference)
    assert same_weights(run_dir, reference)
    # The kill may come after the commit of a checkpoint and before the line about it.
    logged = [[row for row in metrics(run) if "speed/save_stall_seconds" not in row] for run in (run_dir, reference)]
    assert len(logged[0]) == len(logged[1]), "a step was logged twice"


def test_interrupt_saves_and_resumes(tmp_path: Path, plain_run: Path, arguments: list[str]) -> None:
    """Ctrl-C reaches launcher and ranks: the run saves its current step, writes PREEMPTED, and resumes from there."""
    run_dir, log = tmp_path / "run", tmp_path / "run.log"
    command = [*launcher("python"), *arguments, "--run-dir", str(run_dir), "--set", "save_every=100"]
    process = start(command, log)
    try:
        wait_for_line(log, "step 3 of 12", process)
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(60) == 0
    finally:
        end_group(process)
    assert "SIGINT" in (run_dir / "PREEMPTED").read_text()
    text = finish(start(command, log), log)
    assert "resumed from" in text
    assert not (run_dir / "PREEMPTED").exists()
    assert curve(run_dir) == curve(plain_run)
    assert same_weights(run_dir, plain_run)
    board = EventAccumulator(str(run_dir / "tensorboard")).Reload()
    assert [point.step for point in board.Scalars(tensorboard_tag("loss/total"))] == list(curve(run_dir)), (
        "of both attempts"
    )


def test_a_signal_to_one_rank_stops_all_ranks_of_the_launcher(tmp_path: Path, arguments: list[str]) -> None:
    """USR1 to one of two ranks under `deepspeed`: both save their current step, and the launcher ends with code 0."""
    run_dir, log = tmp_path / "run", tmp_path / "run.log"
    forever = ["--set", "steps=100000", "--set", "save_every=100000"]
    process = start([*launcher("deepspeed", 2), *arguments, "--run-dir", str(run_dir), *forever], log)
    try:
        wait_for_line(log, "step 2 of", process)
        os.kill(max(int(pid) for pid in ranks_of(process.pid)), signal.SIGUSR1)
        assert process.wait(120) == 0, log.read_text()[-3000:]
    finally:
        end_group(process)
    assert "SIGUSR1" in (run_dir / "PREEMPTED").read_text()
    assert committed_steps(run_dir / "checkpoints") == [max(curve(run_dir))], "a step was lost"


def test_crash_loop_falls_back_and_then_stops(tmp_path: Path, plain_run: Path, arguments: list[str]) -> None:
    """After three attempts without a save the checkpoint before the newest is loaded; after six the exit code is 3."""
    run_dir = shutil.copytree(plain_run, tmp_path / "run")
    crash = {"first_step": 12, "saved_steps": [], "ended": None}
    restarts = json.loads((run_dir / "restarts.json").read_text())
    (run_dir / "restarts.json").write_text(json.dumps([*restarts, crash, crash, crash]))
    text = train("python", 1, run_dir, [*arguments, "--set", "steps=14"])
    assert "passed over after three crashes" in text
    assert "resumed from" in text
    assert "step-00000008" in text
    (run_dir / "restarts.json").write_text(json.dumps([*restarts, *[crash] * 6]))
    log = tmp_path / "last.log"
    process = start([*launcher("python"), *arguments, "--run-dir", str(run_dir), "--set", "steps=16"], log)
    assert process.wait(120) == EXIT_DIVERGED
    assert "restarts.json" in log.read_text()


def test_hung_rank_is_noticed(tmp_path: Path, arguments: list[str]) -> None:
    """SIGSTOP to one of two ranks: the other dumps its stacks and ends the job, and no process is left."""
    run_dir, log = tmp_path / "run", tmp_path / "run.log"
    patience = ["--set", "guard.hang_timeout_s=3", "--set", "guard.slow_timeout_s=40", "--set", "steps=100000"]
    command = [*launcher("deepspeed", 2), *arguments, "--run-dir", str(run_dir), *patience]
    process = start(command, log)
    try:
        wait_for_line(log, "step 2 of", process)
        victim = max(int(pid) for pid in ranks_of(process.pid))
        os.kill(victim, signal.SIGSTOP)
        assert process.wait(120) != 0
        wait_until(lambda: not ranks_of(process.pid))
    finally:
        end_group(process)
    stacks = list((run_dir / "logs").glob("stacks-rank*.txt"))
    assert len(stacks) == 2, "the stopped rank has stacks too"
    assert all("training/trainer.py" in file.read_text() for file in stacks)
    assert "guard.hang_timeout_s" in log.read_text()


def ranks_of(session: int) -> list[str]:
    """Processes of a launcher's session that run pipeline/train.py themselves."""
    found = subprocess.run(["ps", "-o", "pid=,args=", "-s", str(session)], capture_output=True, text=True).stdout
    lines = [line.split(None, 1) for line in found.splitlines()]
    return [pid for pid, arguments in lines if "launch" not in arguments and "--local_rank" in arguments]


def wait_until(condition: Callable[[], bool], timeout_s: float = 30) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_finished_run_is_left_alone(plain_run: Path, arguments: list[str]) -> None:
    before = {p: p.stat().st_mtime_ns for p in plain_run.rglob("*") if p.is_file() and "tensorboard" not in str(p)}
    assert "nothing to do" in train("python", 1, plain_run, arguments)
    after = {p: p.stat().st_mtime_ns for p in plain_run.rglob("*") if p.is_file() and "tensorboard" not in str(p)}
    changed = {str(p.relative_to(plain_run)) for p in before.keys() | after if before.get(p) != after.get(p)}
    assert changed - {"metrics.jsonl", "logs/rank0.log"} == set()
