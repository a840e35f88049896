"""Parse every command in README, docs, recipes and docstrings with the program that it names; run the cheap ones.

A renamed verb, option, file, make target or recipe key fails here. The test's name shows the page with the old name.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import data_prep.__main__ as data_prep_command
import pipeline.__main__ as pipeline_command
from data_prep.command_line import CommandLine
from pipeline.__main__ import VERBS, run_verb
from pipeline.config import load_recipe
from tests.conftest import REPO, SAMPLES
from tests.docs.documents import (
    DOCUMENTS,
    FENCE,
    Command,
    commands_in_docstrings,
    commands_in_recipes,
    commands_of,
    relative,
)

ALL = [
    *(command for document in DOCUMENTS for command in commands_of(document)),
    *commands_in_docstrings(),
    *commands_in_recipes(),
]
SBATCH_OPTIONS = {"--nodes", "--exclude", "--signal", "--mem", "--gres", "--time", "--array", "--test-only"}


class Parsed(Exception):
    """Raised after the arguments were parsed, so that the program does not continue."""


class Incomplete(Exception):
    """Raised when required arguments are missing."""

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        super().__init__()
        self.parser = parser


@pytest.fixture
def parse_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """End every program after it has parsed its arguments."""
    real = argparse.ArgumentParser.parse_args

    def error_of(parser: type[argparse.ArgumentParser]) -> Callable[[argparse.ArgumentParser, str], None]:
        real_error = parser.error

        def error(self: argparse.ArgumentParser, message: str) -> None:
            if "arguments are required" in message:
                raise Incomplete(self)
            real_error(self, message)

        return error

    def parse(self: argparse.ArgumentParser, *arguments: object, **keywords: object) -> None:
        real(self, *arguments, **keywords)  # type: ignore[call-overload]
        raise Parsed

    for parser in (argparse.ArgumentParser, CommandLine):
        monkeypatch.setattr(parser, "error", error_of(parser))
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse)
    monkeypatch.chdir(REPO)


def run_program(words: list[str], complete: bool, start: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> None:
    """Run `start` with `words` as `sys.argv`. Only a complete command must have all required arguments."""
    monkeypatch.setattr(sys, "argv", words)
    code: object = 0
    incomplete = None
    try:
        start()
    except Parsed:
        return
    except Incomplete as found:
        incomplete = found
    except SystemExit as ended:
        code = ended.code
    assert code in (0, None), f"the program rejects {words}"
    if incomplete is not None:
        assert not complete, f"{words} lacks required arguments"
        options = {word.split("=")[0] for word in words if word.startswith("--")}
        assert options <= set(incomplete.parser._option_string_actions), f"the program rejects {words}"


def check_python(command: Command, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    if words[:2] == ["-m", "pipeline"]:
        verb, *rest = words[2:]
        assert verb in VERBS, f"no verb {verb}"
        module = importlib.import_module(VERBS[verb])
        monkeypatch.setattr(module, "run", lambda arguments: None)
        run_program([verb, *rest], command.complete, lambda: run_verb(verb, module, rest), monkeypatch)
    elif words[:2] == ["-m", "data_prep"]:
        assert words[2] in ("prepare", "merge", "verify", "stats", "trim-vocab"), f"no verb {words[2]}"
        run_program(words[1:], command.complete, lambda: data_prep_command.main(words[2:]), monkeypatch)
    elif words[:2] == ["-m", "demo"]:
        start = lambda: importlib.import_module("demo.__main__").main()  # noqa: E731
        run_program(words[1:], command.complete, start, monkeypatch)
    elif words[0] == "-m":
        assert words[1] in ("pip", "pytest", "notebook") or importlib.util.find_spec(words[1]), f"no module {words[1]}"
    elif words[0] == "pipeline/train.py":
        check_training(command, words, monkeypatch)
    elif words[0].startswith("examples/"):
        check_example(words)
    else:
        assert (REPO / words[0]).is_file(), f"no file {words[0]}"
        run_program(
            words, command.complete, lambda: runpy.run_path(str(REPO / words[0]), run_name="__main__"), monkeypatch
        )


def check_example(words: list[str]) -> None:
    """The file exists, and the Trainer's knows the options."""
    assert (REPO / words[0]).is_file(), f"no file {words[0]}"
    options = {word for word in words if word.startswith("--")}
    if options:
        from examples.with_trainer import Distillation, HfArgumentParser, TrainingArguments

        assert options <= set(HfArgumentParser((Distillation, TrainingArguments))._option_string_actions)


def check_training(command: Command, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Parse the options with the program's parser, and the recipe and its overrides with the recipe's."""
    from pipeline.train import main

    if words[1:]:
        run_program(words, command.complete, main, monkeypatch)
    values = dict(itertools.pairwise(words))
    recipe = values.get("--recipe", "recipes/quickstart.yaml")
    overrides = [value for option, value in itertools.pairwise(words) if option == "--set"]
    if recipe.startswith("recipes/"):
        load_recipe(REPO / recipe, [override for override in overrides if override != "a.b=c"])


def check_launched(command: Command, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """`deepspeed` or `torchrun`: parse the launcher's options with its parser, the rest with the program's."""
    scripts = [number for number, word in enumerate(words) if word in ("pipeline/train.py", "examples/with_trainer.py")]
    if not scripts:
        assert not command.complete
        return
    script = scripts[0]
    if words[0] == "deepspeed":
        from deepspeed.launcher.runner import parse_args as parse_launch

        run_program(words[1:], True, lambda: parse_launch(words[1:]), monkeypatch)
    else:
        from torch.distributed.run import get_args_parser

        run_program(words[1:], True, lambda: get_args_parser().parse_args(words[1:]), monkeypatch)
    if words[script].startswith("examples/"):
        return check_example(words[script:])
    check_training(command, words[script:], monkeypatch)


def check_script(command: Command, words: list[str], is_batch: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A script in slurm/ exists and reads these options. Further options of a training go to training's parser."""
    scripts = [number for number, word in enumerate(words) if word.endswith(".sh")]
    if not scripts:
        assert is_batch
        return
    number = scripts[0]
    text = (REPO / words[number]).read_text(encoding="utf-8")
    for option in (word.split("=")[0] for word in words[:number] if word.startswith("--")):
        assert option in SBATCH_OPTIONS, f"sbatch {option}: if Slurm has it, add it to SBATCH_OPTIONS"
    arguments = words[number + 1 :]
    if words[number].endswith("distill_xlmr.sh"):
        if len(arguments) > 3:
            check_training(command, ["pipeline/train.py", "--deepspeed", arguments[1], *arguments[3:]], monkeypatch)
        return
    for option in (word.split("=")[0] for word in arguments if word.startswith("--")):
        assert option in text, f"{words[number]} does not know {option}"


@pytest.mark.usefixtures("parse_only")
@pytest.mark.parametrize("command", ALL, ids=lambda command: f"{command.where}: {command.text[:60]}")
def test_command_parses(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    words = command.words
    while re.match(r"[A-Z_]+=", words[0]):
        words = words[1:]  # environment
    program = words[0].removeprefix(".venv/bin/")
    if program.startswith("python"):
        check_python(command, words[1:], monkeypatch)
    elif program in ("deepspeed", "torchrun"):
        check_launched(command, words, monkeypatch)
    elif program == "make":
        done = subprocess.run(["make", "--dry-run", *words[1:]], cwd=REPO, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    elif program == "sbatch" or program.startswith("slurm/"):
        check_script(command, words, program == "sbatch", monkeypatch)
    elif program == "pip":
        for name in (word for word in words if word.endswith(".txt")):
            assert (REPO / name).is_file()
    else:
        assert program in ("hf", "srun", "tensorboard", "pre-commit"), f"no check knows {program}"


def test_readme_commands_prepare_text(tiny_tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run README's commands from text to shards unchanged, on two small files in place of CC-100."""
    (tmp_path / "data" / "cc100").mkdir(parents=True)
    for language in ("hi", "sw"):
        shutil.copy(SAMPLES / "cc100" / f"{language}.txt.xz", tmp_path / "data" / "cc100")
    shutil.copytree(tiny_tokenizer, tmp_path / "artifacts" / "xlmr_large")
    monkeypatch.chdir(tmp_path)
    ours = re.compile(r"python -m data_prep (prepare|verify|stats) .*data/cc100")
    verbs = []
    for command in (each for each in commands_of(REPO / "README.md") if ours.match(each.text)):
        assert data_prep_command.main(command.words[3:]) == 0
        verbs.append(command.words[3])
    assert verbs == ["prepare", "verify", "stats"]


def test_the_plan_of_a_family_in_the_documents_is_what_its_command_prints(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Words exactly, figures within 2 %: versions of torch differ in a few operations."""
    document = REPO / "docs" / "planning.md"
    (command,) = (each for each in commands_of(document) if each.complete and "family" in each.text)
    text = document.read_text(encoding="utf-8").partition(command.text)[2]
    shown = FENCE.findall(text.partition("```")[2])[0][2].splitlines()
    monkeypatch.chdir(REPO)
    pipeline_command.main(command.words[3:])
    printed = capsys.readouterr().out.splitlines()
    number = re.compile(r"\d+(?:\.\d+)?")
    for line in shown:
        alike = [other for other in printed if number.sub("#", other).split() == number.sub("#", line).split()]
        figures = [float(figure) for figure in number.findall(line)]
        close = pytest.approx(figures, rel=0.02, abs=0.011)
        assert any([float(figure) for figure in number.findall(other)] == close for other in alike), line


@pytest.mark.parametrize("document", DOCUMENTS, ids=relative)
def test_python_in_documents_compiles(document: Path) -> None:
    for block in FENCE.finditer(document.read_text(encoding="utf-8")):
        if block["language"] == "python":
            source = re.sub(rf"^{block['indent']}", "", block["body"], flags=re.MULTILINE)
            is_entry = re.match(r'"[\w-]+": ', source)  # an entry of a table, as in CONTRIBUTING
            compile("{" + source + "}" if is_entry else source, str(document), "exec")


def test_unknown_names_are_rejected(parse_only: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Test of the check itself: commands with unknown verbs, options, keys or targets fail it."""
    for text in (
        "python -m pipeline evaluate MODEL --taks speed --output DIR",
        "python -m data_prep prepare --input A --tokenizer B --outptu C",
        "deepspeed pipeline/train.py --deepspeed ds_configs/zero2.json --recipes recipes/quickstart.yaml",
        "deepspeed pipeline/train.py --deepspeed ds_configs/zero2.json --set students.layers=3",
        "sbatch slurm/evaluate.sh --outptu DIR",
        "python benchmarks/bench_step.py --quik",
        "make tset",
    ):
        with pytest.raises((AssertionError, ValueError)):
            test_command_parses(Command("nowhere", text, complete=True), monkeypatch)
