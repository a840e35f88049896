"""Evaluate encoders side by side: tables on the console, `evaluation.json` and `.png` in the output directory.

    python -m pipeline evaluate artifacts/teacher runs/quickstart/student --tasks retrieval,speed --output runs/evaluation
    torchrun --nproc_per_node 8 -m pipeline evaluate ...          deepspeed --module pipeline evaluate ...

A model is a Hugging Face directory or hub name; `MODEL@19` reads the values of layer 19 instead of the distilled one.
Settings of a task are overridden like a recipe's: `--set retrieval.pairs=DIR`. Several ranks share the tasks that
go through shards; rank 0 does the others.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import transformers

from data_prep.outputs import output_path
from data_prep.ownership import own, sibling_lock
from data_prep.shards import DataError
from pipeline.config import apply_override, build_section
from pipeline.errors import UserError
from pipeline.evaluation import heldout as heldout_task
from pipeline.evaluation import plots, results, retrieval, speed, sts
from pipeline.evaluation.encoder import Encoder, load_encoder
from pipeline.evaluation.finetuning import mlqa, xnli
from pipeline.evaluation.finetuning.grid import encoder_fingerprint
from pipeline.evaluation.ranks import Ranks, joined
from pipeline.evaluation.training_metadata import trained_as
from pipeline.provenance import fingerprint


@dataclasses.dataclass
class EvaluationConfig:
    """Settings of all tasks, one section each."""

    heldout: heldout_task.HeldoutConfig = dataclasses.field(default_factory=heldout_task.HeldoutConfig)
    retrieval: retrieval.RetrievalConfig = dataclasses.field(default_factory=retrieval.RetrievalConfig)
    sts: sts.StsConfig = dataclasses.field(default_factory=sts.StsConfig)
    xnli: xnli.XnliConfig = dataclasses.field(default_factory=xnli.XnliConfig)
    mlqa: mlqa.MlqaConfig = dataclasses.field(default_factory=mlqa.MlqaConfig)
    speed: speed.SpeedConfig = dataclasses.field(default_factory=speed.SpeedConfig)


@dataclasses.dataclass(frozen=True)
class Task:
    """`check` looks at the input before any model is loaded; `evaluate` gives results by model; `table` shows them.

    A shared task is called by all ranks, with the `Ranks` as third argument; the others by rank 0 alone. One that
    fine-tunes also gets a directory, where it keeps what is finished.
    """

    check: Callable[[Any], object]
    evaluate: Callable[..., dict[str, dict[str, Any]]]
    table: Callable[[dict[str, dict[str, Any]]], str]
    shared: bool = False
    keeps: bool = False


TASKS = {
    "heldout": Task(heldout_task.check_input, heldout_task.evaluate_heldout, heldout_task.heldout_table, shared=True),
    "retrieval": Task(retrieval.read_pairs, retrieval.evaluate_each, retrieval.retrieval_table),
    "sts": Task(sts.read_all, sts.evaluate_sts, sts.sts_table),
    "xnli": Task(xnli.read, xnli.evaluate_xnli, xnli.xnli_table, shared=True, keeps=True),
    "mlqa": Task(mlqa.read, mlqa.evaluate_mlqa, mlqa.mlqa_table, shared=True, keeps=True),
    "speed": Task(lambda config: None, speed.evaluate_speed, speed.speed_table),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("models", nargs="+", metavar="MODEL", help="HF directory or hub name, optionally @LAYER")
    parser.add_argument("--tasks", default="retrieval", help=f"comma-separated, of: {', '.join(TASKS)}")
    parser.add_argument(
        "--output", type=output_path, required=True, help="directory for evaluation.json and evaluation.png"
    )
    parser.add_argument(
        "--teacher", metavar="MODEL", help="what heldout compares with (short for --set heldout.teacher=)"
    )
    parser.add_argument("--data", metavar="SHARDS", help="what heldout reads (short for --set heldout.data=)")
    parser.add_argument("--set", action="append", default=[], metavar="TASK.KEY=VALUE")


def run(arguments: argparse.Namespace) -> None:
    tasks = [task for task in arguments.tasks.split(",") if task]
    unknown = [task for task in tasks if task not in TASKS]
    if unknown or not tasks:
        raise UserError(f"--tasks {arguments.tasks!r}: unknown {', '.join(unknown)}. Tasks: {', '.join(TASKS)}")
    if len(set(arguments.models)) < len(arguments.models):
        raise UserError(f"a model is named twice: {' '.join(arguments.models)}. Name each once.")
    config = read_overrides(arguments.set)
    for key in ("teacher", "data"):
        if getattr(arguments, key) is not None:
            setattr(config.heldout, key, getattr(arguments, key))
    for task in tasks:
        TASKS[task].check(getattr(config, task))
    results.read(arguments.output / results.FILE)  # one that cannot be joined should come to light at once
    transformers.logging.disable_progress_bar()
    with joined() as ranks:
        evaluate(arguments.models, tasks, config, arguments.output, ranks)


def evaluate(models: list[str], tasks: list[str], config: EvaluationConfig, output: Path, ranks: Ranks) -> None:
    """Every task on every model. What is finished is on disk before the next task begins, beside earlier tasks' figures."""
    encoders = [load_encoder(name) for name in models]
    with owned_tasks(tasks, output, ranks):
        _evaluate(encoders, tasks, config, output, ranks)


@contextlib.contextmanager
def owned_tasks(tasks: list[str], output: Path, ranks: Ranks) -> Iterator[None]:
    """Hold what each task writes below `output`; another job may add other tasks to the same file meanwhile."""
    with contextlib.ExitStack() as held:
        problem = None
        if ranks.is_main:
            try:
                held.callback(_remove_if_empty, output)
                output.mkdir(parents=True, exist_ok=True)
                for name in tasks:
                    held.enter_context(own(sibling_lock(output / name), f"the evaluation {output / name}"))
            except DataError as error:
                problem = f"{error} Or name another --output."
            except OSError as error:
                problem = f"{output} cannot be written to ({error}). Name another --output."
        if problem := ranks.from_main(problem):
            raise UserError(problem)
        yield


def _remove_if_empty(directory: Path) -> None:
    with contextlib.suppress(OSError):
        directory.rmdir()


def _evaluate(encoders: list[Encoder], tasks: list[str], config: EvaluationConfig, output: Path, ranks: Ranks) -> None:
    path = output / results.FILE
    about = {encoder.name: _identity(encoder) for encoder in encoders if ranks.is_main}
    for name in tasks:
        task, settings = TASKS[name], getattr(config, name)
        if not (task.shared or ranks.is_main):
            continue
        places = [ranks, output / name] if task.keeps else [ranks] if task.shared else []
        found = task.evaluate(encoders, settings, *places)
        if ranks.is_main:
            print(task.table(found), end="\n\n", flush=True)
            results.add(path, about, name, found, dataclasses.asdict(settings))
    if ranks.is_main:
        there = results.read(path)["tasks"]
        plots.draw({name: there[name] for name in TASKS if name in there}, path.with_suffix(".png"))
        print(f"written: {path} and {path.with_suffix('.png').name}, with {', '.join(there)}")


def _identity(encoder: Encoder) -> dict[str, Any]:
    """What tells apart two models of one name, and for how many steps this one was trained, where it says so."""
    content = fingerprint([encoder_fingerprint(encoder), encoder.values_layer])
    return {"fingerprint": content, "steps": trained_as(encoder.path).get("steps")}


def read_overrides(overrides: list[str]) -> EvaluationConfig:
    """`--set section.key=value` on top of the defaults, as strict as a recipe."""
    tree: dict[str, Any] = {}
    for override in overrides:
        apply_override(tree, override)
    return build_section(EvaluationConfig, tree, "")
