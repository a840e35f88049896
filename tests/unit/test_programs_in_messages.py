"""Programs and packages in printed commands: they are found without an activated environment, and have pyproject's versions."""

from __future__ import annotations

import ast
import re
import shlex
import shutil
import socket
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from data_prep.command_line import PROGRAM, installed_program, module_command, program_command
from pipeline.doctor.recipe import model_finding
from pipeline.errors import UserError
from pipeline.export.onnx import REQUIREMENTS
from pipeline.installed import training_command
from pipeline.runtime import dist
from pipeline.runtime.checkpoint import read_model_weights
from pipeline.runtime.loggers import LOGGERS, problem_of
from pipeline.training.how_to_prepare import how_to_prepare
from tests.conftest import REPO
from tests.unit.test_commands_in_messages import calls_of_module_command, texts, trees

PROJECT = tomllib.loads((REPO / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
KNOWN = {
    r.name: r for r in map(Requirement, [*PROJECT["dependencies"], *(line for e in EXTRAS.values() for line in e)])
}


@pytest.fixture
def not_activated(monkeypatch: pytest.MonkeyPatch) -> None:
    """PATH without this Python, whose programs a reader's shell then does not find."""
    beside = str(Path(sys.executable).parent)
    monkeypatch.setenv("PATH", ":".join(part for part in ("/usr/bin", "/bin") if part != beside))
    assert shutil.which("deepspeed") is None
    monkeypatch.chdir(REPO)


def is_found(command: str) -> bool:
    """Whether a shell finds the program of a command."""
    word = shlex.split(command)[0]
    return subprocess.run(["/bin/bash", "-c", f"command -v {shlex.quote(word)}"], capture_output=True).returncode == 0


@pytest.mark.usefixtures("not_activated")
def test_programs_of_this_python_are_found(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no checkpoint") as error:
        read_model_weights(tmp_path / "my run")
    commands = [
        re.findall(r"Train first: (.*?)   \(", str(error.value))[0],
        training_command(),
        how_to_prepare("some/model", "my shards").removeprefix("Make them: "),
        model_finding("teacher", "nobody/no-such-model").fix.partition("network: ")[2],
        module_command("pip", "install", "x"),
    ]
    assert [command for command in commands if not is_found(command)] == []


def test_a_program_of_another_python_is_not_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "hf").symlink_to("/bin/false")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert Path(shlex.split(program_command("hf"))[0]).resolve() == Path(installed_program("hf")).resolve()
    monkeypatch.setenv("PATH", str(Path(installed_program("hf")).parent))
    assert program_command("hf") == "hf"
    assert program_command("no-such-program") == "no-such-program"


def test_the_training_that_is_missing_is_accepted_by_the_programs(tmp_path: Path) -> None:
    """DeepSpeed's launcher and training parse the words; the options of training reach it."""
    from deepspeed.launcher.runner import parse_args

    with pytest.raises(UserError) as error:
        read_model_weights(tmp_path / "my run")
    _, *words = shlex.split(re.findall(r"Train first: (.*?)   \(", str(error.value))[0])
    launched = parse_args(words)
    assert (REPO / launched.user_script).is_file()
    assert launched.user_args[-2:] == ["--run-dir", str(tmp_path / "my run")]
    done = subprocess.run(
        [sys.executable, launched.user_script, *launched.user_args, "--version"], cwd=REPO, capture_output=True
    )
    assert done.returncode == 0, done.stderr


def test_the_free_port_of_a_message_is_free() -> None:
    with socket.socket() as probe:
        probe.bind(("", dist.free_port()))


def words_of_pip() -> Iterator[tuple[str, str]]:
    """(file:line, requirement) of every `pip install` that the code prints."""
    for place, words in calls_of_module_command():
        if words[:2] == ["pip", "install"]:
            yield from ((place, word) for word in words[2:])


def test_packages_have_the_versions_of_the_project() -> None:
    named = list(words_of_pip())
    assert len(named) > 5
    for place, word in named:
        if word == "-r" or word.endswith(".txt"):
            assert word == "-r" or (REPO / word).is_file(), place
            continue
        assert str(Requirement(word)) == str(KNOWN[Requirement(word).name]), place
    assert sorted(map(str, map(Requirement, REQUIREMENTS))) == sorted(str(Requirement(line)) for line in EXTRAS["onnx"])


def test_loggers_are_packages_that_are_tested() -> None:
    pins = (REPO / "requirements-loggers.txt").read_text(encoding="utf-8")
    for name in LOGGERS:
        assert re.search(rf"^{name}\b", pins, re.MULTILINE)
        if problem := problem_of([name]):
            command = shlex.split(problem.partition("Install it: ")[2])
            assert command[-4:] == ["-m", "pip", "install", name]


def test_pip_and_python_are_named_by_module_command_alone() -> None:
    """`pip` in a shell may be another Python's."""
    documented = {
        ast.get_docstring(node, clean=False)
        for _, tree in trees()
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
    }
    helps = {"pipeline/recipe_reference.py", "data_prep/command_line.py"}
    found = [
        place
        for place, text in texts()
        if re.search(r"\bpip install\b", text) and text not in documented and place.partition(":")[0] not in helps
    ]
    lists = [
        f"{name}:{node.lineno}"
        for name, tree in trees()
        for node in ast.walk(tree)
        if isinstance(node, ast.List | ast.Tuple | ast.Call)
        for words in [node.args if isinstance(node, ast.Call) else node.elts]
        if [getattr(word, "value", None) for word in words[:2]] == ["python", "-m"]
    ]
    assert (found, lists) == ([], [])


def test_the_program_of_a_wheel_is_named_once() -> None:
    """`minilmv2 train` is a command of the wheel; a checkout has pipeline/train.py."""
    assert PROGRAM not in training_command()
