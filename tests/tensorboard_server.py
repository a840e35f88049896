"""TensorBoard's own server for tests. In: a log directory. Out: the address of the server, which ends with the context."""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

START_S = 100.0


@contextlib.contextmanager
def tensorboard_server(log_dir: Path, log: Path) -> Iterator[str]:
    """Serve the runs below `log_dir` on a free port of this machine; what the server prints goes to the file `log`."""
    options = ("--logdir", str(log_dir), "--host", "127.0.0.1", "--port", "0", "--load_fast", "false")
    with open(log, "w") as file:
        server = subprocess.Popen([sys.executable, "-m", "tensorboard.main", *options], stdout=file, stderr=file)
    try:
        yield _address(server, log)
    finally:
        server.kill()
        server.wait()


def _address(server: subprocess.Popen, log: Path) -> str:
    deadline = time.monotonic() + START_S
    while not (found := re.search(r"http://127\.0\.0\.1:\d+/", log.read_text())):
        assert server.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.1)
    return found[0]
