"""Measure this pipeline on one GPU, in at most ten minutes.

    python -m benchmarks.gpu_check [--parts a,b] [--budget SECONDS] [--output DIR]          (make gpu)

Prints tables and stores them as DIR/DATE-gpu-NAME.md and .json. What is measured: benchmarks/gpu_check/__init__.py.
Exit code: 0 if every part is complete, 1 if one failed or ran out of time, 2 without a GPU.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import sys
import tempfile
from datetime import date
from pathlib import Path

import torch

from benchmarks.gpu_check.parts import PARTS, with_needed
from benchmarks.gpu_check.processes import end_all_on_term
from benchmarks.gpu_check.report import Report
from benchmarks.gpu_check.runner import run_parts
from benchmarks.gpu_check.setting import Setting
from benchmarks.measure import REPO, commit, machine
from data_prep.command_line import CommandLine
from data_prep.outputs import output_path
from pipeline.errors import UserError, did_you_mean, exit_code_of
from pipeline.runtime.allotment import why_unseen

NAMES = [part.name for part in PARTS]
BUDGET_S, TINY_BUDGET_S = 570.0, 1200.0
RESULTS, TINY_RESULTS = REPO / "benchmarks" / "results", REPO / "artifacts" / "gpu_check"
EXIT_INCOMPLETE = 1


def main() -> int:
    parser = CommandLine(prog="python -m benchmarks.gpu_check", description=__doc__)
    parser.add_argument("--parts", default=",".join(NAMES), help=f"some of {','.join(NAMES)} (default: all)")
    parser.add_argument("--budget", type=float, metavar="SECONDS", help=f"for all parts (default: {BUDGET_S:.0f})")
    parser.add_argument("--output", type=output_path, metavar="DIR", help="of the report (default: benchmarks/results)")
    parser.add_argument("--work", type=output_path, metavar="DIR", help="keep logs and runs in this empty directory")
    parser.add_argument("--commit", default=commit(), help="of this code, where there is no checkout")
    parser.add_argument(
        "--tiny", action="store_true", help="small shapes on a CPU: shows that the check runs, no figure"
    )
    options = parser.parse_args()
    names = options.parts.split(",")
    for name in names:
        if name not in NAMES:
            raise UserError(f"--parts names {name!r}; {did_you_mean(name, NAMES)}")
    if not options.tiny:
        use_one_gpu()
        check_gpu()
    end_all_on_term()
    output = options.output or (TINY_RESULTS if options.tiny else RESULTS)
    output.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        work = options.work or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="gpu-check-")))
        make_empty(work)
        setting = Setting(work.resolve(), options.tiny)
        report = report_of(options.tiny, output, options.commit)
        budget_s = options.budget or (TINY_BUDGET_S if options.tiny else BUDGET_S)
        results = run_parts(with_needed(names), setting, budget_s, report.write)
    print(report.text(results))
    print(f"stored: {report.markdown} and {report.json}")
    return 0 if all(result.is_good for result in results) else EXIT_INCOMPLETE


def use_one_gpu() -> None:
    """Show torch and all parts the first GPU alone: DeepSpeed's launcher would start a rank on each."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    os.environ["CUDA_VISIBLE_DEVICES"] = "0" if visible is None else visible.split(",")[0]


def check_gpu() -> None:
    """Raise a `UserError` unless torch can compute on a GPU."""
    advice = "`python -m benchmarks.gpu_check --tiny` runs the same code on a CPU, on small shapes and without figures"
    if not torch.cuda.is_available():
        raise UserError(
            f"this check measures an NVIDIA GPU, and torch {torch.__version__} sees none here: {why_unseen()}. {advice}"
        )
    try:
        torch.ones(1, device="cuda").sum().item()
    except RuntimeError as error:
        first_line = str(error).splitlines()[0]
        raise UserError(f"the GPU that torch finds cannot be used ({first_line}); see `nvidia-smi`. {advice}") from None


def make_empty(work: Path) -> None:
    """Make the directory. Raises a `UserError` where it has files: figures of an earlier check would count as new."""
    work.mkdir(parents=True, exist_ok=True)
    if any(work.iterdir()):
        raise UserError(f"--work {work} is not empty; name a new directory")


def report_of(is_tiny: bool, output: Path, commit_name: str) -> Report:
    """The report's files and first lines."""
    today = date.today().isoformat()
    device = "CPU" if is_tiny else torch.cuda.get_device_name(0)
    name = "tiny" if is_tiny else re.sub(r"[^a-z0-9]+", "-", device.lower().replace("nvidia", "")).strip("-")
    words = [word.removeprefix(f"{REPO}/") for word in sys.argv[1:]]
    about = {
        "device": device,
        "date": today,
        "commit": commit_name,
        "machine": machine(),
        "command": shlex.join(["python", "-m", "benchmarks.gpu_check", *words]),
    }
    return Report(output / f"{today}-gpu-{name}.md", output / f"{today}-gpu-{name}.json", about, is_tiny)


if __name__ == "__main__":
    code = 0

    def keep_code() -> None:
        global code
        code = main()

    sys.exit(exit_code_of(keep_code) or code)
