"""`python -m benchmarks.gpu_check` without its parts: limits, partial results, the report, a machine without a GPU.

tests/e2e/test_gpu_check.py runs every part.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks.gpu_check.figures import Figures, NotHere, read_figures
from benchmarks.gpu_check.parts import BY_NAME, PARTS, with_needed
from benchmarks.gpu_check.processes import TIMED_OUT, Process
from benchmarks.gpu_check.report import Report
from benchmarks.gpu_check.runner import PartResult, run_parts
from benchmarks.gpu_check.setting import Setting
from benchmarks.gpu_check.timing import median_ms, profiled
from tests.conftest import REPO

SLEEPS = "import subprocess, sys, time; print(subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']).pid, flush=True); time.sleep(60)"


def ends(pid: int, within_s: float = 10) -> bool:
    """Whether the process is gone or a zombie: a signal needs a moment to arrive."""
    end = time.monotonic() + within_s
    while time.monotonic() < end:
        try:
            if "\nState:\tZ" in Path(f"/proc/{pid}/status").read_text():
                return True
        except OSError:
            return True
        time.sleep(0.1)
    return False


def test_a_command_beyond_its_limit_ends_with_what_it_started(tmp_path: Path) -> None:
    log = tmp_path / "log"
    ended = Process([sys.executable, "-c", SLEEPS], log).wait(3)
    assert ended.code == TIMED_OUT
    assert ended.seconds < 30
    child = int(log.read_text().splitlines()[-1])
    assert ends(child)


def test_a_part_that_is_ended_ends_the_commands_it_waits_for(tmp_path: Path) -> None:
    """They have sessions of their own, which the end of the part's session does not reach."""
    program = (
        "import sys; from pathlib import Path; from benchmarks.gpu_check.processes import Process, end_all_on_term\n"
        f"end_all_on_term(); Process([sys.executable, '-c', {SLEEPS!r}], Path(sys.argv[1])).wait(60)"
    )
    inner = tmp_path / "inner"
    ended = Process([sys.executable, "-c", program, str(inner)], tmp_path / "outer").wait(4)
    assert ended.code == TIMED_OUT
    child = int(inner.read_text().splitlines()[-1])
    assert ends(child)


def test_rows_are_on_disk_as_they_come_and_say_why_they_are_missing(tmp_path: Path) -> None:
    file = tmp_path / "part.jsonl"
    figures = Figures(file)

    def fail(error: Exception):
        def measure() -> dict:
            raise error

        return measure

    assert figures.attempt("T", {"of": "a"}, lambda: {"ms": 1.5}) == {"of": "a", "ms": 1.5}
    assert [line["row"] for line in read_figures(file)] == [{"of": "a", "ms": 1.5}]
    for error in (
        NotHere("no such key"),
        ModuleNotFoundError("No module named 'triton'", name="triton"),
        torch.OutOfMemoryError("CUDA out of memory"),
        ValueError("wrong\nshape"),
    ):
        assert figures.attempt("T", {"of": "b"}, fail(error)) is None
    notes = [(line["row"]["note"], line["failed"]) for line in read_figures(file)[1:]]
    assert notes == [
        ("no such key", False),
        ("not measured: the package triton is not installed", False),
        ("does not fit into this device's memory", False),
        ("ValueError: wrong shape", True),
    ]
    with open(file, "a") as lines:
        lines.write('{"table": "T", "ro')  # killed in the middle of a write
    assert len(read_figures(file)) == 5


@pytest.mark.timeout(600)
def test_a_part_that_fails_or_has_no_time_is_a_row_and_the_next_one_starts(tmp_path: Path) -> None:
    """`launcher` without its teacher fails; `plan` without the measured step has a reason; the last part has no time."""
    setting, written = Setting(tmp_path, is_tiny=True), []
    began = time.monotonic()
    results = run_parts([BY_NAME["launcher"], BY_NAME["plan"]], setting, 500, lambda r: written.append(len(r)))
    results += run_parts([BY_NAME["machine"]], setting, 1, lambda r: written.append(len(r)))
    states = [result.state for result in results]
    assert states == ["incomplete", "complete", "skipped"], (states, time.monotonic() - began)
    launcher, plan, machine = results
    assert "no shards found" in launcher.figures[0]["row"]["note"]
    assert launcher.figures[0]["failed"]
    assert "the part `step` has measured no step" in plan.figures[0]["row"]["note"]
    assert "no time was left" in machine.reason
    assert set(written) == {1, 2}


def test_the_report_has_every_row_and_every_reason(tmp_path: Path) -> None:
    rows = [
        {
            "table": "Steps",
            "row": {"variant": "a | b", "step ms": 12.3456, "peak GiB": None, "same": True},
            "failed": False,
        },
        {"table": "Steps", "row": {"variant": "c", "note": "NotHere"}, "failed": False},
    ]
    results = [
        PartResult(BY_NAME["step"], "complete", "", 3.0, rows),
        PartResult(BY_NAME["zero"], "timed out", "ended after its limit of 5 s", 5.0),
    ]
    report = Report(tmp_path / "r.md", tmp_path / "r.json", {"device": "CPU"}, is_tiny=True)
    report.write(results)
    text = report.markdown.read_text()
    assert "| a / b | 12.3 | yes |  |" in text
    assert "| c |  |  | NotHere |" in text
    assert "**timed out**: ended after its limit of 5 s" in text
    assert "peak GiB" not in text
    assert "tiny, CPU: no figure" in text
    stored = json.loads(report.json.read_text())
    assert stored["note"] == "tiny, CPU: no figure"
    assert stored["parts"]["step"]["rows"] == rows
    assert "no figure" not in Report(tmp_path / "g.md", tmp_path / "g.json", {"device": "X"}, False).text(results)


def test_a_part_brings_what_it_needs_in_order() -> None:
    assert [part.name for part in with_needed(["plan"])] == ["prepare", "step", "plan"]
    assert with_needed([part.name for part in PARTS]) == list(PARTS)


def test_medians_and_counts_are_those_of_the_action() -> None:
    assert 4 <= median_ms(lambda: time.sleep(0.005), 3, 1) < 50
    numbers = torch.ones(3)
    counts = profiled(lambda: [numbers.sum().item(), float(numbers[0])])
    assert counts["host reads"] == 2
    assert profiled(lambda: numbers + 1)["host reads"] == 0


def test_the_triton_kernel_computes_exponentials() -> None:
    """In Triton's interpreter, which has to be chosen before the kernel is imported."""
    pytest.importorskip("triton")
    program = (
        "import torch; from benchmarks.gpu_check.exponentials import exponentials\n"
        "out = torch.empty(64); exponentials[(4,)](out, ROUNDS=3, BLOCK=16)\n"
        "x = (torch.arange(64) % 7) * -0.1\n"
        "for _ in range(3): x = torch.exp2(-x)\n"
        "torch.testing.assert_close(out, x)"
    )
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", program], cwd=REPO, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
@pytest.mark.parametrize(
    ("words", "says"),
    [([], "sees none here"), (["--tiny", "--parts", "stepp"], "did you mean `step`?")],
    ids=["no GPU", "no such part"],
)
def test_what_cannot_be_measured_ends_in_one_paragraph(words: list[str], says: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.gpu_check", "--output", str(tmp_path / "out"), *words]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=False, env=dict(os.environ))
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert says in done.stderr
    assert not (tmp_path / "out").exists()
