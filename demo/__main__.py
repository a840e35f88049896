"""Run the complete pipeline on real input: teacher, shards, distillation, export, evaluation, one table of before and after.

    python -m demo                                  (make demo)
    python -m demo --set steps=400                  (make demo SET="steps=400")

Each stage is a command that is printed before it runs and can also be run separately. Finished stages are skipped, so
after an interruption the same command continues where it stopped. The student and `demo.json` are in the run directory.
"""

from __future__ import annotations

import json
import shlex
import socket
import subprocess
import sys
import time
from pathlib import Path

from transformers.utils import logging

from data_prep.command_line import (
    VERBOSE_HELP,
    CommandLine,
    end_lines,
    is_verbose,
    module_command,
    quiet_launcher,
)
from data_prep.durable_files import replace_file
from demo.compare import compare
from demo.settings import QUICKSTART, retrieval_settings, training_overrides
from demo.teacher import DEFAULT_OUTPUT, make_teacher
from pipeline.config import Recipe, load_recipe
from pipeline.data.tokenizer_hash import tokenizer_directory
from pipeline.errors import EXIT_DONE, UserError, exit_code_of
from pipeline.evaluation.retrieval import read_pairs
from pipeline.export.hf import LINEAGE_FILE
from pipeline.installed import training_command
from pipeline.report.page import render
from pipeline.runtime.json_files import read_json, read_json_if_there
from pipeline.runtime.run_paths import RunPaths

DEEPSPEED_JSON = Path("ds_configs/zero2.json")
DEFAULT_PORT = 29500  # the default of DeepSpeed's launcher
SAMPLE_TEXT = Path("samples/cc100")


class StageError(Exception):
    """The command of a stage failed and has already printed its error."""

    def __init__(self, exit_code: int) -> None:
        super().__init__(exit_code)
        self.exit_code = exit_code


def main() -> None:
    parser = CommandLine(prog="python -m demo", description=__doc__, epilog=VERBOSE_HELP)
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override a recipe key, or retrieval.KEY"
    )
    parser.add_argument("--recipe", type=Path, default=QUICKSTART, help=f"default: {QUICKSTART}")
    parser.add_argument("--run-dir", type=Path, help="default: runs/NAME_OF_RECIPE")
    arguments = parser.parse_args()
    run_dir = arguments.run_dir or Path("runs") / arguments.recipe.stem
    overrides = training_overrides(arguments.set)
    recipe, retrieval = load_recipe(arguments.recipe, overrides), retrieval_settings(arguments.recipe, arguments.set)
    if recipe.students is not None:
        raise UserError(
            f"the demo shows one student, and {arguments.recipe} has {len(recipe.students)}. Train them: {training_command()} "
            f"--deepspeed ds_configs/zero2.json --recipe {shlex.quote(str(arguments.recipe))}   (then `{module_command('pipeline', 'compare')}`)"
        )
    read_pairs(retrieval)  # a wrong path must fail before the training, not after it
    if not is_verbose():
        logging.disable_progress_bar()

    say(1, "teacher")
    if recipe.teacher == str(DEFAULT_OUTPUT):
        make_teacher(DEFAULT_OUTPUT)
    print(f"teacher: {recipe.teacher}", flush=True)
    say(2, "text to shards")
    prepare_shards(recipe)
    say(3, "distil")
    train(arguments.recipe, overrides, recipe, run_dir)
    say(4, "export")
    export(run_dir)
    say(5, "evaluate: cross-lingual retrieval")
    print(compare(recipe, retrieval, run_dir), flush=True)
    say(6, "report")
    curves = f"curves: tensorboard --logdir {run_dir}"
    print(end_lines(run_dir / "student", run_dir / "demo.json", report(run_dir), about=curves))


def say(number: int, title: str) -> None:
    print(f"\n[{number}/6] {title}", flush=True)


def prepare_shards(recipe: Recipe) -> None:
    """Make token shards of the sample corpus, in the vocabulary of the recipe or of its teacher."""
    if (Path(recipe.data) / "manifest.json").is_file():
        print(f"shards: {recipe.data} exist", flush=True)
        return
    tokenizer = str(tokenizer_directory(recipe.tokenizer))
    run_stage(
        [sys.executable, "-m", "data_prep", "prepare"]
        + ["--input", str(SAMPLE_TEXT), "--tokenizer", tokenizer, "--output", recipe.data]
    )


def train(recipe_path: Path, overrides: list[str], recipe: Recipe, run_dir: Path) -> None:
    """Run the training command of the README. Its duration is written to `demo_training.json`."""
    done = read_json_if_there(run_dir / "demo_training.json")
    if done.get("steps") == recipe.steps and RunPaths(run_dir).done.is_file():
        print(f"student: {run_dir} has its {recipe.steps} steps", flush=True)
        return
    started = time.perf_counter()
    run_stage(
        [*launcher(), "pipeline/train.py", "--deepspeed", str(DEEPSPEED_JSON)]
        + ["--recipe", str(recipe_path), "--run-dir", str(run_dir)]
        + [word for override in overrides for word in ("--set", override)]
    )
    if not RunPaths(run_dir).done.is_file():
        raise UserError(f"the training in {run_dir} was stopped before its end. Run the same command to continue.")
    report = {"steps": recipe.steps, "seconds": round(time.perf_counter() - started, 1)}
    replace_file(run_dir / "demo_training.json", json.dumps(report) + "\n")
    (run_dir / "student" / LINEAGE_FILE).unlink(missing_ok=True)


def launcher() -> list[str]:
    """DeepSpeed's launcher, with a free port."""
    command = quiet_launcher()
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", DEFAULT_PORT)) != 0:
            return command
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return [*command, "--master_port", str(probe.getsockname()[1])]


def export(run_dir: Path) -> None:
    """Export the newest checkpoint as a Hugging Face directory."""
    steps = read_json(run_dir / "demo_training.json")["steps"]
    student = run_dir / "student"
    if read_json_if_there(student / LINEAGE_FILE).get("steps") == steps:
        print(f"export: {student} exists", flush=True)
        return
    run_stage([sys.executable, "-m", "pipeline", "export", str(run_dir), "--output", str(student)])


def report(run_dir: Path) -> Path:
    """Write the page about the run, unless nothing that it shows is newer."""
    page = run_dir / "report.html"
    shown = [RunPaths(run_dir).done, *(run_dir / "retrieval").glob("*.json")]
    if not page.is_file() or page.stat().st_mtime_ns < max(file.stat().st_mtime_ns for file in shown):
        replace_file(page, render(run_dir, ""))
    return page


def run_stage(command: list[str]) -> None:
    """Print a command and run it with the same output streams. On Ctrl-C wait until it has ended."""
    print(f"$ {shlex.join(command)}", flush=True)
    process = subprocess.Popen(command)
    interrupted = False
    while True:
        try:
            exit_code = process.wait()
            break
        except KeyboardInterrupt:
            interrupted = True
    if interrupted:
        raise KeyboardInterrupt
    if exit_code != EXIT_DONE:
        raise StageError(exit_code)


if __name__ == "__main__":
    try:
        sys.exit(exit_code_of(main))
    except StageError as error:
        print(f"stopped: the command above ended with exit code {error.exit_code}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("\ninterrupted; run the same command to continue", file=sys.stderr)
        sys.exit(130)
