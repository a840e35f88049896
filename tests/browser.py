"""A headless Chromium that tests drive over its DevTools pipe: page sizes of a phone, scripts in a page, screenshots.

In: `file:` and `http:` addresses. Out: values of JavaScript expressions, lines of the console, PNG pictures. Chromium's own
command line has no windows below 500 px; the DevTools protocol has.

Needs Chromium or Chrome on PATH, or its path in REPORT_BROWSER. Without one the tests skip; REPORT_BROWSER=require makes
them fail instead.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
OPTIONS = (
    *(
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-3d-apis",
        "--disable-dev-shm-usage",
        "--no-first-run",
        "--hide-scrollbars",
    ),
    *("--disable-background-networking", "--disable-component-update", "--remote-debugging-pipe"),
)
NO_NETWORK = "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"
ANSWER_S = 60.0
# The protocol has the file descriptors 3 and 4. They may be in use here, so the process that becomes the browser sets them.
START = """
import fcntl, os, sys
reads, writes = (fcntl.fcntl(int(number), fcntl.F_DUPFD, 10) for number in sys.argv[1:3])
os.dup2(reads, 3)
os.dup2(writes, 4)
os.execv(sys.argv[3], sys.argv[3:])
"""


class NoBrowserError(Exception):
    """There is no browser here."""


def browser_path() -> str:
    """Path of the browser. Raises `NoBrowserError` with what to install."""
    setting = os.environ.get("REPORT_BROWSER", "")
    given = [setting] if setting and setting != "require" else list(NAMES)
    if found := next((path for name in given if (path := shutil.which(name))), None):
        return found
    raise NoBrowserError(
        f"no browser ({', '.join(given)}): apt-get install chromium, or set REPORT_BROWSER to its path"
    )


class Browser:
    """One tab of a headless browser. `console`: what the page of the last `open` wrote there, with blocked requests."""

    def __init__(self, profile: Path) -> None:
        to_browser, self._write = os.pipe()
        self._read, from_browser = os.pipe()
        command = [browser_path(), *OPTIONS, NO_NETWORK, f"--user-data-dir={profile}", "about:blank"]
        with open(profile.with_name(f"{profile.name}.log"), "wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-S", "-c", START, str(to_browser), str(from_browser), *command],
                stdout=log, stderr=log, pass_fds=(to_browser, from_browser),
            )  # fmt: skip
        os.close(to_browser)
        os.close(from_browser)
        self._buffer, self._number, self._session = b"", 0, ""
        self._events: list[dict[str, Any]] = []
        self.console: list[str] = []
        targets = self.ask("Target.getTargets")["targetInfos"]
        tab = next(target["targetId"] for target in targets if target["type"] == "page")
        self._session = self.ask("Target.attachToTarget", targetId=tab, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.ask(f"{domain}.enable")

    def close(self) -> None:
        with contextlib.suppress(OSError):
            os.close(self._write)  # Chromium ends when its pipe does
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(10)
        self._process.kill()
        self._process.wait()
        os.close(self._read)

    def ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One command of the DevTools protocol and its result."""
        self._number += 1
        session = {"sessionId": self._session} if self._session else {}
        message = {"id": self._number, "method": method, "params": parameters, **session}
        os.write(self._write, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + ANSWER_S
        while True:
            answer = self._next(deadline)
            if answer.get("id") == self._number:
                assert "result" in answer, f"{method}: {answer.get('error')}"
                return answer["result"]
            self._events.append(answer)

    def _next(self, deadline: float) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._read], [], [], max(deadline - time.monotonic(), 0))
            data = os.read(self._read, 2**16) if ready else b""
            assert data, f"the browser did not answer within {ANSWER_S:.0f} s, or has ended ({self._process.poll()})"
            self._buffer += data
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)

    def show(self, width: int, height: int, scale: float = 1.0, dark: bool = False) -> None:
        """Set the size of the page in CSS pixels, pixels of a picture for each of them, and the colour scheme."""
        size = {"width": width, "height": height, "deviceScaleFactor": scale, "mobile": width < 600}
        self.ask("Emulation.setDeviceMetricsOverride", **size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.ask("Emulation.setEmulatedMedia", features=[scheme])

    def open(self, address: str) -> None:
        """Open an address and wait until it is loaded."""
        self._events.clear()
        self.ask("Page.navigate", url=address)
        self.wait("document.readyState === 'complete' && location.href !== 'about:blank'")
        self.console = list(_lines(self._events))

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression, which JSON can express."""
        done = self.ask("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in done, done["exceptionDetails"]
        return done["result"].get("value")

    def wait(self, expression: str, timeout_s: float = ANSWER_S) -> None:
        """Wait until an expression is true."""
        deadline = time.monotonic() + timeout_s
        while not self.evaluate(expression):
            assert time.monotonic() < deadline, f"not true within {timeout_s:.0f} s: {expression}"
            time.sleep(0.1)

    def screenshot(self, path: Path) -> None:
        """Write what the page shows as a PNG."""
        path.write_bytes(base64.b64decode(self.ask("Page.captureScreenshot", format="png")["data"]))


def _lines(events: list[dict[str, Any]]) -> Iterator[str]:
    for event in events:
        about = event.get("params", {})
        if event.get("method") == "Log.entryAdded":
            yield about["entry"]["text"]
        elif event.get("method") in ("Runtime.exceptionThrown", "Runtime.consoleAPICalled"):
            yield json.dumps(about)


@contextlib.contextmanager
def open_browser(profile: Path) -> Iterator[Browser]:
    """A browser that is closed at the end. `profile`: a directory of its own, which it makes."""
    browser = Browser(profile)
    try:
        yield browser
    finally:
        browser.close()
