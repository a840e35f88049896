"""`python -m pipeline doctor` where something is really broken: it names the problem and how to fix it."""

from __future__ import annotations

import errno
import json
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from data_prep.__main__ import main as prepare_main
from pipeline.__main__ import main
from pipeline.config import load_recipe
from pipeline.doctor.machine import (
    Finding,
    guarded,
    lock_findings,
    port_finding,
    run_dir_finding,
    slurm_finding,
)
from pipeline.doctor.recipe import disk_finding, recipe_findings
from pipeline.errors import EXIT_USER, exit_code_of
from pipeline.planning.meta_models import Sizes
from pipeline.training.checks import Inputs, start_up_checks
from tests.conftest import REPO

Look = Callable[..., list[Finding]]


@pytest.fixture
def look(tiny_recipe: Path, fp32_config: Path, tmp_path: Path) -> Look:
    """The findings about the tiny recipe with these overrides."""

    def findings(*overrides: str, check_hashes: bool = False, ranks: int = 1) -> list[Finding]:
        return recipe_findings(tiny_recipe, list(overrides), fp32_config, tmp_path / "run", ranks, check_hashes)

    return findings


def no_links(*_: object, **__: object) -> None:
    raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))


def only_failure(findings: list[Finding]) -> Finding:
    failures = [finding for finding in findings if finding.status == "fail"]
    assert len(failures) == 1, findings
    return failures[0]


def test_a_healthy_machine_and_run(
    tiny_recipe: Path, fp32_config: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    words = ["--deepspeed", str(fp32_config), "--run-dir", str(tmp_path / "run"), "--hash"]
    assert exit_code_of(lambda: main(["doctor", "--recipe", str(tiny_recipe), *words])) == 0
    out = capsys.readouterr().out
    assert "FAIL" not in out
    for subject in (
        "versions",
        "devices",
        "precision",
        "compiler",
        "locks",
        "run dir",
        "ports",
        "tensorboard",
        "slurm",
    ):
        assert f" {subject} " in out
    assert "ok    tensorboard  starts and answers" in out
    assert "every hash as in the manifest" in out
    assert "tokenizer as the shards'" in out
    assert "ok    ids          ids compared with AutoTokenizer's on" in out
    assert not list(tmp_path.iterdir())


def test_exit_code_and_paragraph_when_something_fails(
    tiny_recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    words = ["--recipe", str(tiny_recipe), "--run-dir", str(tmp_path), "--set", f"data={tmp_path / 'nowhere'}"]
    assert exit_code_of(lambda: main(["doctor", *words])) == EXIT_USER
    printed = capsys.readouterr()
    assert "FAIL  shards" in printed.out
    assert "not ready: shards" in printed.err


def test_missing_shards_name_the_command(look: Look, tmp_path: Path) -> None:
    assert "python -m data_prep prepare" in only_failure(look(f"data={tmp_path / 'nowhere'}")).what


def test_warnings_of_a_run_are_warnings_here(look: Look) -> None:
    found = [finding.what for finding in look("optimizer.warmup_steps=40") if finding.status == "warn"]
    assert any("optimizer.warmup_steps is 40" in what for what in found), found


def test_every_start_up_check_of_a_run_is_reported(look: Look, tiny_recipe: Path, fp32_config: Path) -> None:
    recipe = load_recipe(tiny_recipe, [])
    inputs = Inputs(recipe, tiny_recipe, fp32_config, 1, torch.device("cpu"), lambda recipe: pytest.fail("not needed"))
    expected = [check.subject for check in start_up_checks(inputs)]
    found = dict.fromkeys(finding.subject for finding in look("optimizer.warmup_steps=40"))  # one warning of the recipe
    assert [subject for subject in found if subject in expected] == expected


FAMILY = [
    "students.small.student.layers=1",
    "students.tail.relations.tail=relation",
    "students.lower.relations.teacher_layer=2",
    "students.lower.optimizer.warmup_steps=40",
]


def test_each_student_of_a_family_is_checked_and_nothing_is_said_twice(look: Look, tmp_path: Path) -> None:
    found = look(*FAMILY)
    assert all(finding.status != "fail" for finding in found), found
    said = [finding.what for finding in found]
    assert len(said) == len(set(said))
    teachers = {finding.subject: finding.what for finding in found if finding.subject.startswith("teacher")}
    assert "read at layer [2]" in teachers["teacher of lower"]
    (rate,) = [finding for finding in found if "optimizer.warmup_steps is 40" in finding.what]
    assert (rate.status, rate.subject) == ("warn", "recipe of lower")
    (memory,) = [finding.what for finding in found if finding.subject == "memory"]
    assert "; 3 students " in memory
    kept = {"checkpoints": look(*FAMILY, "checkpoint.keep_best=heldout"), "alone": look()}
    disks = {name: next(f.what for f in findings if f.subject == "disk") for name, findings in kept.items()}
    assert disks["checkpoints"].startswith("5 checkpoints of"), "two newest, and the best of each student"
    assert disks["alone"].startswith("2 checkpoints of")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("students.lower.relations.teacher_layer=9", "students.lower: there is no layer 9 in the teacher"),
        ("students.small.relations.heads=5", "students.small: "),
        ("students.tail.student.layers=0", "students.tail"),
        ("students.tail.relations.student_layer=7", "students.tail: there is no layer 7 in the student"),
    ],
)
def test_a_problem_of_one_student_names_it(look: Look, change: str, message: str) -> None:
    assert message in only_failure(look(*FAMILY, change)).what


def test_corrupt_shards_name_the_file(look: Look, tiny_shards: Path, tmp_path: Path) -> None:
    shards = shutil.copytree(tiny_shards, tmp_path / "shards")
    victim = next((shards / "tr").glob("*.tok"))
    content = victim.read_bytes()
    victim.write_bytes(content[:5000] + bytes([content[5000] ^ 1]) + content[5001:])
    assert all(finding.status != "fail" for finding in look(f"data={shards}")), "sizes alone do not show it"
    assert victim.name in only_failure(look(f"data={shards}", check_hashes=True)).what
    victim.write_bytes(content[:-8])
    assert victim.name in only_failure(look(f"data={shards}")).what


def test_teacher_that_is_a_pickle(look: Look, tiny_teacher: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((tiny_teacher / "config.json").read_bytes())
    (tmp_path / "pytorch_model.bin").write_bytes(b"never opened")
    what = only_failure(look(f"teacher={tmp_path}")).what
    assert "holds no model.safetensors" in what
    assert "save_pretrained" in what


def test_an_encoder_that_the_student_starts_from(look: Look, tiny_teacher: Path, tmp_path: Path) -> None:
    start = shutil.copytree(tiny_teacher, tmp_path / "start")
    overrides = ("student={layers: 4, hidden: 48, heads: 4, ffn: 96}", f"student.init={start}")
    found = look(*overrides)
    assert not [finding for finding in found if finding.status == "fail"]
    said = [finding.what for finding in found if finding.subject == "student"]
    assert said[0].startswith(f"{start}: ")
    assert said[1:] == [f"starts from {start}: 4 layers x 48, tokenizer as the teacher's"]
    assert "layers 4, not 3" in only_failure(look(*overrides, "student.layers=3")).what
    cached = look("student.init=no-such-owner/no-such-model")
    assert [(finding.status, finding.subject) for finding in cached if finding.status != "ok"] == [("warn", "student")]
    assert "~no-such-user/x is not a directory" in only_failure(look("student.init=~no-such-user/x")).what
    (start / "model.safetensors").unlink()
    assert "encoder of `student.init`" in only_failure(look(*overrides)).what


def test_the_encoder_that_one_student_of_a_family_starts_from(look: Look, tiny_teacher: Path, tmp_path: Path) -> None:
    start = shutil.copytree(tiny_teacher, tmp_path / "start")
    right = f"{{student: {{layers: 4, hidden: 48, heads: 4, ffn: 96, init: {start}}}}}"
    found = look(f"students={{first: {right}, second: {{student: {{init: {start}}}}}, third: {{}}}}")
    failure = only_failure(found)
    assert failure.subject == "student of second"
    assert failure.what.startswith(
        f"students.second: the encoder of `student.init` '{start}' is not of the student's shape"
    )
    assert failure.what.endswith(
        ": --set students.second.student.layers=4 --set students.second.student.hidden=48 --set students.second.student.ffn=96"
    )
    said = [finding.what for finding in found if finding.status == "ok" and finding.subject.startswith("student")]
    assert [what.split(str(start))[0] for what in said] == ["", "starts from "], "its files are named once"


def test_teacher_with_truncated_weights(look: Look, tiny_teacher: Path, tmp_path: Path) -> None:
    other = shutil.copytree(tiny_teacher, tmp_path / "teacher")
    weights = other / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert "model.safetensors" in only_failure(look(f"teacher={other}")).what


def test_teacher_of_an_unknown_architecture_or_of_other_shards(look: Look, tiny_teacher: Path, tmp_path: Path) -> None:
    other = shutil.copytree(tiny_teacher, tmp_path / "teacher")
    model = other / "sentencepiece.bpe.model"
    model.write_bytes(model.read_bytes() + b"\x00")
    assert "another tokenizer" in only_failure(look(f"teacher={other}")).what
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "model_type": "gpt2"}))
    assert "xlm-roberta" in only_failure(look(f"teacher={other}")).what


def test_ids_of_another_tokenizer(look: Look, tiny_teacher: Path, tmp_path: Path) -> None:
    other = shutil.copytree(tiny_teacher, tmp_path / "teacher")
    settings = json.loads((other / "tokenizer_config.json").read_text())
    (other / "tokenizer_config.json").write_text(json.dumps({**settings, "tokenizer_class": "CamembertTokenizer"}))
    (other / "tokenizer.json").unlink()
    failure = only_failure(look(f"teacher={other}"))
    assert (failure.subject, "CamembertTokenizer" in failure.what) == ("ids", True)


def test_ids_that_were_compared_with_the_same_tokenizer(
    look: Look, tiny_teacher: Path, tiny_shards: Path, tmp_path: Path
) -> None:
    """The manifest names the tokenizer of the comparison. A copy of its directory is the same tokenizer."""
    shards, teacher = tmp_path / "shards", shutil.copytree(tiny_teacher, tmp_path / "teacher")
    text = str(REPO / "samples" / "cc100" / "sw.txt.xz")
    assert prepare_main(["prepare", "--input", text, "--tokenizer", str(tiny_teacher), "--output", str(shards)]) == 0
    found = {finding.subject: finding for finding in look(f"teacher={teacher}", f"data={shards}")}
    assert found["ids"] == Finding("ok", "ids", "ids compared with AutoTokenizer's when the shards were prepared")


def test_hub_name_that_is_not_cached_yet(look: Look) -> None:
    found = [finding for finding in look("teacher=nobody/no-such-model") if finding.subject == "teacher"]
    assert [finding.status for finding in found] == ["warn"]
    assert "hf download nobody/no-such-model" in found[0].fix


def test_what_does_not_divide(look: Look) -> None:
    assert "micro_batch_per_gpu could be" in only_failure(look("micro_batch_per_gpu=3")).what
    assert "relations.heads" in only_failure(look("relations.heads=7")).what
    assert "layers 1 to 4" in only_failure(look("relations.teacher_layer=5")).what
    assert "3 ranks" in only_failure(look(ranks=3)).what


def test_too_small_a_disk(look: Look) -> None:
    assert "checkpoint.keep" in only_failure(look("checkpoint.keep=1000000000")).what


@pytest.mark.parametrize("links", [True, False])
def test_milestones_count_towards_the_disk(
    tiny_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool
) -> None:
    """In hundredths of the free space: 1 trained, 20 untrained. Two checkpoints need 42; ten milestones 10, or 210 without links."""
    if not links:
        monkeypatch.setattr(os, "link", no_links)  # as on FAT
    hundredth = shutil.disk_usage(tmp_path).free // 100
    sizes = Sizes(teacher=0, trained=hundredth // 12, untrained=hundredth * 20 // 4)

    def found(*overrides: str) -> Finding:
        return disk_finding(load_recipe(tiny_recipe, ["checkpoint.keep=1", *overrides]), sizes, tmp_path / "run")

    assert found().status == "ok"
    assert "milestones" not in found().what
    ten = found("checkpoint.keep_every=400", "steps=4399")
    assert (ten.status, "10 milestones" in ten.what) == ("ok" if links else "warn", True)
    many = found("checkpoint.keep_every=50", "steps=4000")
    assert (many.status, "checkpoint.keep_every" in many.fix) == ("warn", True)
    assert not list(tmp_path.iterdir())


def test_directory_that_cannot_be_written_to() -> None:
    finding = guarded("run dir", lambda: run_dir_finding(Path("/proc/runs/quickstart")))
    assert finding.status == "fail"
    assert "--run-dir" in finding.what


def test_stale_lock_and_its_fix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = tmp_path / "py311_cpu" / "op" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    assert [finding.status for finding in lock_findings()] == ["ok"], "a compilation may be under way"
    os.utime(lock, (0, 0))
    (finding,) = lock_findings()
    assert (finding.status, finding.fix) == ("warn", f"rm {lock}")


def test_port_in_use() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        assert "--master_port" in port_finding(other.getsockname()[1]).fix


def test_slurm_that_answers_or_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sinfo = tmp_path / "sinfo"
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    sinfo.write_text("#!/bin/sh\necho 'gpu* up 4 x gpu:8'\n")
    sinfo.chmod(0o755)
    assert "gpu* up 4 x gpu:8" in slurm_finding().what
    sinfo.write_text("#!/bin/sh\necho 'cannot contact slurmctld' >&2; exit 1\n")
    assert "cannot contact slurmctld" in slurm_finding().what
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    assert slurm_finding().status == "ok"
