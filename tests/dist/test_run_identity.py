"""A run identifies teacher, tokenizer and vocabulary by content: changed weights are noticed, a changed path is accepted."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from data_prep.__main__ import main as data_prep
from data_prep.shards import manifest_digest
from pipeline.__main__ import main as pipeline
from pipeline.errors import EXIT_USER, UserError, exit_code_of
from pipeline.runtime.checkpoint import read_model_weights
from pipeline.runtime.checkpoint_files import checkpoint_path, commit, committed_steps, fsync_and_hash
from pipeline.training.identity import changes, identity_of
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
    """A copy of both, in another directory."""
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


def rewrite_state(committed: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Replace state.json in a checkpoint, and commit it as a run does."""
    partial = shutil.copytree(committed, committed.with_suffix(".tmp"))
    (partial / "manifest.json").unlink()
    state = json.loads((partial / "state.json").read_text())
    change(state)
    (partial / "state.json").write_text(json.dumps(state))
    commit(partial, committed, {path.name: fsync_and_hash(path) for path in partial.iterdir()})


def identity(run_dir: Path) -> dict[str, str]:
    return read_model_weights(run_dir)[1]["identity"]


def test_everything_that_describes_a_run_names_it(begun: Path, tmp_path: Path) -> None:
    known = identity(begun / "run")
    assert {
        "teacher weights",
        "teacher config",
        "tokenizer sentencepiece.bpe.model",
        "tokenizer tokenizer.json",
    } == set(known)
    assert json.loads((begun / "run" / "run.json").read_text())["identity"] == known
    pipeline(["export", str(begun / "run"), "--output", str(tmp_path / "student")])
    assert json.loads((tmp_path / "student" / "lineage.json").read_text())["identity"] == known


def test_one_number_of_the_teacher_changed(root: Path, resume: Train) -> None:
    before = identity(root / "run")
    other_weights(root / "teacher")
    ended = resume()
    assert ended.code == EXIT_USER
    assert re.search(
        r"error: .*run was begun with another .*teacher weights: \w{12} -> \w{12}.*--allow-change", ended.err
    )
    assert committed_steps(root / "run" / "checkpoints") == [STOPPED_AT]
    ended = resume("--allow-change")
    assert ended.code == 0
    assert re.search(r"warning: --allow-change: .*teacher weights: \w{12} -> \w{12}", ended.out)
    assert "resumed from" in ended.out
    now = identity(root / "run")  # from here on the run belongs to the new teacher
    assert now.keys() == before.keys()
    assert {key for key in now if now[key] != before[key]} == {"teacher weights"}
    assert resume(steps=STOPPED_AT + 3).code == 0


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json"])
def test_another_config_or_tokenizer(file: str, root: Path, resume: Train) -> None:
    path = root / "teacher" / file
    tree = json.loads(path.read_text())
    cut = {"direction": "Right", "max_length": 300, "strategy": "LongestFirst", "stride": 0}
    tree |= {"layer_norm_eps": 1e-7} if file == "config.json" else {"truncation": cut}
    path.write_text(json.dumps(tree))
    ended = resume()
    assert ended.code == EXIT_USER
    assert re.search("teacher config: " if file == "config.json" else r"tokenizer tokenizer\.json: ", ended.err)


def test_the_same_content_elsewhere_is_accepted(root: Path, resume: Train) -> None:
    """Another path (the copy), date, file layout and metadata, and an additional head."""
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
    (teacher / "config.json").write_text(
        json.dumps({**about, "architectures": ["Other"], "transformers_version": "4.0"})
    )
    ended = resume()
    assert ended.code == 0, ended.err
    assert "warning: --allow-change" not in ended.out
    assert "by content" not in ended.out


def test_a_checkpoint_from_before_is_resumed_with_one_warning(root: Path, resume: Train) -> None:
    def forget(state: dict[str, Any]) -> None:
        for key in ("identity", "versions", "deepspeed"):
            del state[key]
        state["recipe"]["teacher"] = str(root / "teacher")

    rewrite_state(checkpoint_path(root / "run" / "checkpoints", STOPPED_AT), forget)
    ended = resume()
    assert ended.code == 0, ended.err
    assert ended.out.count("before checkpoints held the hash of their teacher") == 1
    assert "teacher weights" in identity(root / "run")


@pytest.mark.parametrize("change", ["student.hidden=12", "student.ffn=48", "student.layers=1"])
def test_no_weight_is_loaded_into_another_shape(change: str, root: Path, resume: Train) -> None:
    """A flat fragment would fit into a smaller matrix, with other numbers. Rejected also with --allow-change."""
    ended = resume("--allow-change", "--set", change)
    assert ended.code == EXIT_USER
    assert re.search(r"another student: \d+ parameters differ", ended.err)
    assert committed_steps(root / "run" / "checkpoints") == [STOPPED_AT]


def test_a_run_directory_holds_nothing_of_the_environment(begun: Path) -> None:
    files = [path for path in (begun / "run").rglob("*") if path.is_file()]
    assert files
    for path in files:
        assert os.environ["PATH"].encode() not in path.read_bytes(), path


# -- at export


def test_export_rejects_another_tokenizer(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run_json = root / "run" / "run.json"
    facts = json.loads(run_json.read_text())
    assert exit_code_of(lambda: pipeline(["export", str(root / "run"), "--output", str(tmp_path / "student")])) == 0
    shutil.rmtree(tmp_path / "student")
    run_json.write_text(json.dumps({**facts, "teacher": str(root / "teacher")}))
    path = root / "teacher" / "tokenizer.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "normalizer": None}))
    capsys.readouterr()
    assert (
        exit_code_of(lambda: pipeline(["export", str(root / "run"), "--output", str(tmp_path / "student")]))
        == EXIT_USER
    )
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


@pytest.fixture
def start_two(tmp_path: Path, tiny_recipe: Path, tiny_teacher: Path, fp32_config: Path) -> Callable[..., str]:
    """Start two ranks that must both fail; gives the error of each. Each rank has its own home directory, as on hosts
    without a shared disk, and its own options and variables."""
    for rank in range(2):
        shutil.copytree(tiny_teacher, tmp_path / f"home{rank}" / "teacher")

    def start(words_of_1: tuple[str, ...] = (), sets: tuple[str, ...] = (), **of_1: str) -> str:
        words = ["--deepspeed", str(fp32_config), "--recipe", str(tiny_recipe), "--run-dir", str(tmp_path / "run")]
        words += [word for key in ("teacher=~/teacher", *sets) for word in ("--set", key)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.99.0.0"}
        environment |= {"MASTER_PORT": str(free_port())}
        processes = [
            subprocess.Popen(
                [sys.executable, str(REPO / "pipeline" / "train.py"), *words, *(words_of_1 if rank else ())],
                cwd=tmp_path / f"home{rank}",
                env={
                    **environment,
                    **{"RANK": str(rank), "LOCAL_RANK": str(rank), "HOME": str(tmp_path / f"home{rank}")},
                    **(of_1 if rank else {}),
                },
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
        assert not (tmp_path / "run" / "checkpoints").exists()
        [error] = errors[0]
        return error

    return start


@pytest.mark.parametrize("second", ["other weights", "nothing"])
def test_ranks_that_see_different_teachers_end_with_one_error(second: str, start_two: Callable, tmp_path: Path) -> None:
    if second == "nothing":
        shutil.rmtree(tmp_path / "home1" / "teacher")
    else:
        other_weights(tmp_path / "home1" / "teacher")
    expected = "rank 1 has another teacher weights than" if second == "other weights" else "rank 1: teacher not found"
    assert expected in start_two()


def test_ranks_that_start_from_different_encoders_end_with_one_error(start_two: Callable, tmp_path: Path) -> None:
    for rank in range(2):
        home = tmp_path / f"home{rank}"
        shutil.copytree(home / "teacher", home / "start")
    other_weights(tmp_path / "home1" / "start")
    error = start_two(sets=("student={layers: 4, hidden: 48, heads: 4, ffn: 96, init: ~/start}",))
    assert "rank 1 has another student.init weights than rank 0" in error


def test_ranks_with_another_recipe_or_deepspeed_config_end_with_one_error(
    start_two: Callable, fp32_config: Path, tmp_path: Path
) -> None:
    """The error names key, ranks, hosts and both values. It comes before a rank could wait for the other."""
    host = socket.gethostname()
    error = start_two(("--set", "student.layers=1"))
    assert (
        f"rank 1 has another `student.layers` in the recipe than rank 0 (1 on {host} instead of 2 on {host})" in error
    )
    content = json.loads(fp32_config.read_text())
    other = tmp_path / "other.json"
    other.write_text(json.dumps({**content, "zero_optimization": {**content.get("zero_optimization", {}), "stage": 3}}))
    error = start_two(("--deepspeed", str(other)))
    assert "another `zero_optimization.stage` in the DeepSpeed config than rank 0 (3 on" in error
    other.write_text("{")
    assert start_two(("--deepspeed", str(other))).startswith("error: rank 1: ")


def test_ranks_with_other_libraries_end_with_one_error(start_two: Callable, tmp_path: Path) -> None:
    """A package in rank 1's home directory has another version."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(
        "from importlib import metadata\nfirst = metadata.version\n"
        "metadata.version = lambda name: '99.0.0' if name == 'safetensors' else first(name)\n"
    )
    error = start_two(PYTHONPATH=f"{tmp_path / 'site'}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    assert "rank 1 has another version of safetensors than rank 0 (99.0.0 on" in error


@pytest.mark.parametrize("second", ["other bytes", "cut", "other shards"])
def test_each_copy_of_the_shards_is_checked(
    second: str, start_two: Callable, tiny_shards: Path, tmp_path: Path
) -> None:
    """Each rank has its own copy. That of rank 1 is corrupt in a file that rank 0 would check if the copy were shared."""
    for rank in range(2):
        shutil.copytree(tiny_shards, tmp_path / f"home{rank}" / "shards")
    victims = sorted((tmp_path / "home1" / "shards").rglob("*.tok"))
    if second == "other bytes":
        for victim in victims[:2]:  # one of them belongs to each rank
            content = bytearray(victim.read_bytes())
            content[5000] ^= 1
            victim.write_bytes(content)
    elif second == "cut":
        os.truncate(victims[0], 5000)
    else:
        manifest = tmp_path / "home1" / "shards" / "manifest.json"
        tree = json.loads(manifest.read_text())
        language = sorted(tree["languages"])[0]
        tree["languages"][language]["shards"][0]["xxh3_128"] = "0" * 32
        tree["manifest_xxh3_128"] = manifest_digest(tree)
        manifest.write_text(json.dumps(tree))
    sets = ("data=shards", "guard.verify_shards=true") if second == "other bytes" else ("data=shards",)
    expected = {
        "other bytes": rf"{victims[0].name}, \S+{victims[1].name}: corrupt \(on {socket.gethostname()}\)",
        "cut": r"error: rank 1: Shard .* holds 5000 bytes",
        "other shards": r"rank 1 has another data than rank 0 \(",
    }
    assert re.search(expected[second], start_two(sets=sets))


def test_another_version_or_deepspeed_config_is_said_at_a_resume(
    root: Path, resume: Train, tmp_path: Path, fp32_config: Path
) -> None:
    committed = checkpoint_path(root / "run" / "checkpoints", STOPPED_AT)
    rewrite_state(committed, lambda state: state["versions"]["packages"].update(torch="2.0.0"))
    content = json.loads(fp32_config.read_text())
    other = tmp_path / "other.json"
    other.write_text(json.dumps({**content, "zero_optimization": {**content.get("zero_optimization", {}), "stage": 1}}))
    ended = resume("--deepspeed", other)
    assert ended.code == 0, ended.err
    assert re.search(
        rf"warning: .*other versions \(torch: 2\.0\.0 -> {re.escape(metadata.version('torch'))}\)", ended.out
    )
    assert re.search(r"warning: the DeepSpeed config is no longer .*\(zero_optimization\.stage: 2 -> 1\)", ended.out)


def test_a_teacher_that_may_only_be_read(begun: Path, root: Path, resume: Train) -> None:
    """The run writes no file next to the weights."""
    present = {path: path.stat().st_mtime_ns for path in (root / "teacher").rglob("*")}
    assert resume().code == 0
    assert {path: path.stat().st_mtime_ns for path in (root / "teacher").rglob("*")} == present


def test_a_vocabulary_is_identified_by_content_too(tmp_path: Path, tiny_teacher: Path, tiny_shards: Path) -> None:
    with pytest.raises(UserError, match="is not a vocabulary"):
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
