"""A made-up run directory with the files of training and demo: two attempts, three checkpoints, retrieval, relation maps."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch.utils.tensorboard import SummaryWriter

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
