"""The whole job on real input: teacher, shards, distillation, export, evaluation, one table of before and after.

    python -m demo                                  (make demo)
    python -m demo --set steps=400                  (make demo SET="steps=400")

Every stage is a command that also works by itself and is printed before it runs. What is done is skipped, so running
this again after an interruption goes on where it stopped. Leaves the student and `demo.json` in the run directory.
"""

from __future__ import annotations

import json
import shlex
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from transformers.utils import logging

from data_prep.command_line import CommandLine
from demo.compare import compare
from demo.teacher import DEFAULT_OUTPUT, make_teacher
from pipeline.config import Recipe, load_recipe
from pipeline.data.tokenizer_hash import tokenizer_directory
from pipeline.errors import EXIT_DONE, UserError, exit_code_of
from pipeline.evaluation.retrieval import read_pairs
from pipeline.export.hf import LINEAGE_FILE

RECIPE = Path("recipes/quickstart.yaml")
DEEPSPEED_JSON = Path("ds_configs/zero2.json")
DEFAULT_PORT = 29500  # the launcher's own
SAMPLE_TEXT = Path("samples/cc100")


class StageError(Exception):
    """A stage's command ended with an error that it has already explained."""

    def __init__(self, exit_code: int) -> None:
        super().__init__(exit_code)
        self.exit_code = exit_code


def main() -> None:
    parser = CommandLine(prog="python -m demo", description=__doc__)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a recipe key")
    parser.add_argument("--recipe", type=Path, default=RECIPE)
    parser.add_argument("--run-dir", type=Path, help="default: runs/NAME_OF_RECIPE")
    arguments = parser.parse_args()
    run_dir = arguments.run_dir or Path("runs") / arguments.recipe.stem
    recipe = load_recipe(arguments.recipe, arguments.set)
    read_pairs(recipe.retrieval)  # a wrong path should not come to light after the training
    logging.disable_progress_bar()

    say(1, "teacher")
    if recipe.teacher == str(DEFAULT_OUTPUT):
        make_teacher(DEFAULT_OUTPUT)
    print(f"teacher: {recipe.teacher}", flush=True)
    say(2, "text to shards")
    prepare_shards(recipe)
    say(3, "distil")
    train(arguments.recipe, arguments.set, recipe, run_dir)
    say(4, "export")
    export(run_dir)
    say(5, "evaluate: cross-lingual retrieval")
    print(compare(recipe, run_dir), flush=True)


def say(number: int, title: str) -> None:
    print(f"\n[{number}/5] {title}", flush=True)


def prepare_shards(recipe: Recipe) -> None:
    """The sample corpus as token shards, in the vocabulary of the recipe's teacher or its own smaller one."""
    if (Path(recipe.data) / "manifest.json").is_file():
        print(f"shards: {recipe.data} are there", flush=True)
        return
    tokenizer = str(tokenizer_directory(recipe.tokenizer))
    run_stage(
        [sys.executable, "-m", "data_prep", "prepare"]
        + ["--input", str(SAMPLE_TEXT), "--tokenizer", tokenizer, "--output", recipe.data]
    )


def train(recipe_path: Path, overrides: list[str], recipe: Recipe, run_dir: Path) -> None:
    """The card's command, as a user would type it; how long it took goes to `demo_training.json`."""
    done = read_json(run_dir / "demo_training.json")
    if done.get("steps") == recipe.steps and (run_dir / "DONE").is_file():
        print(f"student: {run_dir} has its {recipe.steps} steps", flush=True)
        return
    started = time.perf_counter()
    run_stage(
        [*launcher(), "pipeline/train.py", "--deepspeed", str(DEEPSPEED_JSON)]
        + ["--recipe", str(recipe_path), "--run-dir", str(run_dir)]
        + [word for override in overrides for word in ("--set", override)]
    )
    if not (run_dir / "DONE").is_file():
        raise UserError(f"the training in {run_dir} was stopped before its end. The same command goes on from there.")
    report = {"steps": recipe.steps, "seconds": round(time.perf_counter() - started, 1)}
    (run_dir / "demo_training.json").write_text(json.dumps(report) + "\n")
    (run_dir / "student" / LINEAGE_FILE).unlink(missing_ok=True)


def launcher() -> list[str]:
    """DeepSpeed's launcher beside this Python (its directory need not be on PATH), on a port that nobody uses."""
    command = [str(Path(sys.executable).with_name("deepspeed"))]
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", DEFAULT_PORT)) != 0:
            return command
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return [*command, "--master_port", str(probe.getsockname()[1])]


def export(run_dir: Path) -> None:
    """The newest checkpoint as a Hugging Face directory."""
    steps = read_json(run_dir / "demo_training.json")["steps"]
    student = run_dir / "student"
    if read_json(student / LINEAGE_FILE).get("steps") == steps:
        print(f"export: {student} is there", flush=True)
        return
    run_stage([sys.executable, "-m", "pipeline", "export", str(run_dir), "--output", str(student)])


def run_stage(command: list[str]) -> None:
    """Show a command and run it with our own output streams; on Ctrl-C wait until it has put its things in order."""
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


def read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


if __name__ == "__main__":
    try:
        sys.exit(exit_code_of(main))
    except StageError as error:
        print(f"stopped: the command above ended with exit code {error.exit_code}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on from here", file=sys.stderr)
        sys.exit(130)
