"""The report in a real headless browser: nothing is loaded, no error is reported, everything is drawn, light and dark.

Needs Chromium or Chrome on PATH, or its path in REPORT_BROWSER. Without one the tests skip; REPORT_BROWSER=require
makes them fail instead.
"""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.report.family import render_family
from pipeline.report.html_parts import LOADS_NOTHING
from pipeline.report.page import render
from tests.unit import test_family_report, test_report
from tests.unit.made_up_run import make_family, make_run

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
OPTIONS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--hide-scrollbars"),
    *("--disable-background-networking", "--disable-component-update", "--enable-logging=stderr"),
    "--host-resolver-rules=MAP * ~NOTFOUND",
)
FAMILY_PAGE = "family.html"
# What only a script inside the page can find. The page itself has no script and its policy forbids scripts.
PROBE = """<script>
const problems = [];
addEventListener("error", event => problems.push("error: " + event.message), true);
addEventListener("securitypolicyviolation", event => problems.push("blocked: " + event.blockedURI));
addEventListener("load", () => {
  const height = element => element.getBoundingClientRect().height;
  const report = {
    problems,
    images: [...document.images].map(image => [image.complete, image.naturalWidth, height(image)]),
    resources: performance.getEntriesByType("resource").map(entry => entry.name),
    sections: [...document.querySelectorAll("section")].map(s => [s.querySelector("h2").textContent, height(s)]),
    plots: [...document.querySelectorAll("section svg")].map(height),
    strokes: [...new Set([...document.querySelectorAll("svg path")].map(path => getComputedStyle(path).stroke))],
    texts: document.querySelectorAll("svg text").length,
    too_wide: document.documentElement.scrollWidth > innerWidth,
    links: [...document.querySelectorAll("nav a")].map(a => document.querySelector(a.getAttribute("href")) !== null),
  };
  const out = document.createElement("pre");
  out.id = "probe";
  out.textContent = JSON.stringify(report);
  document.body.append(out);
});
</script>"""


@pytest.fixture(scope="module")
def browser() -> str:
    setting = os.environ.get("REPORT_BROWSER", "")
    given = [setting] if setting and setting != "require" else NAMES
    found = next((path for name in given if (path := shutil.which(name))), None)
    if found is None:
        message = (
            f"no browser to open the report in ({', '.join(given)}): apt-get install chromium, or set REPORT_BROWSER"
        )
        pytest.fail(message) if setting else pytest.skip(message)
    return found


@pytest.fixture(scope="module", params=["one student", "three students"])
def page(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("report")
    is_one = request.param == "one student"
    path = directory / ("report.html" if is_one else FAMILY_PAGE)
    path.write_text(render(make_run(directory / "run")) if is_one else render_family(make_family(directory / "run")))
    return path


def browse(browser: str, page: Path, *options: str) -> tuple[str, str]:
    """Standard output and errors of one headless visit, with a separate profile."""
    profile = f"--user-data-dir={page.parent / 'profile'}"
    command = [browser, *OPTIONS, profile, *options, page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout, done.stderr


def probed(browser: str, page: Path) -> dict[str, Any]:
    """What a script finds in a copy of the page, and the lines of the console."""
    text = page.read_text()
    assert LOADS_NOTHING in text
    copy = page.with_name("probed.html")
    allowed = text.replace(LOADS_NOTHING, f"{LOADS_NOTHING}; script-src 'unsafe-inline'")
    copy.write_text(allowed.replace("</head>", PROBE + "</head>"))
    dom, errors = browse(browser, copy, "--dump-dom", "--window-size=1100,900")
    found = re.search(r'<pre id="probe">(.*?)</pre>', dom, re.DOTALL)
    assert found, errors[-2000:]
    console = [line for line in errors.splitlines() if "CONSOLE" in line]
    return {**json.loads(html.unescape(found[1])), "console": console}


def test_nothing_is_loaded_and_no_error_is_reported(browser: str, page: Path) -> None:
    seen = probed(browser, page)
    assert (seen["problems"], seen["console"]) == ([], [])
    assert [name for name in seen["resources"] if not name.startswith("data:")] == []


def test_everything_is_drawn(browser: str, page: Path) -> None:
    seen, is_family = probed(browser, page), page.name == FAMILY_PAGE
    sections = test_family_report.SECTIONS if is_family else test_report.SECTIONS
    assert [title for title, _ in seen["sections"]] == list(sections)
    assert all(height > 60 for _, height in seen["sections"])
    assert [(complete, width) for complete, width, _ in seen["images"]] == [(True, 8)] * (3 if is_family else 2)
    folded = [height for *_, height in seen["images"]]
    assert is_family or min(folded) > 100
    assert len(seen["plots"]) == (10 if is_family else 7)
    assert min(seen["plots"]) > 100
    assert seen["texts"] > 50
    assert {"rgb(29, 33, 41)", "rgb(47, 95, 208)"} <= set(seen["strokes"]), "the plots have the colours of the page"
    assert seen["links"] == [True] * len(sections)
    assert not seen["too_wide"]


def test_light_and_dark(browser: str, page: Path) -> None:
    brightness = []
    for scheme in (1, 0):  # Chromium's numbers for light and dark
        picture = page.with_name(f"scheme{scheme}.png")
        options = [
            f"--screenshot={picture}",
            "--window-size=1100,1600",
            f"--blink-settings=preferredColorScheme={scheme}",
        ]
        browse(browser, page, *options)
        pixels = np.asarray(Image.open(picture).convert("RGB"))
        assert pixels.shape[:2] == (1600, 1100)
        assert len(np.unique(pixels @ [1, 256, 65536])) > 200
        brightness.append(pixels.mean())
    assert brightness[0] > 200
    assert brightness[1] < 60
