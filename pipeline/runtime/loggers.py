"""Other programs that show curves, besides TensorBoard: Weights & Biases, Trackio and MLflow (`metrics.loggers`).

In: what a run is, and numbers per step. Out: what each package writes or sends. A package is imported only if the recipe
names it, and follows its own environment variables (WANDB_MODE, TRACKIO_DIR, MLFLOW_TRACKING_URI, ...). Each package has a
thread of its own, which opens it and writes its points: a server that does not answer never makes training wait, except the
first start of a run, at most `OPENING_S` seconds.
"""

from __future__ import annotations

import contextlib
import importlib.util
import re
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from data_prep.command_line import module_command
from pipeline.errors import UserError
from pipeline.runtime.json_files import read_json

TENSORBOARD = "tensorboard"
PROJECT = "minilmv2"
LOGIN_S = 5  # how long wandb waits at a terminal for an account, if it has none
OPENING_S = 60.0  # how long a run's first start waits for a logger: MLflow alone tries 253 s where there is no server
CLOSING_S = 60.0  # how long the end of a run waits for points that are on their way
_NOT_IN_MLFLOW = re.compile(r"[^\w\-./ :]")
_MLFLOW_TAG = "minilmv2.run"


@dataclass(frozen=True)
class LoggedRun:
    """What a run is called there. All starts of one run have the same identifier."""

    name: str
    identifier: str
    directory: Path  # of files that a package writes
    settings: Mapping[str, Any]


class Logger(Protocol):
    """One run in one package."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """One point on every curve."""

    def close(self) -> None:
        """Send what is on its way, and end the run there."""


class WandbLogger:
    """Weights & Biases. It gets settings and curves; not the code, the commit, or the console."""

    def __init__(self, run: LoggedRun) -> None:
        import wandb

        own = wandb.Settings(
            silent=True, console="off", disable_code=True, disable_git=True, reinit="create_new", login_timeout=LOGIN_S
        )
        self._run = wandb.init(
            project=PROJECT, id=run.identifier, name=run.name, dir=str(run.directory), resume="allow",
            config=dict(run.settings), settings=own,
        )  # fmt: skip
        # its own step number only grows, and a run that resumes does steps again
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({"step": step, **values})

    def close(self) -> None:
        self._run.finish()


class TrackioLogger:
    """Trackio, which keeps its runs in a directory of this user unless its variables say otherwise."""

    def __init__(self, run: LoggedRun) -> None:
        import trackio

        name = f"{run.name}-{run.identifier[:8]}"  # its runs have no other identifier
        self._run = trackio.init(project=PROJECT, name=name, resume="allow", config=dict(run.settings), embed=False)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


class MlflowLogger:
    """MLflow, at the server or in the files of MLFLOW_TRACKING_URI."""

    def __init__(self, run: LoggedRun) -> None:
        from mlflow.entities import Param
        from mlflow.tracking import MlflowClient

        self._client = MlflowClient()
        known = self._client.get_experiment_by_name(PROJECT)
        experiment = known.experiment_id if known else self._client.create_experiment(PROJECT)
        begun = self._client.search_runs([experiment], f"tags.`{_MLFLOW_TAG}` = '{run.identifier}'", max_results=1)
        if begun:
            self._id = begun[0].info.run_id
            self._client.update_run(self._id, status="RUNNING")
        else:
            tags = {_MLFLOW_TAG: run.identifier}
            self._id = self._client.create_run(experiment, run_name=run.name, tags=tags).info.run_id
            settings = [Param(key, str(value)[:500]) for key, value in run.settings.items()]
            self._client.log_batch(self._id, params=settings)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now_ms = int(time.time() * 1000)
        points = [Metric(_NOT_IN_MLFLOW.sub("_", tag), float(v), now_ms, step) for tag, v in values.items()]
        self._client.log_batch(self._id, metrics=points)

    def close(self) -> None:
        self._client.set_terminated(self._id)


LOGGERS: dict[str, Callable[[LoggedRun], Logger]] = {
    "wandb": WandbLogger,
    "trackio": TrackioLogger,
    "mlflow": MlflowLogger,
}


FIXES = {
    "wandb": "Run `wandb login` or set WANDB_API_KEY, keep the curves on this machine with WANDB_MODE=offline",
    "trackio": "Correct its variables (TRACKIO_DIR, TRACKIO_SPACE_ID)",
    "mlflow": "Set MLFLOW_TRACKING_URI to a server or a database",
}


def check_names(names: Sequence[str]) -> None:
    """Raise a `UserError` if one of `metrics.loggers` is unknown."""
    known = [TENSORBOARD, *LOGGERS]
    for name in names:
        if name not in known:
            raise UserError(f"`metrics.loggers` names {name!r}; it knows: {', '.join(known)}")


def problem_of(names: Sequence[str]) -> str | None:
    """Why a logger cannot be used on this machine, and the fix; None if all can."""
    for name in names:
        if name != TENSORBOARD and importlib.util.find_spec(name) is None:
            return f"`metrics.loggers` names {name}, which is not installed. Install it: {module_command('pip', 'install', name)}"
    return None


class Loggers:
    """All loggers of one run except TensorBoard. An error of one of them ends this logger and not the run.

    Args:
        names: `metrics.loggers`
        warn: gets one line for each logger that fails
        is_new: the run's first start. Only then is a logger that cannot be opened an error.

    Raises:
        UserError: a logger cannot be opened at the first start
    """

    def __init__(self, names: Sequence[str], run: LoggedRun, warn: Callable[[str], object], is_new: bool) -> None:
        self._warn, self._failed = warn, set[str]()
        self._threads = {name: ThreadPoolExecutor(1, thread_name_prefix=name) for name in names if name in LOGGERS}
        self._opening = {name: thread.submit(LOGGERS[name], run) for name, thread in self._threads.items()}
        if is_new:
            wait(self._opening.values(), OPENING_S)
            for name, opening in self._opening.items():
                _check_open(name, opening)
        for name, opening in self._opening.items():
            opening.add_done_callback(partial(self._opened, name))

    def _opened(self, name: str, opening: Future[Logger]) -> None:
        if (error := opening.exception()) is not None:
            self._failed.add(name)
            self._warn(f"warning: {name} cannot be opened, the run continues without it: {error}")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """One point on every curve of every logger, soon."""
        point = dict(values)
        for name, thread in self._threads.items():
            thread.submit(self._attempt, name, lambda logger: logger.write(step, point))

    def close(self) -> None:
        """Wait for what is on its way, at most `CLOSING_S` seconds."""
        ends = {
            name: thread.submit(self._attempt, name, lambda logger: logger.close())
            for name, thread in self._threads.items()
        }
        late = wait(ends.values(), CLOSING_S).not_done
        for name, thread in self._threads.items():
            if ends[name] in late:
                self._warn(f"warning: {name} did not end within {CLOSING_S:.0f} s; its last points may be missing")
            thread.shutdown(wait=False, cancel_futures=True)
        self._threads = {}

    def _attempt(self, name: str, action: Callable[[Logger], object]) -> None:
        """Run in the logger's thread, after it was opened there."""
        try:
            if name not in self._failed:
                action(self._opening[name].result())
        except Exception as error:
            self._failed.add(name)
            self._warn(f"warning: {name} is not written any more, the run continues without it: {error}")


def _check_open(name: str, opening: Future[Logger]) -> None:
    """Raise a `UserError` unless a logger is open. wandb fails with KeyboardInterrupt where nobody answers its question."""
    if opening.done():
        error = opening.exception()
        problem = f"{type(error).__name__}: {error}" if error is not None else None
    else:
        error, problem = None, f"no answer within {OPENING_S:.0f} s"
    if problem is not None:
        raise UserError(
            f"`metrics.loggers`: {name} cannot be opened ({problem}). {FIXES[name]}, or leave it out of `metrics.loggers`"
        ) from error


def identifier_in(file: Path) -> str | None:
    """The identifier of a run, from its file; None before its loggers were opened for the first time."""
    with contextlib.suppress(UserError, KeyError):
        return str(read_json(file)["identifier"])
    return None
