"""Real processes that begin one output directory at the same time, as the tasks of a Slurm array do."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_prep.__main__ import main
from data_prep.journal import Journal
from data_prep.shards import ShardSet
from data_prep.verify import verify
from tests.conftest import REPO, SAMPLES

ROUNDS = 60
BEGIN = """
import sys
from pathlib import Path
from data_prep.shard_layout import FORMAT_NAME, FORMAT_VERSION
from data_prep.manifest import begin_output
from data_prep.shards import DataError
about = {"format": FORMAT_NAME, "version": FORMAT_VERSION, "tokenizer": {}, "options": {}}
print("ready", flush=True)
for output in sys.stdin:
    try:
        begin_output(Path(output.rstrip()), about, sys.argv[1].split(","), sys.argv[2] == "add")
        print("began", flush=True)
    except DataError as error:
        print(error, flush=True)
"""


class Beginner:
    """A process that begins an output directory on each request."""

    def __init__(self, languages: str, add: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", BEGIN, languages, add],
            cwd=REPO,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )
        assert self.answer() == "ready"

    def begin(self, output: Path) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{output}\n")

    def answer(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().rstrip()


def begin_together(tmp_path: Path, one: str, other: str, add: str = "") -> Iterator[tuple[list[str], Path]]:
    """The answers of two processes that begin the same directory simultaneously, and the directory."""
    beginners = [Beginner(one, add), Beginner(other, add)]
    try:
        for number in range(ROUNDS):
            output = tmp_path / str(number)
            for beginner in beginners:
                beginner.begin(output)
            yield [beginner.answer() for beginner in beginners], output
    finally:
        for beginner in beginners:
            beginner.process.communicate()


def test_two_processes_may_begin_the_same_languages(tmp_path: Path) -> None:
    for answers, output in begin_together(tmp_path, "hi,sw", "hi,sw"):
        assert answers == ["began", "began"]
        assert [path.name for path in output.iterdir()] == ["prepare.json"]


def test_the_second_process_must_not_begin_other_languages(tmp_path: Path) -> None:
    for answers, output in begin_together(tmp_path, "hi", "sw"):
        begun = json.loads((output / "prepare.json").read_text())["languages"]
        rejected = "sw" if begun == ["hi"] else "hi"
        answer = answers[1 if rejected == "sw" else 0]
        assert sorted(answers) == sorted(["began", answer])
        assert f"begun with {begun[0]}; the input now also has {rejected}" in answer
        assert "merge" in answer


def test_languages_added_simultaneously_are_all_kept(tmp_path: Path) -> None:
    for answers, output in begin_together(tmp_path, "hi", "sw", "add"):
        assert answers == ["began", "began"]
        assert json.loads((output / "prepare.json").read_text())["languages"] == ["hi", "sw"]


def test_two_tasks_of_an_array_finish_one_directory(
    tiny_tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output, inputs = tmp_path / "shards", [str(SAMPLES / "cc100" / f"{name}.txt.xz") for name in ("hi", "sw")]
    command = [sys.executable, "-m", "data_prep", "prepare", "--input", *inputs, "--workers", "1"]
    command += ["--tokenizer", str(tiny_tokenizer), "--output", str(output), "--language"]
    tasks = [
        subprocess.Popen([*command, name], cwd=REPO, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for name in ("hi", "sw")
    ]
    for task in tasks:
        _, errors = task.communicate(timeout=120)
        assert task.returncode == 0, errors
    with Journal(output / "hi").locked():  # as a running preparation holds it
        assert main([*command[3:], "hi", "--redo", "hi"]) == 2
    assert f"Another run is preparing {output / 'hi'}" in capsys.readouterr().err
    assert ShardSet(output).languages == ["hi", "sw"]
    assert verify(output) == []
