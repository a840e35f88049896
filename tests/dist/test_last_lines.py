"""Every command ends with what it wrote and the next command. The printed commands are run as they are printed."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from data_prep.__main__ import VERBS as DATA_VERBS
from data_prep.__main__ import main as data_main
from pipeline.__main__ import VERBS
from pipeline.__main__ import main as pipeline_main
from tests.conftest import SAMPLES
from tests.dist.training_process import TrainingProcess

MAINS: dict[str, Callable[[list[str]], object]] = {"data_prep": data_main, "pipeline": pipeline_main}
NOTHING_WRITTEN = {"verify", "stats", "recipes", "doctor"}  # stats without --plot


class Commands:
    """Runs commands in this process, and remembers which verbs ended as they should."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys, self.checked = capsys, set(NOTHING_WRITTEN)

    def run(self, package: str, verb: str, *words: object) -> str | None:
        """Run it, check that the files of its last lines exist, and return the next command if it names one."""
        self._capsys.readouterr()
        assert not MAINS[package]([verb, *map(str, words)])
        self.checked.add(verb)
        return ended(self._capsys.readouterr().out)

    def run_next(self, command: str | None, *more: object) -> str | None:
        assert command
        words = shlex.split(command)
        package, verb, *rest = words[words.index("-m") + 1 :]
        if verb != "verify":
            return self.run(package, verb, *rest, *more)
        assert MAINS[package]([verb, *rest]) == 0
        return None


def ended(printed: str) -> str | None:
    """The command of the line `next:`; the line before it, or else the last one, names files that exist."""
    *_, line, last = ["", *printed.splitlines()]
    written = line if last.startswith("next: ") else last
    assert written.startswith("written: "), printed
    files = written.removeprefix("written: ").partition(" (")[0].split(", ")
    assert all(Path(file).exists() for file in files), written
    return last.removeprefix("next: ") if last.startswith("next: ") else None


@pytest.fixture
def commands(capsys: pytest.CaptureFixture[str], no_launcher: pytest.MonkeyPatch) -> Commands:
    return Commands(capsys)


def test_the_last_lines_of_every_verb(
    commands: Commands,
    training: TrainingProcess,
    tiny_recipe: Path,
    tiny_teacher: Path,
    tiny_shards: Path,
    fp32_config: Path,
    tmp_path: Path,
) -> None:
    text, own = SAMPLES / "cc100" / "sw.txt.xz", tmp_path / "shards"
    commands.run_next(
        commands.run("data_prep", "prepare", "--input", text, "--tokenizer", tiny_teacher, "--output", own)
    )
    commands.run_next(commands.run("data_prep", "merge", own))
    commands.run("data_prep", "stats", own, "--plot", tmp_path / "plot.png")
    vocabulary = ("--vocabulary", tmp_path / "vocabulary")
    of_shards = ("--shards", tiny_shards, "--output", vocabulary[1])
    commands.run("data_prep", "trim-vocab", "--tokenizer", tiny_teacher, *of_shards)

    run_dir = tmp_path / "run"
    run = training.run("--deepspeed", fp32_config, "--recipe", tiny_recipe, "--run-dir", run_dir, "--set", "steps=2")
    assert run.code == 0, run.err
    evaluates = commands.run_next(ended(run.out))
    few = [word for key in ("languages=[sw]", "max_pairs=4", "max_length=60") for word in ("--set", f"retrieval.{key}")]
    commands.run_next(evaluates, "--tasks", "retrieval", *few)
    commands.run("pipeline", "card", run_dir / "student")
    commands.run("pipeline", "trim", run_dir / "student", *vocabulary, "--output", tmp_path / "trimmed")
    commands.run("pipeline", "report", run_dir)
    chosen = tmp_path / "chosen.yaml"
    then = commands.run("pipeline", "compare", run_dir, "--json", tmp_path / "c.json", "--write", chosen)
    assert then
    assert then.endswith(f"pipeline/train.py --deepspeed ds_configs/zero2.json --recipe {chosen}")
    plan = ("--recipe", "recipes/xlmr_base_l6_h384.yaml", "--deepspeed", "ds_configs/zero2.json", "--gpu", "h100-80")
    commands.run("pipeline", "plan", *plan, "--json", tmp_path / "plan.json", "--plot", tmp_path / "plan.png")
    assert commands.checked == {*DATA_VERBS, *VERBS}


def test_a_training_prints_its_first_and_last_step_and_what_is_next(
    training: TrainingProcess, tiny_recipe: Path, fp32_config: Path, tmp_path: Path
) -> None:
    """Twelve log points in less than 30 s. A second start has nothing to do and ends in the same way."""
    words = ["--deepspeed", fp32_config, "--recipe", tiny_recipe, "--run-dir", tmp_path / "run"]
    first, second = training.run(*words), training.run(*words)
    steps = [line.split("  ")[0] for line in first.out.splitlines() if line.startswith("step ") and "lr" in line]
    assert steps == ["step 1 of 12", "step 12 of 12"]
    assert ended(first.out) == ended(second.out)
    assert f"export {tmp_path / 'run'} --output {tmp_path / 'run' / 'student'}" in str(ended(first.out))
