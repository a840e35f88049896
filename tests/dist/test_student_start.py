"""A run whose student starts from an exported one: it continues from those weights, and its identity holds their hash."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.__main__ import main as pipeline
from pipeline.errors import EXIT_USER
from pipeline.provenance import START_CONFIG, START_WEIGHTS
from pipeline.runtime.checkpoint import read_model_weights
from tests.dist.runs import curve, metrics
from tests.dist.training_process import Ended, TrainingProcess

STEPS = 6


@pytest.fixture(scope="module")
def first(
    training: TrainingProcess, tiny_recipe: Path, fp32_config: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A directory with a run of `STEPS` steps and the student that it exported."""
    root = tmp_path_factory.mktemp("first")
    ended = start(training, tiny_recipe, fp32_config, root / "run", f"steps={STEPS}")
    assert ended.code == 0, ended.err
    pipeline(["export", str(root / "run"), "--output", str(root / "student")])
    return root


def start(training: TrainingProcess, recipe: Path, ds: Path, run_dir: Path, *sets: str) -> Ended:
    words = [word for setting in (*sets, "metrics.images=false") for word in ("--set", setting)]
    return training.run("--deepspeed", ds, "--recipe", recipe, "--run-dir", run_dir, *words)


def test_a_run_continues_from_an_exported_student(
    first: Path, training: TrainingProcess, tiny_recipe: Path, fp32_config: Path, tmp_path: Path
) -> None:
    """Its first held-out losses are the last ones of the exported student, to the last bit."""
    init = first / "student"
    sets = ("steps=2", "eval_every=2", f"student.init={init}", "student.freeze=[embeddings]")
    ended = start(training, tiny_recipe, fp32_config, tmp_path / "run", *sets)
    assert ended.code == 0, ended.err
    tags = {tag for row in metrics(first / "run") for tag in row if tag.startswith("heldout/")}
    assert len(tags) == 5
    for tag in tags:
        assert curve(tmp_path / "run", tag)[0] == curve(first / "run", tag)[STEPS]
        assert curve(tmp_path / "run", tag)[2] != curve(tmp_path / "run", tag)[0]
    weights, state = read_model_weights(tmp_path / "run")
    words = "embeddings.word_embeddings.weight"
    assert torch.equal(weights[words], load_file(init / "model.safetensors")[words])
    known = {key: state["identity"][key] for key in (START_WEIGHTS, START_CONFIG)}
    text = f"the encoder {init} (weights {known[START_WEIGHTS][:12]})"
    assert f"start: {text}" in ended.out
    facts = json.loads((tmp_path / "run" / "run.json").read_text())
    assert facts["identity"] == state["identity"]
    assert (facts["student_start"], facts["trained_length"]) == (text, 32)
    pipeline(["export", str(tmp_path / "run"), "--output", str(tmp_path / "student")])
    lineage = json.loads((tmp_path / "student" / "lineage.json").read_text())
    assert lineage["student_start"] == text.removeprefix("the encoder ")
    assert lineage["identity"] == state["identity"]


def test_a_resumed_run_compares_the_content(
    first: Path, training: TrainingProcess, tiny_recipe: Path, fp32_config: Path, tmp_path: Path
) -> None:
    places = [shutil.copytree(first / "student", tmp_path / name) for name in ("here", "moved")]

    def resume(steps: int, init: object) -> Ended:
        return start(training, tiny_recipe, fp32_config, tmp_path / "run", f"steps={steps}", f"student.init={init}")

    assert resume(1, places[0]).code == 0
    shutil.rmtree(places[0])
    ended = resume(2, places[1])
    assert ended.code == 0, ended.err
    assert "resumed from" in ended.out
    assert "warning: --allow-change" not in ended.out
    tensors = load_file(places[1] / "model.safetensors")
    tensors["encoder.layer.0.output.dense.bias"][0] += 0.5
    save_file(tensors, places[1] / "model.safetensors", {"format": "pt"})
    ended = resume(3, places[1])
    assert ended.code == EXIT_USER
    assert re.search(r"begun with another .*student.init weights: \w{12} -> \w{12}\).*--allow-change", ended.err)
    ended = resume(3, "random")
    assert ended.code == EXIT_USER
    assert f"student.init: {places[1]} -> random" in ended.err


def test_a_run_directory_as_start_names_the_export(
    first: Path, training: TrainingProcess, tiny_recipe: Path, fp32_config: Path, tmp_path: Path
) -> None:
    run_dir = shutil.copytree(first / "run", tmp_path / "run")
    ended = start(training, tiny_recipe, fp32_config, tmp_path / "next", "steps=1", f"student.init={run_dir}")
    assert ended.code == EXIT_USER
    command, setting = re.findall(r"start from that: \S+ -m pipeline (.*?)   \(then --set (.*?)\)", ended.err)[0]
    pipeline(command.split())
    ended = start(training, tiny_recipe, fp32_config, tmp_path / "next", "steps=1", setting)
    assert ended.code == 0, ended.err


def test_a_run_does_not_begin_above_its_start(
    first: Path, training: TrainingProcess, tiny_recipe: Path, fp32_config: Path, tmp_path: Path
) -> None:
    init = shutil.copytree(first / "student", tmp_path / "above" / "student")
    ended = start(training, tiny_recipe, fp32_config, tmp_path / "above", "steps=1", f"student.init={init}")
    assert ended.code == EXIT_USER
    assert f"holds the encoder of `student.init` {init}, which must not be overwritten" in ended.err
