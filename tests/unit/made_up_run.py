"""Made-up run directories with the files of training: `make_run` has one student, `make_family` has three.

One student: two attempts, three checkpoints, the retrieval results of a demo, relation maps. Three students: one finished,
one that ended early, and one that was added to the finished run and is still in training.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch.utils.tensorboard import SummaryWriter

from pipeline.config import load_recipe, recipe_to_yaml
from pipeline.runtime.checkpoint_files import checkpoint_path
from pipeline.runtime.run_paths import RunPaths

POOLINGS = ("output", "last_input", "values")


def points(num_steps: int) -> list[dict[str, float]]:
    """Lines of `metrics.jsonl`, one step every two seconds."""
    lines: list[dict[str, float]] = [
        {"step": 0, "samples": 0, "time_s": 0.0, "heldout/mean": 3.0, "heldout/de": 2.9, "heldout/th": 3.1}
    ]
    for step in range(1, num_steps + 1):
        lines.append(
            {
                "step": step,
                "samples": step * 16,
                "time_s": 2.0 * step,
                "loss/total": 3.0 / step,
                "loss/q-q": 1.0 / step,
                "optimizer/learning_rate": 1e-4,
                "optimizer/gradient_norm": 1.0,
                "optimizer/skipped_steps": 0,
                "speed/tokens_per_second": 1000.0,
                "speed/data_wait_share": 0.01,
                "speed/teacher_share": 0.3,
                "speed/student_share": 0.4,
                "speed/loss_share": 0.15,
                "speed/optimizer_share": 0.1,
                "speed/model_tflops_per_device": 121.0,
                "speed/mfu": 0.122,
                "speed/peak_memory_gib": 5.4,
            }
        )
    lines.append({**lines[0], "step": num_steps, "samples": num_steps * 16, "time_s": 99.0, "heldout/mean": 0.625})
    return lines


def make_run(directory: Path) -> Path:
    """Eight steps; the second attempt started at step 4, a minute later."""
    (directory / "retrieval").mkdir(parents=True)
    for step in (4, 8):
        (directory / "checkpoints" / f"step-{step:08d}").mkdir(parents=True)
    lines = points(8)
    for line in lines:
        line["time_s"] += 1000.0 + (60.0 if line["step"] > 4 else 0.0)
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (directory / "recipe.yaml").write_text(
        "teacher: <script>alert(1)</script>\nseq_len: 128\nstudent: {layers: 6, hidden: 384}\n"
    )
    about = {"world_size": 2, "device": "cuda", "device_names": ["NVIDIA H200"] * 2, "languages": ["de", "th"]}
    (directory / "run.json").write_text(json.dumps(about))
    attempt = {"world_size": 2, "host": "n1", "ended": None}
    restarts = [
        {**attempt, "first_step": 0, "saved_steps": [4], "time_s": 999.0},
        {**attempt, "first_step": 4, "saved_steps": [6, 8], "time_s": 1065.0, "ended": "DONE"},
    ]
    (directory / "restarts.json").write_text(json.dumps(restarts))
    for stage, accuracy in (("teacher", 0.975), ("before", 0.7), ("after", 0.875)):
        pair = {pooling: {"mean": accuracy} for pooling in POOLINGS}
        result = {"mean": dict.fromkeys(POOLINGS, accuracy), "per_pair": {"de": pair, "th": pair}}
        (directory / "retrieval" / f"{stage}.json").write_text(json.dumps({"identity": "x", "result": result}))
    board = SummaryWriter(str(directory / "tensorboard"))
    board.add_image("relations/q-q", torch.rand(1, 8, 8), 0)
    board.add_image("relations/q-q", torch.rand(1, 8, 8), 8)
    board.close()
    (directory / "DONE").write_text("done\n")
    return directory


FAMILY = """
teacher: some/<b>teacher
seq_len: 128
steps: 8
relations: {heads: 12, teacher_layer: 3}
student: {layers: 4, hidden: 48, heads: 4}
students:
  deep: {optimizer: {lr: 1.0e-3}}
  flat: {student: {layers: 2}}
  late: {student: {layers: 1}, optimizer: {lr: 2.0e-3}}
"""
HELDOUT = {"deep": {0: 3.0, 4: 0.5, 8: 0.625}, "flat": {0: 3.0, 4: 2.0}, "late": {0: 3.5}}
BERT = {"model_type": "bert", "vocab_size": 100, "num_attention_heads": 4, "hidden_size": 48, "intermediate_size": 192}
EARLY = {"step": 4, "reason": "no better held-out loss for 1 evaluation"}


def make_family(directory: Path) -> Path:
    """`deep` and `flat` were trained together, `late` afterwards as the second group."""
    directory.mkdir(parents=True)
    (directory / "recipe.yaml").write_text(FAMILY)
    members = load_recipe(directory / "recipe.yaml", []).members()
    starts = [{"first_step": 0, "saved_steps": saved, "world_size": 1, "ended": "DONE"} for saved in ([4, 8], [])]
    restarts = [{**start, "time_s": time_s} for start, time_s in zip(starts, (999.0, 2000.0), strict=True)]
    (directory / "restarts.json").write_text(json.dumps(restarts))
    for name, member in members.items():
        paths = RunPaths(directory, name, group=2 if name == "late" else 1)
        paths.files.mkdir(parents=True)
        paths.recipe.write_text(recipe_to_yaml(member))
        paths.student_config.write_text(json.dumps({**BERT, "num_hidden_layers": member.student.layers}))
        about = {"world_size": 1, "device": "cpu", "precision": "fp32", "languages": ["de", "th"]}
        paths.description.write_text(json.dumps({**about, "matched_layers": [[3, member.student.layers]]}))
        paths.metrics.write_text("".join(json.dumps(line) + "\n" for line in _family_points(name)))
        board = SummaryWriter(str(paths.tensorboard))
        board.add_image("relations/q-q", torch.rand(1, 8, 8), 0)
        board.close()
    for step in (4, 8):
        for name in ("deep", "flat"):
            _family_checkpoint(RunPaths(directory, name), step, EARLY if name == "flat" else None)
    _family_checkpoint(RunPaths(directory, "late", group=2), 2, None)
    return directory


def _family_points(name: str) -> list[dict[str, float]]:
    last = {"deep": 8, "flat": 4, "late": 3}[name]
    start_s = 2000.0 if name == "late" else 1000.0
    lines = [{**line, "time_s": line["time_s"] + start_s} for line in points(last)[1:-1]]
    for step, loss in HELDOUT[name].items():
        values = {"heldout/mean": loss, "heldout/de": loss - 0.25, "heldout/th": loss + 0.25}
        lines.append({"step": step, "samples": step * 16, "time_s": start_s + 2.0 * step + 1, **values})
    if name == "flat":  # the run saves its weights after its end too
        lines.append({"step": 8, "samples": 128, "time_s": start_s + 18.0, "speed/save_stall_seconds": 0.1})
    return sorted(lines, key=lambda line: line["time_s"])


def _family_checkpoint(paths: RunPaths, step: int, ended: dict[str, object] | None) -> None:
    directory = checkpoint_path(paths.checkpoints, step) / paths.student
    directory.mkdir(parents=True)
    (directory / "state.json").write_text(json.dumps({"step": step, "ended": ended}))


def write_metrics(paths: RunPaths, *points: dict[str, float]) -> None:
    lines = [json.dumps({"samples": 16, "time_s": 1.0, **point}) for point in points]
    paths.metrics.write_text("".join(line + "\n" for line in lines))


def change_recipe(family: Path, student: str, change: str) -> None:
    recipe = RunPaths(family, student).recipe
    recipe.write_text(recipe_to_yaml(load_recipe(recipe, [change])))
