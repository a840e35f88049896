"""The complete demo on a tiny teacher: shards, student, table. A second run repeats no step."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from data_prep.command_line import VERBOSE
from pipeline.runtime.checkpoint import read_model_weights

REPO = Path(__file__).resolve().parents[2]
SETTINGS = ["retrieval.languages=[de, sw]", "retrieval.max_pairs=10", "retrieval.max_length=60"]


def demo(recipe: Path, run_dir: Path, *settings: str) -> str:
    """What it printed, errors and messages of libraries included."""
    command = [sys.executable, "-m", "demo", "--recipe", str(recipe), "--run-dir", str(run_dir)]
    command += [word for setting in (*SETTINGS, *settings) for word in ("--set", setting)]
    environment = {name: value for name, value in os.environ.items() if name != VERBOSE}
    done = subprocess.run(
        command, cwd=REPO, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=280, env=environment
    )
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def finished(tiny_recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    run_dir = tmp_path_factory.mktemp("demo") / "run"
    return run_dir, demo(tiny_recipe, run_dir)


def test_the_table_and_its_json(finished: tuple[Path, str]) -> None:
    run_dir, printed = finished
    report = json.loads((run_dir / "demo.json").read_text())
    for stage in ("teacher", "before", "after"):
        assert 0 <= report[f"{stage}_mean"] <= 1
        assert 0 <= report[f"{stage}_mean_values"] <= 1
        mean = sum(pair[stage]["output"] for pair in report["per_pair"].values()) / 2
        assert report[f"{stage}_mean"] == pytest.approx(mean, abs=1e-3)
        assert any(line.startswith(stage) for line in printed.splitlines())
    assert list(report["per_pair"]) == ["de", "sw"]
    assert report["steps"] == 12
    assert report["seconds"] > 0
    assert report["tokens_per_second"] > 0


def test_the_lines_of_the_demo(finished: tuple[Path, str]) -> None:
    """Few lines, none of a library, and at the end what was written."""
    run_dir, printed = finished
    lines = printed.splitlines()
    # The quickstart has one evaluation more, a step line every 30 s, and the lines that make the shards: fewer than 80.
    assert len(lines) < 60
    assert "\r" not in printed, "a bar that is drawn again"
    for noise in ("[INFO]", "[WARNING]", "MISSING", "LOAD REPORT", "Loading weights", "launch.py"):
        assert noise not in printed
    steps = [line for line in lines if line.startswith("step ") and " of 12 " in line]
    assert [line.split()[1] for line in steps] == ["1", "12"], "shorter than 30 s"
    files = ", ".join(str(run_dir / name) for name in ("student", "demo.json", "report.html"))
    assert lines[-1] == f"written: {files} (curves: tensorboard --logdir {run_dir})"
    assert all(Path(file).exists() for file in files.split(", "))


@torch.inference_mode()
def test_the_student_is_the_trained_one(finished: tuple[Path, str], tiny_teacher: Path) -> None:
    run_dir, _ = finished
    weights, state = read_model_weights(run_dir)
    assert state["step"] == 12
    model = AutoModel.from_pretrained(run_dir / "student")
    own = model.state_dict()
    assert all(torch.equal(own[name], tensor) for name, tensor in weights.items())
    assert AutoTokenizer.from_pretrained(run_dir / "student")("Hallo")["input_ids"][0] == 0


def test_a_second_run_does_nothing_again(finished: tuple[Path, str], tiny_recipe: Path) -> None:
    run_dir, first = finished
    times = {path: path.stat().st_mtime_ns for path in run_dir.rglob("*") if path.is_file()}
    second = demo(tiny_recipe, run_dir)
    assert "$ " not in second  # no stage was started
    assert second.splitlines()[-8:] == first.splitlines()[-8:]
    changed = [path.name for path, at in times.items() if path.stat().st_mtime_ns != at]
    assert changed == ["demo.json"]
