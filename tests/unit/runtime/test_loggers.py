"""`metrics.loggers`: Weights & Biases, Trackio and MLflow with the real packages, offline; and TensorBoard's HParams tab.

The packages are in an environment of their own, `.loggers`, which `make loggers` makes: Trackio does not accept the pinned
pillow. Its Python sees the packages of this environment after its own.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import threading
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from data_prep.command_line import module_command
from pipeline.errors import UserError
from pipeline.runtime import loggers as module
from pipeline.runtime.loggers import LOGGERS, LoggedRun, Loggers, problem_of
from pipeline.runtime.metrics import Metrics, MetricsConfig
from pipeline.runtime.run_paths import RunPaths
from tests.conftest import REPO

PYTHON = Path(os.environ.get("LOGGERS_PYTHON", REPO / ".loggers" / "bin" / "python"))
with_packages = pytest.mark.skipif(not PYTHON.exists(), reason="`make loggers` installs wandb, trackio and mlflow")
SETTINGS = {"steps": 4, "optimizer.lr": 1e-3, "relations.layers": None, "teacher": "x" * 600}
TWO_STARTS = """
import sys
from pathlib import Path
from pipeline.runtime.metrics import Metrics
from pipeline.runtime.run_paths import RunPaths
Path("run").mkdir()
for first in (0, 2):  # the second start resumes after step 2 and does step 3 again
    metrics = Metrics(RunPaths(Path("run")), True, first, 4, loggers=[sys.argv[1]])
    metrics.describe("a: 1", "{}", SETTINGS)
    for step in (1, 2, 3) if not first else (3, 4):
        metrics.write(step, 8 * step, {"loss/total": 1.0 / step, "loss/q-q@19>6": float(first)})
    metrics.close()
"""
READ = {
    "wandb": """
import glob, json, struct
from wandb.proto import wandb_internal_pb2 as proto
found, ids = [], set()
for path in sorted(glob.glob("run/wandb/offline-run-*/run-*.wandb")):
    data, place = open(path, "rb").read(), 7  # LevelDB's log after a header; all records here fit its first block
    while place + 7 <= len(data):
        _, size, kind = struct.unpack_from("<IHB", data, place)
        assert kind == 1
        record = proto.Record()
        record.ParseFromString(data[place + 7 : place + 7 + size])
        place += 7 + size
        ids |= {record.run.run_id} - {""}
        row = {(item.key or item.nested_key[0]): json.loads(item.value_json) for item in record.history.item}
        found += [(row["step"], row["loss/total"])] if "loss/total" in row else []
print(json.dumps([len(ids), found]))
""",
    "trackio": """
import json, sqlite3, glob
(path,) = glob.glob("trackio/*.db")
rows = sqlite3.connect(path).execute("select run_name, step, metrics from metrics order by id").fetchall()
print(json.dumps([len({row[0] for row in rows}), [[row[1], json.loads(row[2])["loss/total"]] for row in rows]]))
""",
    "mlflow": """
import json
from mlflow.tracking import MlflowClient
client = MlflowClient()
(experiment,) = [one for one in client.search_experiments() if one.name == "minilmv2"]
runs = client.search_runs([experiment.experiment_id])
assert runs[0].info.status == "FINISHED" and runs[0].data.params["optimizer.lr"] == "0.001" and "loss/q-q_19_6" in runs[0].data.metrics
points = client.get_metric_history(runs[0].info.run_id, "loss/total")
print(json.dumps([len(runs), [[p.step, p.value] for p in points]]))
""",
}


def run(code: str, directory: Path, *words: str) -> str:
    environment = {
        **os.environ, "PYTHONPATH": str(REPO), "HOME": str(directory), "WANDB_MODE": "offline",
        "TRACKIO_DIR": str(directory / "trackio"), "MLFLOW_ALLOW_FILE_STORE": "true",
        "MLFLOW_TRACKING_URI": (directory / "mlruns").as_uri(),
    }  # fmt: skip
    done = subprocess.run(
        [PYTHON, "-c", code, *words], cwd=directory, env=environment, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@with_packages
@pytest.mark.parametrize("name", LOGGERS)
def test_two_starts_are_one_run_with_every_point(name: str, tmp_path: Path) -> None:
    printed = run(TWO_STARTS.replace("SETTINGS", repr(SETTINGS)), tmp_path, name)
    assert "warning" not in printed
    num_runs, points = json.loads(run(READ[name], tmp_path).splitlines()[-1])
    assert num_runs == 1
    assert sorted(map(tuple, points)) == [(1, 1.0), (2, 1 / 2), (3, 1 / 3), (3, 1 / 3), (4, 1 / 4)]
    assert not (tmp_path / "run" / "tensorboard").exists(), "it is not among the loggers"
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 4


class Failing:
    """A logger whose server ends after the first point."""

    def __init__(self, about: LoggedRun) -> None:
        self.points = 0

    def write(self, step: int, values: Any) -> None:
        self.points += 1
        if self.points > 1:
            raise ConnectionError("the server is gone")

    def close(self) -> None:
        raise AssertionError("it was ended before")


def no_server(about: LoggedRun) -> Failing:
    raise ConnectionError("no server")


def test_a_logger_that_fails_costs_points_and_not_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setitem(LOGGERS, "wandb", Failing)
    about = LoggedRun("run", "1", tmp_path, {})
    loggers = Loggers(["tensorboard", "wandb"], about, said.append, is_new=True)
    for step in (1, 2, 3):
        loggers.write(step, {"loss": 1.0})
    loggers.close()
    assert said == ["warning: wandb is not written any more, the run continues without it: the server is gone"]


def test_a_logger_that_cannot_be_opened_is_an_error_at_the_first_start_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setitem(LOGGERS, "wandb", no_server)
    about = LoggedRun("run", "1", tmp_path, {})
    with pytest.raises(
        UserError, match=r"wandb cannot be opened \(ConnectionError: no server\)\. .*WANDB_MODE=offline"
    ):
        Loggers(["wandb"], about, said.append, is_new=True)
    Loggers(["wandb"], about, said.append, is_new=False).close()
    assert said == ["warning: wandb cannot be opened, the run continues without it: no server"]


def test_a_server_that_does_not_answer_stops_no_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = threading.Event()

    def opens_late(about: LoggedRun) -> Failing:
        assert answers.wait(60)
        return Failing(about)

    said: list[str] = []
    monkeypatch.setitem(LOGGERS, "mlflow", opens_late)
    monkeypatch.setattr(module, "OPENING_S", 0.1)
    about = LoggedRun("run", "1", tmp_path, {})
    try:
        with pytest.raises(
            UserError, match=r"mlflow cannot be opened \(no answer within 0 s\)\. Set MLFLOW_TRACKING_URI"
        ):
            Loggers(["mlflow"], about, said.append, is_new=True)
        later = Loggers(["mlflow"], about, said.append, is_new=False)  # returns while the server is silent
        later.write(1, {"loss": 1.0})
        later.write(2, {"loss": 1.0})
    finally:
        answers.set()
    later.close()
    assert said == ["warning: mlflow is not written any more, the run continues without it: the server is gone"]


def test_a_first_start_that_failed_is_followed_by_another_first_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for opened, is_error in ((no_server, True), (no_server, True), (Failing, False), (no_server, False)):
        monkeypatch.setitem(LOGGERS, "wandb", opened)
        metrics = Metrics(RunPaths(tmp_path), active=True, first_step=0, steps=2, loggers=["wandb"])
        with pytest.raises(UserError) if is_error else contextlib.nullcontext():
            metrics.describe("a: 1", "{}", SETTINGS)
        assert (tmp_path / "loggers.json").exists() != is_error


def test_names_and_packages_are_checked() -> None:
    with pytest.raises(
        UserError, match=r"`metrics\.loggers` names 'wanbd'; it knows: tensorboard, wandb, trackio, mlflow"
    ):
        MetricsConfig(loggers=["wanbd"])
    assert problem_of(["tensorboard"]) is None
    install = module_command("pip", "install", "no_package")
    problem = f"`metrics.loggers` names no_package, which is not installed. Install it: {install}"
    assert problem_of(["tensorboard", "no_package"]) == problem


def test_hyper_parameters_are_in_their_tab(tmp_path: Path) -> None:
    metrics = Metrics(RunPaths(tmp_path), active=True, first_step=0, steps=2)
    metrics.describe("a: 1", "{}", SETTINGS)
    metrics.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    content = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    assert b"optimizer.lr" in content
    assert b"1_is_it_learning/heldout_loss" in events.summary_metadata["_hparams_/experiment"].plugin_data.content
