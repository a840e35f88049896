"""The wheel in an environment of its own: `minilmv2` from text to student, far from any checkout, and the Python functions."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

import minilmv2
from data_prep.command_line import DISTRIBUTION
from pipeline.errors import UserError
from tests.conftest import REPO, write_tiny_recipe

VERSION = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]["version"]
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the tracked files, as a build in a fresh clone is."""
    source, output = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    names = subprocess.run(
        ["git", "-C", REPO, "ls-files", "-co", "--exclude-standard"], capture_output=True, text=True, check=True
    )
    for name in names.stdout.splitlines():
        if name.startswith(
            ("pipeline/", "data_prep/", "minilmv2", "recipes/", "ds_configs/", "pyproject", "README", "LICENSE")
        ):
            target = source / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to((REPO / name).readlink()) if (REPO / name).is_symlink() else target.write_bytes(
                (REPO / name).read_bytes()
            )
    words = ["wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(output), str(source)]
    done = subprocess.run([*PIP, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = output.iterdir()
    return built


@pytest.fixture(scope="module")
def program(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`minilmv2` of the installed wheel. Its dependencies are those of this environment: their installation takes minutes."""
    directory = tmp_path_factory.mktemp("environment")
    venv.create(directory, with_pip=False, symlinks=True)
    python = directory / "bin" / "python"
    (site,) = (directory / "lib").glob("python*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    deepspeed = Path(sysconfig.get_path("scripts")) / "deepspeed"
    (directory / "bin" / "deepspeed").write_text(f"#!{python}\n" + deepspeed.read_text().partition("\n")[2])
    (directory / "bin" / "deepspeed").chmod(0o755)
    subprocess.run([*PIP, "--python", python, "install", "-q", "--no-deps", "--no-index", wheel], check=True)
    return directory / "bin" / "minilmv2"


def run(program: Path, directory: Path, *words: object, code: int = 0) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    environment |= {"PATH": f"{program.parent}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [program, *map(str, words)], cwd=directory, env=environment, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done


def test_the_wheel_has_the_code_the_recipes_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    expected = {
        "minilmv2/recipes/quickstart.yaml",
        "minilmv2/ds_configs/zero2.json",
        "pipeline/doctor/tested_versions.json",
    }
    assert expected <= set(names)
    assert {f"minilmv2/recipes/{path.name}" for path in (REPO / "recipes").glob("*.yaml")} <= set(names)
    top = {name.split("/")[0] for name in names}
    assert top == {"pipeline", "data_prep", "minilmv2", f"{DISTRIBUTION.replace('-', '_')}-{VERSION}.dist-info"}
    for package in ("pipeline", "data_prep", "minilmv2"):
        for path in (REPO / package).rglob("*.py"):
            assert str(path.relative_to(REPO)) in names


def test_from_text_to_a_student_outside_a_checkout(program: Path, tiny_teacher: Path, tmp_path: Path) -> None:
    """A directory named `pipeline` in the current directory is another one."""
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "pipeline" / "__init__.py").write_text("raise RuntimeError('the wrong package')")
    helped = run(program, tmp_path, "--help").stdout
    assert all(
        f"\n  {verb} " in helped
        for verb in ("prepare", "verify", "train", "export", "evaluate", "plan", "doctor", "report")
    )
    for verb in ("prepare", "export"):
        assert f"usage: minilmv2 {verb} " in run(program, tmp_path, verb, "--help").stdout
    assert run(program, tmp_path, "--version").stdout == f"{DISTRIBUTION} {VERSION}\n"
    text = REPO / "samples" / "cc100" / "sw.txt.xz"
    run(program, tmp_path, *f"prepare --input {text} --tokenizer {tiny_teacher} --output shards --workers 1".split())
    recipe = write_tiny_recipe(tmp_path / "tiny.yaml", tiny_teacher, tmp_path / "shards")
    words = f"train --deepspeed ds_configs/zero2.json --recipe {recipe} --run-dir run --set steps=2"
    training = words.split()
    run(program, tmp_path, *training, "--dry-run")
    assert not (tmp_path / "run").exists()
    run(program, tmp_path, "train", "--num_gpus", "2", *training[1:])
    about = json.loads((tmp_path / "run" / "run.json").read_text())
    assert about["world_size"] == 2, "options of the launcher come first"
    assert (about["git_commit"], len(about["code_fingerprint"])) == ("unknown", 16)
    run(program, tmp_path, "export", "run", "--output", "student")
    assert json.loads((tmp_path / "student" / "config.json").read_text())["num_hidden_layers"] > 0


def test_the_doctor_and_the_shipped_recipes_of_a_wheel(program: Path, tmp_path: Path) -> None:
    checked = run(program, tmp_path, "doctor").stdout
    assert f"torch {metadata.version('torch').partition('+')[0]}" in checked
    plan = "plan --recipe recipes/xlmr_large_l12_h384.yaml --deepspeed ds_configs/zero2.json --gpu h100-80"
    assert "xlmr_large_l12_h384" in run(program, tmp_path, *plan.split()).stdout
    assert "invalid choice: 'tain'" in run(program, tmp_path, "tain", code=2).stderr


def test_the_public_names() -> None:
    assert len(minilmv2.__all__) == 10
    for name in minilmv2.__all__:
        assert callable(getattr(minilmv2, name)), name
        assert (getattr(minilmv2, name).__doc__ or "").strip(), name
    assert set(minilmv2.__all__) <= set(dir(minilmv2))
    with pytest.raises(AttributeError, match=r"no attribute 'distill'; it has: distil, "):
        minilmv2.distill  # noqa: B018


def test_the_functions(tiny_recipe: Path, tiny_teacher: Path, fp32_config: Path, tmp_path: Path) -> None:
    run_dir = minilmv2.distil(tiny_recipe, tmp_path / "run", {"steps": 2, "optimizer": {"lr": 1e-3}}, fp32_config)
    student = minilmv2.export(run_dir, tmp_path / "student")
    settings = {"speed.batches": [1], "speed.lengths": [8], "speed.rounds": 1}
    figures = minilmv2.evaluate([student, tiny_teacher], tmp_path / "figures", ["speed"], settings)
    assert list(figures["speed"]) == [str(student), str(tiny_teacher)]
    with pytest.raises(UserError, match="the line above that begins with `error:` says why"):
        minilmv2.distil(tmp_path / "nothing.yaml", tmp_path / "run", {}, fp32_config)
    with pytest.raises(UserError, match="unknown nothing"):
        minilmv2.evaluate([student], tmp_path / "figures", ["nothing"])
