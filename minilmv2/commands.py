"""Training, export and evaluation as Python functions: what the commands of the same names do.

In: a recipe, a run directory, or models. Out: directories and figures. `distil` trains in processes of its own, as the
`deepspeed` command does: a training handles signals, joins a process group and ends its process.
"""

from __future__ import annotations

import argparse
import json
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn

from data_prep.command_line import EXIT_USER, quiet_launcher
from pipeline.errors import EXIT_DIVERGED, EXIT_DONE, DivergedRunError, UserError
from pipeline.installed import shipped_file, training_script

DEEPSPEED_CONFIG = "ds_configs/zero2.json"


def training_words(
    deepspeed: str | Path, recipe: str | Path, run_dir: str | Path, settings: Mapping[str, Any]
) -> list[str]:
    """The command that trains, as a list of words."""
    words = [*quiet_launcher(), str(training_script()), "--deepspeed", str(shipped_file(str(deepspeed)))]
    words += ["--recipe", str(shipped_file(str(recipe))), "--run-dir", str(run_dir)]
    return words + [word for key, value in settings.items() for word in ("--set", f"{key}={_as_yaml(value)}")]


def distil(
    recipe: str | Path,
    run_dir: str | Path,
    settings: Mapping[str, Any] | None = None,
    deepspeed: str | Path = DEEPSPEED_CONFIG,
) -> Path:
    """Train the student of a recipe on all GPUs of this machine, or on its CPU. A run that was begun is continued.

    Args:
        recipe: a recipe file, or the name of one that is shipped (`recipes/quickstart.yaml`)
        run_dir: directory of all output
        settings: recipe keys and their values, as `--set` has them: `{"steps": 400, "student.layers": 3}`
        deepspeed: a DeepSpeed JSON, or the name of one that is shipped

    Returns:
        `run_dir`

    Raises:
        UserError: the user can fix it; the paragraph about it was printed
        DivergedRunError: the run cannot continue
        RuntimeError: the training ended otherwise, with the exit code that the message has
    """
    code = subprocess.run(training_words(deepspeed, recipe, run_dir, settings or {})).returncode
    if code == EXIT_USER:
        raise UserError(
            f"the training in {run_dir} did not start or continue: the line above that begins with `error:` says why"
        )
    if code == EXIT_DIVERGED:
        raise DivergedRunError(
            f"the training in {run_dir} has diverged: the line above that begins with `error:` says where"
        )
    if code != EXIT_DONE:
        raise RuntimeError(
            f"the training in {run_dir} ended with exit code {code}; its log is in {Path(run_dir) / 'logs'}"
        )
    return Path(run_dir)


def export(
    run_dir: str | Path, output: str | Path, student: str = "", step: int | Literal["best"] | None = None
) -> Path:
    """Write the student of a run as a directory that `AutoModel` and `AutoTokenizer` load.

    Args:
        run_dir: of a training
        output: directory of the student; an earlier export there is replaced
        student: its name, if the run has several
        step: of its checkpoint, "best", or None for the newest

    Returns:
        `output`

    Raises:
        UserError: the run directory is not complete, or `output` cannot be used
    """
    from pipeline.export.hf import export_run

    return export_run(Path(run_dir), Path(output), student=student, step=step)


def evaluate(
    models: Sequence[str | Path],
    output: str | Path,
    tasks: Sequence[str] = ("retrieval",),
    settings: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Evaluate models side by side, in this process. Tables are printed.

    Args:
        models: Hugging Face directories, hub names or run directories, optionally with @LAYER
        output: directory for `evaluation.json` and `evaluation.png`
        tasks: names of tasks; docs/evaluating.md describes them
        settings: of the tasks: `{"retrieval.pairs": "samples/parallel"}`

    Returns:
        task -> model -> figures, as in `evaluation.json`; earlier tasks in the same output included

    Raises:
        UserError: a task, setting, model or file is not what it should be
    """
    from pipeline.evaluation.results import FILE
    from pipeline.export import evaluate as verb

    parser = _Parser()
    verb.add_arguments(parser)
    words = [str(model) for model in models] + ["--tasks", ",".join(tasks), "--output", str(output)]
    words += [word for key, value in (settings or {}).items() for word in ("--set", f"{key}={_as_yaml(value)}")]
    verb.run(parser.parse_args(words))
    return json.loads((Path(output) / FILE).read_text(encoding="utf-8"))["tasks"]


class _Parser(argparse.ArgumentParser):
    """Raises what is wrong with the arguments of a function, where a command would print it and end Python."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def _as_yaml(value: Any) -> str:
    """A value as `--set` reads it. JSON is YAML; a path or a text stays as it is."""
    return str(value) if isinstance(value, str | Path) else json.dumps(value)
