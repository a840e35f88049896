"""One process that does many runs of pipeline/train.py, one after the other: a start costs seconds, a tiny run does not.

`TrainingProcess().run(words)` gives what `python pipeline/train.py WORDS` would have given. DeepSpeed remembers the
process group of its first engine for good, so the group stays for all of them; everything else is the product's own.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
import traceback
from dataclasses import dataclass

from tests.conftest import REPO, first_on_python_path


@dataclass
class Ended:
    """How a command line ended."""

    code: int
    out: str
    err: str


class TrainingProcess:
    """The process, seen from the test; a context manager."""

    def __enter__(self) -> TrainingProcess:
        environment = {**os.environ, "PYTHONPATH": first_on_python_path(REPO), "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            cwd=REPO,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        return self

    def run(self, *words: object) -> Ended:
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(json.dumps([str(word) for word in words]) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, f"the training process died ({self._process.poll()})"
        return Ended(**json.loads(answer))

    def __exit__(self, *exception: object) -> None:
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.close()
        self._process.wait(60)
        self._process.stdout.close()


def serve() -> None:
    """Read a line of words, write a line of results, until the input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints must not look like an answer
    from pipeline.errors import exit_code_of
    from pipeline.runtime import dist
    from pipeline.train import main

    dist.shut_down = lambda: None
    for line in sys.stdin:
        sys.argv = ["pipeline/train.py", *json.loads(line)]
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                code = exit_code_of(main)
            except Exception:  # a separate process would have ended with code 1; the next run continues
                traceback.print_exc()
                code = 1
        answers.write(json.dumps({"code": code, "out": out.getvalue(), "err": err.getvalue()}) + "\n")
        answers.flush()


if __name__ == "__main__":
    serve()
