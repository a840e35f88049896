"""Errors that reach a command line: those of the machine or of a file are one paragraph, a bug keeps its traceback."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_prep.__main__ import main as data_prep
from data_prep.command_line import EXIT_INTERRUPTED, EXIT_USER
from data_prep.shards import DataError
from pipeline.__main__ import main as pipeline
from pipeline.config import Recipe, load_recipe
from pipeline.errors import EXIT_BUG, EXIT_DONE, UserError, exit_code_of
from pipeline.runtime.dist import read_launch
from pipeline.runtime.stop import StopRequests
from tests.conftest import REPO
from tests.unit.made_up_run import make_run


def raising(error: BaseException) -> Callable[[], None]:
    def main() -> None:
        raise error

    return main


def nested() -> None:
    json.loads("[" * 100_000)


CAUGHT = [
    (raising(OSError(errno.EACCES, "Permission denied", "/data/x")), "/data/x: Permission denied"),
    (raising(OSError(errno.ENOSPC, "No space left on device")), "No space left"),
    (raising(FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/x']")), "No usable temporary directory"),
    (raising(OSError("a library's own words\nin two lines")), "a library's own words in two lines"),
    (raising(MemoryError()), "Memory ran out"),
    (raising(RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 9 bytes")), "Memory ran out"),
    (nested, "nested too deeply"),
    (lambda: b"ab\xff".decode(), "not utf-8 text: byte 2"),
]  # fmt: skip


@pytest.mark.parametrize(("main", "words"), CAUGHT)
def test_one_paragraph_and_exit_code_2(main: Callable[[], Any], words: str, capsys: pytest.CaptureFixture) -> None:
    assert exit_code_of(main) == EXIT_USER
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert words in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    "bug", [ValueError("x"), TypeError("x"), KeyError("x"), OSError(errno.EBADF, "Bad descriptor")]
)
def test_a_bug_keeps_its_traceback(bug: Exception) -> None:
    with pytest.raises(type(bug)):
        exit_code_of(raising(bug))


BLOCKED_SHUTDOWN = """
import atexit, threading, time
from pipeline.errors import UserError, run_to_exit
atexit.register(time.sleep, 600)
threading.Thread(target=time.sleep, args=[600]).start()
def main():
    print("output of main", end="")
    {last}
run_to_exit(main)
"""


@pytest.mark.parametrize(
    ("last", "code", "words"),
    [
        ("return", 0, ""),
        ("raise UserError('yours')", EXIT_USER, "error: yours"),
        ("raise KeyboardInterrupt", EXIT_INTERRUPTED, "Stopped."),
        ("return [][0]", EXIT_BUG, "Traceback"),
    ],
)
def test_a_process_ends_although_the_interpreter_could_not(last: str, code: int, words: str) -> None:
    """As where a process group waits for ranks that wait for this one."""
    script = BLOCKED_SHUTDOWN.format(last=last)
    done = subprocess.run([sys.executable, "-c", script], cwd=REPO, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (code, "output of main")
    assert words in done.stderr


def test_an_interruption_is_no_traceback() -> None:
    assert exit_code_of(raising(KeyboardInterrupt())) == EXIT_INTERRUPTED


@pytest.mark.parametrize("words", ["pipeline recipes", "data_prep --help"])
def test_a_closed_pipe_is_no_traceback(words: str) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run([sys.executable, "-m", *words.split()], cwd=REPO, stdout=writing, stderr=subprocess.PIPE)
    os.close(writing)
    assert b"Traceback" not in done.stderr
    assert b"Exception ignored" not in done.stderr


BAD_NUMBERS = [
    "max_epochs=.inf", "max_epochs=.nan", "guard.hang_timeout_s=.inf", "guard.slow_timeout_s=1e10", "seed=-1",
    "optimizer.lr=.nan", "optimizer.lr=1e9", "optimizer.eps=1e-50", "student.dropout=2", "student.dropout=-0.1",
    "student.ffn=-1", "student.ffn=0", "guard.spike_window=100000000000000000000", "language_weights={hi: 1e308, sw: 1e308}",
    "language_weights={hi: -1}", "global_batch=1000000007", "student.hidden=1000000007", "student.layers=100000",
    "seq_len=1000000000", "steps=10000000000000000", "relations.tail_weight=1e300",
    "relations.heads=1000000007", "micro_batch_per_gpu=1000000007", "save_every=100000000000000000000", "teacher=\"a\\0b\"",
]  # fmt: skip


@pytest.mark.parametrize("override", BAD_NUMBERS)
def test_absurd_numbers_are_rejected_with_their_key(override: str, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("steps: 3\n")
    with pytest.raises(UserError) as error:
        load_recipe(tmp_path / "recipe.yaml", [override])
    assert override.partition("=")[0].partition(".")[2].split("[")[0] in str(error.value)
    assert len(str(error.value)) < 1000


def test_infinity_is_accepted_where_it_means_no_limit(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("optimizer: {gradient_clipping: .inf}\nguard: {spike_sigmas: .inf}\n")
    recipe: Recipe = load_recipe(tmp_path / "recipe.yaml", [])
    assert recipe.optimizer.gradient_clipping == 0.0
    assert recipe.guard.spike_sigmas == float("inf")


ENVIRONMENTS = [
    ({"RANK": "²"}, "RANK"),
    ({"RANK": "2", "WORLD_SIZE": "2"}, "below WORLD_SIZE"),
    ({"WORLD_SIZE": "9" * 30}, "WORLD_SIZE"),
    ({"WORLD_SIZE": "2", "MASTER_PORT": "70000"}, "MASTER_PORT"),
    ({"SLURM_STEP_NUM_TASKS": "two"}, "SLURM_STEP_NUM_TASKS"),
    ({"SLURM_STEP_NUM_TASKS": "2"}, "SLURM_PROCID"),
]


@pytest.mark.parametrize(("variables", "words"), ENVIRONMENTS)
def test_an_invalid_launcher_variable(variables: dict[str, str], words: str, no_launcher: pytest.MonkeyPatch) -> None:
    no_launcher.setenv("MASTER_PORT", "29500")
    for name, value in variables.items():
        no_launcher.setenv(name, value)
    with pytest.raises(UserError, match=words):
        read_launch()


def test_an_invalid_end_of_the_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_END_TIME", "tomorrow")
    with pytest.raises(UserError, match="SLURM_JOB_END_TIME is 'tomorrow'"):
        StopRequests(tmp_path / "STOP", 1.0)


@pytest.mark.parametrize("options", [["--workers", "1000000000"], ["--workers", "-1"], ["--shard-tokens", "9" * 30],
                                     ["--block-bytes", "9" * 15], ["--min-document-chars", "-1"],
                                     ["--min-document-chars", "9", "--max-document-chars", "3"]])  # fmt: skip
def test_prepare_rejects_absurd_numbers(options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    command = ["prepare", "--input", str(tmp_path), "--tokenizer", str(tmp_path), "--output", str(tmp_path / "out")]
    assert data_prep([*command, *options]) == EXIT_USER
    assert options[0] in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def report(run_dir: Path) -> int:
    return exit_code_of(lambda: pipeline(["report", str(run_dir)]))


def test_the_report_rejects_a_recipe_of_nested_aliases(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run_dir = make_run(tmp_path / "run")
    row = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n"
    rows = [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 9)]
    (run_dir / "recipe.yaml").write_text(row + "".join(rows) + "relations: *a8\n")
    assert report(run_dir) == EXIT_USER
    assert "recipe.yaml" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["run.json", "restarts.json", "lives.json", "metrics.jsonl", "retrieval/after.json"])
@pytest.mark.parametrize("content", ["[" * 100_000 + "}", "7}", '{"step": "x", "time_s": []}', '"\\ud800"}', "[7]"])
def test_the_report_names_the_file_that_it_cannot_read(
    name: str, content: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    run_dir = make_run(tmp_path / "run")
    if name == "lives.json":  # read only where its present name does not exist
        (run_dir / "restarts.json").unlink()
    (run_dir / name).write_text(content)
    code = report(run_dir)
    error = capsys.readouterr().err
    assert code in (EXIT_DONE, EXIT_USER)
    assert code == EXIT_DONE or name in error


def test_a_run_directory_that_cannot_be_made_is_named(tmp_path: Path, tiny_recipe: Path, fp32_config: Path) -> None:
    (tmp_path / "file").write_text("x")
    run_dir = tmp_path / "file" / "run"
    command = ["pipeline/train.py", "--deepspeed", str(fp32_config), "--recipe", str(tiny_recipe)]
    done = subprocess.run(
        [sys.executable, *command, "--run-dir", str(run_dir)], cwd=REPO, capture_output=True, text=True
    )
    assert done.returncode == EXIT_USER
    assert f"the run directory {run_dir} cannot be written to" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("kind", [UserError, DataError])
def test_a_long_message_keeps_its_beginning_and_its_end(kind: type[ValueError]) -> None:
    """A message contains values of the user's files, which may be of any length."""
    value = "x" * 100_000
    shown = str(kind(f"run.yaml: `{value}` is no key; to fix it: rm run.yaml"))
    assert shown.startswith("run.yaml: `xxx")
    assert shown.endswith("x` is no key; to fix it: rm run.yaml")
    assert len(shown) < 4100
    assert str(kind("short")) == "short"
