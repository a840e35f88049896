"""Ranks that start ten times faster: one process imports torch, deepspeed and the pipeline once, then forks every rank.

`ForkServer.start` is what `tests.dist.runs.start` is with a launcher in front: it returns something like a `Popen` of
its own session. Below it run real ranks, one process each, which can be killed and stopped one by one; each runs the
very file that a launcher would run. The server itself starts no thread and joins no process group.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import runpy
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tests.conftest import REPO, first_on_python_path
from tests.dist.ports import free_port

SECONDS_TO_FOLLOW = 5.0  # after one rank has died the others have this time, then they are killed, as by a launcher
TRAIN = "pipeline/train.py"
Request = dict[str, Any]


class Job:
    """Ranks under one small launcher process, which ends with the exit code of the first rank that failed."""

    def __init__(self, server: ForkServer, pid: int, ranks: list[int]):
        self.pid, self.ranks, self.args = pid, ranks, TRAIN
        self._server = server

    def poll(self) -> int | None:
        self._server.listen(0.0)
        return self._server.codes.get(self.pid)

    def wait(self, timeout: float = 300.0) -> int:
        deadline = time.monotonic() + timeout
        while (code := self._server.codes.get(self.pid)) is None:
            left = deadline - time.monotonic()
            if left <= 0:
                raise subprocess.TimeoutExpired(self.args, timeout)
            self._server.listen(left)
        return code


class ForkServer:
    """A client of `main` below, which runs in its own process. Use it as a context manager."""

    def __init__(self) -> None:
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": first_on_python_path(REPO),
            "HF_HUB_OFFLINE": "1",
            "TORCHINDUCTOR_COMPILE_THREADS": "1",  # torch 2.8 starts them, and a thread, as soon as it is imported
        }
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.dist.fork_server"],
            cwd=REPO,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        assert self._process.stdout is not None
        self._answers = self._process.stdout.fileno()
        self._text = b""
        self.codes: dict[int, int] = {}
        self._ranks: dict[int, list[int]] = {}

    def start(
        self, num_ranks: int, arguments: Iterable[str], log: Path, script: str = TRAIN, faults: Iterable[Any] = ()
    ) -> Job:
        """Fork `num_ranks` ranks of `script`; what they print goes to `log`. `faults`: tests/dist/fault_injection.py."""
        log.parent.mkdir(parents=True, exist_ok=True)
        request = {"num_ranks": num_ranks, "argv": [script, *arguments], "log": str(log), "faults": list(faults)}
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({**request, "port": free_port()}).encode() + b"\n")
        self._process.stdin.flush()
        deadline = time.monotonic() + 120
        while not self._ranks:
            assert time.monotonic() < deadline, "the fork server does not answer"
            self.listen(1.0)
        pid, ranks = self._ranks.popitem()
        return Job(self, pid, ranks)

    def listen(self, timeout_s: float) -> None:
        """Read the answers of the server: jobs that began, jobs that ended."""
        while select.select([self._answers], [], [], timeout_s)[0]:
            said = os.read(self._answers, 65536)
            assert said, f"the fork server has ended with code {self._process.poll()}"
            *lines, self._text = (self._text + said).split(b"\n")
            for message in map(json.loads, lines):
                if "ranks" in message:
                    self.codes.pop(message["job"], None)  # of an earlier job: process numbers repeat
                    self._ranks[message["job"]] = message["ranks"]
                else:
                    self.codes[message["job"]] = message["code"]
            timeout_s = 0.0

    def __enter__(self) -> ForkServer:
        return self

    def __exit__(self, *unused: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)


# -- the server's side


def main() -> None:
    """Import everything that a rank needs, then fork on request until the client ends; then end every job."""
    answers = os.dup(1)  # what an import prints must not look like an answer
    os.dup2(2, 1)
    _import_once()
    gc.collect()
    gc.freeze()  # so that a collection in a rank does not copy every page of the parent
    wake_read, wake_write = os.pipe()
    os.set_blocking(wake_write, False)
    signal.set_wakeup_fd(wake_write)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    jobs: set[int] = set()
    try:
        _serve(wake_read, answers, jobs)
    finally:  # a client that was killed left them behind
        for job in jobs:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(job, signal.SIGKILL)


def _serve(wake_read: int, answers: int, jobs: set[int]) -> None:
    """Answer requests until the client ends. `jobs` are those that have not ended."""
    text = b""
    while True:
        ready, _, _ = select.select([0, wake_read], [], [])
        if wake_read in ready:
            os.read(wake_read, 4096)
            _report_ended(answers, jobs)
        if 0 in ready:
            said = os.read(0, 65536)
            if not said:
                return
            *lines, text = (text + said).split(b"\n")
            for line in lines:
                jobs.add(_fork_job(json.loads(line), answers))


def _import_once() -> None:
    """No thread may run at the fork: it would be missing in the ranks, and its locks would stay locked."""
    import deepspeed.runtime.zero.muon.original_muon  # brings torch's compiler along: half of a rank's start
    import deepspeed.runtime.zero.stage3  # noqa: F401
    import torch
    import transformers.models.xlm_roberta.modeling_xlm_roberta  # noqa: F401

    import pipeline.training.launch  # noqa: F401

    assert torch.get_num_threads() == 1
    threads = [(task / "comm").read_text().strip() for task in Path("/proc/self/task").iterdir()]
    # pyarrow 21 brings jemalloc, which stops its thread at a fork and starts it again
    assert len([name for name in threads if name != "jemalloc_bg_thd"]) == 1, f"threads after the imports: {threads}"


def _report_ended(answers: int, jobs: set[int]) -> None:
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return
        jobs.discard(pid)
        message = {"job": pid, "code": os.waitstatus_to_exitcode(status)}
        os.write(answers, json.dumps(message).encode() + b"\n")


def _fork_job(request: Request, answers: int) -> int:
    """Fork a launcher with its own session, which forks the ranks and reports their process numbers. Returns its own number."""
    if pid := os.fork():
        return pid
    code = 1
    try:
        os.setsid()
        signal.set_wakeup_fd(-1)
        _redirect(request["log"])
        ranks = [_fork_rank(rank, request) for rank in range(request["num_ranks"])]
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(number, signal.SIG_IGN)
        os.write(answers, json.dumps({"job": os.getpid(), "ranks": ranks}).encode() + b"\n")
        code = _wait_for(ranks)
    finally:
        os._exit(code if code >= 0 else 128 - code)


def _redirect(log: str) -> None:
    with open(log, "wb") as file, open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)


def _wait_for(ranks: list[int]) -> int:
    """The exit code of the first rank that failed, or 0. After a failure ranks that do not end are killed."""
    code, left, deadline = 0, set(ranks), float("inf")
    while left:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid:
            left.discard(pid)
            code = code or os.waitstatus_to_exitcode(status)
            if code and deadline == float("inf"):
                deadline = time.monotonic() + SECONDS_TO_FOLLOW
            continue
        if time.monotonic() > deadline:
            for rank in left:
                os.kill(rank, signal.SIGKILL)
            deadline = float("inf")
        time.sleep(0.01)
    return code


def _fork_rank(rank: int, request: Request) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(request["num_ranks"])}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(request["port"])}
        sys.argv = request["argv"]
        from tests.dist.fault_injection import arrange

        arrange(request["faults"], rank)
        runpy.run_path(str(REPO / sys.argv[0]), run_name="__main__")  # a fault may have moved this rank elsewhere
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    main()
