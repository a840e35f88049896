"""A run knows teacher, tokenizer and vocabulary by content: other weights at the same path are noticed, another path is not."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from data_prep.__main__ import main as data_prep
from pipeline.__main__ import main as pipeline
from pipeline.errors import EXIT_USER, UserError, exit_code_of
from pipeline.identity import changes, identity_of
from pipeline.runtime import checkpoint
from pipeline.runtime.checkpoint import checkpoint_path, committed_steps, read_model_weights
from tests.conftest import REPO
from tests.dist.ports import free_port
from tests.dist.runs import end_group
from tests.dist.training_process import Ended, TrainingProcess

Train = Callable[..., Ended]
STOPPED_AT = 4


@pytest.fixture(scope="module")
def begun(
    training: TrainingProcess,
    tiny_recipe: Path,
    tiny_teacher: Path,
    fp32_config: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A directory with a teacher and a run of four steps that was distilled from it."""
    root = tmp_path_factory.mktemp("begun")
    shutil.copytree(tiny_teacher, root / "teacher")
    ended = training.run(*words_of(root, tiny_recipe, fp32_config), "--set", f"steps={STOPPED_AT}")
    assert ended.code == 0, ended.err
    return root


def words_of(root: Path, recipe: Path, ds: Path) -> list[object]:
    sets = ["--set", f"teacher={root / 'teacher'}", "--set", "eval_every=100", "--set", "metrics.images=false"]
    return ["--deepspeed", ds, "--recipe", recipe, "--run-dir", root / "run", *sets]


@pytest.fixture
def root(begun: Path, tmp_path: Path) -> Path:
    """A copy of both, in another place."""
    return shutil.copytree(begun, tmp_path / "moved")


@pytest.fixture
def resume(training: TrainingProcess, root: Path, tiny_recipe: Path, fp32_config: Path) -> Train:
    """Start the run in `root` again for two more steps."""

    def run(*more: object, steps: int = STOPPED_AT + 2) -> Ended:
        return training.run(*words_of(root, tiny_recipe, fp32_config), "--set", f"steps={steps}", *more)

    return run


def other_weights(teacher: Path) -> None:
    tensors = load_file(teacher / "model.safetensors")
    tensors["encoder.layer.1.output.dense.weight"][0, 0] += 0.5
    save_file(tensors, teacher / "model.safetensors", {"format": "pt"})


def identity(run_dir: Path) -> dict[str, str]:
    return read_model_weights(run_dir)[1]["identity"]


def test_everything_that_describes_a_run_names_it(begun: Path, tmp_path: Path) -> None:
    known = identity(begun / "run")
    assert {"teacher weights", "teacher config", "tokenizer sentencepiece.bpe.model", "tokenizer tokenizer.json"} == set(known)
    assert json.loads((begun / "run" / "run.json").read_text())["identity"] == known
    pipeline(["export", str(begun / "run"), "--output", str(tmp_path / "student")])
    assert json.loads((tmp_path / "student" / "lineage.json").read_text())["identity"] == known


def test_one_number_of_the_teacher_changed(root: Path, resume: Train) -> None:
    before = identity(root / "run")
    other_weights(root / "teacher")
    ended = resume()
    assert ended.code == EXIT_USER
    assert re.search(r"error: .*run was begun with another .*teacher weights: \w{12} -> \w{12}.*--allow-change", ended.err)
    assert committed_steps(root / "run" / "checkpoints") == [STOPPED_AT]
    ended = resume("--allow-change")
    assert ended.code == 0
    assert re.search(r"warning: --allow-change: .*teacher weights: \w{12} -> \w{12}", ended.out)
    assert "resumed from" in ended.out
    now = identity(root / "run")  # from here on the run is that of the new one
    assert now.keys() == before.keys()
    assert {key for key in now if now[key] != before[key]} == {"teacher weights"}
    assert resume(steps=STOPPED_AT + 3).code == 0


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json"])
def test_another_config_or_tokenizer(file: str, root: Path, resume: Train) -> None:
    path = root / "teacher" / file
    tree = json.loads(path.read_text())
    cut = {"direction": "Right", "max_length": 64, "strategy": "LongestFirst", "stride": 0}
    tree |= {"layer_norm_eps": 1e-7} if file == "config.json" else {"truncation": cut}
    path.write_text(json.dumps(tree))
    ended = resume()
    assert ended.code == EXIT_USER
    assert re.search("teacher config: " if file == "config.json" else r"tokenizer tokenizer\.json: ", ended.err)


def test_the_same_content_is_no_change(root: Path, resume: Train) -> None:
    """Another path (the copy), another date, other files, other metadata, a head that was not there."""
    teacher = root / "teacher"
    tensors = load_file(teacher / "model.safetensors")
    (teacher / "model.safetensors").unlink()
    place = {}
    for number, names in enumerate((sorted(tensors)[:20], sorted(tensors)[20:])):
        part = f"model-{number + 1}.safetensors"
        save_file({f"roberta.{name}": tensors[name] for name in names}, teacher / part, {"made": "by hand"})
        place |= {f"roberta.{name}": part for name in names}
    save_file({"lm_head.bias": torch.ones(9)}, teacher / "model-3.safetensors")
    place["lm_head.bias"] = "model-3.safetensors"
    (teacher / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": place}))
    about = json.loads((teacher / "config.json").read_text())
    (teacher / "config.json").write_text(json.dumps({**about, "architectures": ["Other"], "transformers_version": "4.0"}))
    ended = resume()
    assert ended.code == 0, ended.err
    assert "warning: --allow-change" not in ended.out
    assert "by content" not in ended.out


def test_a_checkpoint_from_before_is_resumed_with_one_warning(root: Path, resume: Train) -> None:
    committed = checkpoint_path(root / "run" / "checkpoints", STOPPED_AT)
    partial = shutil.copytree(committed, committed.with_suffix(".tmp"))
    (partial / "manifest.json").unlink()
    state = json.loads((partial / "state.json").read_text())
    del state["identity"]
    state["recipe"]["teacher"] = str(root / "teacher")
    (partial / "state.json").write_text(json.dumps(state))
    checkpoint.commit(partial, committed, {path.name: checkpoint.seal(path) for path in partial.iterdir()})
    ended = resume()
    assert ended.code == 0, ended.err
    assert ended.out.count("before checkpoints knew their teacher by content") == 1
    assert "teacher weights" in identity(root / "run")


@pytest.mark.parametrize("change", ["student.hidden=12", "student.ffn=48", "student.layers=1"])
def test_no_weight_is_loaded_into_another_shape(change: str, root: Path, resume: Train) -> None:
    """What fits into a smaller matrix are other numbers: also where the change was asked for."""
    ended = resume("--allow-change", "--set", change)
    assert ended.code == EXIT_USER
    assert re.search(r"another student: \d+ parameters differ", ended.err)
    assert committed_steps(root / "run" / "checkpoints") == [STOPPED_AT]


# -- at export


def test_export_takes_no_other_tokenizer(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run_json = root / "run" / "run.json"
    facts = json.loads(run_json.read_text())
    assert exit_code_of(lambda: pipeline(["export", str(root / "run"), "--output", str(tmp_path / "student")])) == 0
    shutil.rmtree(tmp_path / "student")
    run_json.write_text(json.dumps({**facts, "teacher": str(root / "teacher")}))
    path = root / "teacher" / "tokenizer.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "normalizer": None}))
    capsys.readouterr()
    assert exit_code_of(lambda: pipeline(["export", str(root / "run"), "--output", str(tmp_path / "student")])) == EXIT_USER
    error = capsys.readouterr().err
    assert re.search(r"error: the tokenizer in .*teacher is no longer .*tokenizer tokenizer\.json: ", error)
    assert not (tmp_path / "student").exists()
    run_json.write_text(json.dumps(facts))  # the fix that is printed
    pipeline(["export", str(root / "run"), "--output", str(tmp_path / "student")])


def test_export_says_that_the_teacher_has_changed(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run_json = root / "run" / "run.json"
    run_json.write_text(json.dumps({**json.loads(run_json.read_text()), "teacher": str(root / "teacher")}))
    other_weights(root / "teacher")
    pipeline(["export", str(root / "run"), "--output", str(tmp_path / "student")])
    assert "is no longer the teacher that this student was distilled from (teacher weights: " in capsys.readouterr().err


# -- in `evaluate`


def test_evaluate_says_that_it_compares_with_another_teacher(
    begun: Path, root: Path, tiny_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    student = tmp_path / "student"
    pipeline(["export", str(begun / "run"), "--output", str(student)])
    for change, is_said in ((None, False), (other_weights, True)):
        if change is not None:
            change(root / "teacher")
        words = ["--teacher", str(root / "teacher"), "--data", str(tiny_shards), "--output", str(tmp_path / "figures")]
        capsys.readouterr()
        pipeline(["evaluate", str(student), "--tasks", "heldout", *words])
        assert ("learned from a teacher with other weights than" in capsys.readouterr().err) == is_said


# -- on several ranks


@pytest.mark.parametrize("second", ["other weights", "nothing"])
def test_ranks_that_see_different_teachers_end_with_one_error(
    second: str, tmp_path: Path, tiny_recipe: Path, tiny_teacher: Path, fp32_config: Path
) -> None:
    """Each rank looks below its own home directory, as hosts without a shared disk do."""
    for rank in range(2):
        shutil.copytree(tiny_teacher, tmp_path / f"home{rank}" / "teacher")
    if second == "nothing":
        shutil.rmtree(tmp_path / "home1" / "teacher")
    else:
        other_weights(tmp_path / "home1" / "teacher")
    words = ["--deepspeed", str(fp32_config), "--recipe", str(tiny_recipe), "--run-dir", str(tmp_path / "run")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    environment |= {"MASTER_PORT": str(free_port())}
    processes = [
        subprocess.Popen(
            [sys.executable, "pipeline/train.py", *words, "--set", "teacher=~/teacher"],
            cwd=REPO,
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank), "HOME": str(tmp_path / f"home{rank}")},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        for rank in range(2)
    ]
    try:
        errors = [re.findall(r"^error: .*", process.communicate(timeout=120)[0], re.M) for process in processes]
    finally:
        for process in processes:
            end_group(process)
    assert [process.returncode for process in processes] == [EXIT_USER, EXIT_USER]
    assert errors[0] == errors[1]
    assert len(errors[0]) == 1
    expected = "rank 1 has another teacher weights than" if second == "other weights" else "rank 1: there is no teacher"
    assert expected in errors[0][0]
    assert not (tmp_path / "run").exists()


def test_a_teacher_that_may_only_be_read(begun: Path, root: Path, resume: Train) -> None:
    """Nothing is kept beside the weights."""
    present = {path: path.stat().st_mtime_ns for path in (root / "teacher").rglob("*")}
    assert resume().code == 0
    assert {path: path.stat().st_mtime_ns for path in (root / "teacher").rglob("*")} == present


def test_a_vocabulary_is_known_too(tmp_path: Path, tiny_teacher: Path, tiny_shards: Path) -> None:
    with pytest.raises(UserError, match="is no vocabulary"):
        identity_of(str(tiny_teacher), str(tmp_path / "none"))
    found = []
    for languages in ("sw,tr", "hi,sw,tr"):
        output = tmp_path / languages
        words = ["--tokenizer", tiny_teacher, "--shards", tiny_shards, "--languages", languages, "--output", output]
        assert data_prep(["trim-vocab", *map(str, words)]) == 0
        found.append(identity_of(str(tiny_teacher), str(output)))
    changed = {line.partition(":")[0] for line in changes(*found)}
    assert {"tokenizer sentencepiece.bpe.model", "vocabulary"} <= changed
    assert not {"teacher weights", "teacher config"} & changed
