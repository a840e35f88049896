"""The report in a real headless browser: nothing is loaded, everything is drawn, it fits a phone, light and dark.

tests/browser.py says which browser, and what happens without one.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.comparison.students import read_students
from pipeline.report.compare import measures_of
from pipeline.report.family import render_comparison, render_family
from pipeline.report.html_parts import LOADS_NOTHING
from pipeline.report.page import render
from pipeline.runtime.metrics import Metrics
from pipeline.runtime.run_paths import RunPaths
from tests import screenshots
from tests.browser import Browser, NoBrowserError, open_browser
from tests.unit import test_family_report, test_report
from tests.unit.made_up_run import make_family, make_run, points

FAMILY, COMPARED = "three students", "compared"
PHONES = (320, 360, 390, 430)  # CSS pixels
SMALLEST_TEXT_PX = 11.0
MOST_BYTES = 200_000  # of a picture in the documentation
PROBE = """(() => {
  const height = element => element.getBoundingClientRect().height;
  return {
    images: [...document.images].map(image => [image.complete, image.naturalWidth, height(image)]),
    resources: performance.getEntriesByType("resource").map(entry => entry.name),
    sections: [...document.querySelectorAll("section")].map(s => [s.querySelector("h2").textContent, height(s)]),
    plots: [...document.querySelectorAll("section svg")].map(height).filter(pixels => pixels > 0),
    strokes: [...new Set([...document.querySelectorAll("svg path")].map(path => getComputedStyle(path).stroke))],
    texts: document.querySelectorAll("svg text").length,
    links: [...document.querySelectorAll("nav a")].map(a => document.querySelector(a.getAttribute("href")) !== null),
  };
})()"""
# Every text that is shown, with its size on the screen: that of a picture is scaled with it.
LAYOUT = """(() => {
  document.querySelectorAll("details").forEach(details => details.open = true);
  const pixels = element => {
    const size = parseFloat(getComputedStyle(element).fontSize), matrix = element.ownerSVGElement && element.getScreenCTM();
    return matrix ? size * Math.hypot(matrix.a, matrix.b) : size;
  };
  const shown = [...document.querySelectorAll("body *")].filter(element => element.getClientRects().length);
  const texts = shown.filter(element => [...element.childNodes].some(node => node.nodeType === 3 && node.data.trim()));
  const boxes = shown.filter(element => !element.closest(".scroll *, pre, svg *"));
  return {
    smallest: Math.min(...texts.map(pixels)),
    in_pictures: texts.filter(element => element.ownerSVGElement).length,
    page_width: document.documentElement.scrollWidth,
    too_wide: boxes.filter(element => element.getBoundingClientRect().right > innerWidth + 0.5).map(e => e.outerHTML.slice(0, 90)),
  };
})()"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    try:
        with open_browser(tmp_path_factory.mktemp("browser") / "profile") as found:
            yield found
    except NoBrowserError as error:
        pytest.fail(str(error)) if os.environ.get("REPORT_BROWSER") else pytest.skip(str(error))


@pytest.fixture(scope="module", params=["one student", FAMILY, COMPARED])
def page(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("report")
    path = directory / f"{request.param}.html"
    if request.param == FAMILY:
        path.write_text(render_family(make_family(directory / "run")))
    elif request.param == COMPARED:
        students = read_students(make_family(directory / "run"))
        path.write_text(render_comparison(students, measures_of(students)[1:], "Chosen: deep."))
    else:
        path.write_text(render(make_run(directory / "run")))
    return path


def probed(browser: Browser, page: Path) -> dict[str, Any]:
    assert LOADS_NOTHING in page.read_text()
    browser.show(1100, 900)
    browser.open(page.as_uri())
    return browser.evaluate(PROBE)


def test_nothing_is_loaded_and_no_error_is_reported(browser: Browser, page: Path) -> None:
    seen = probed(browser, page)
    assert browser.console == []
    assert [name for name in seen["resources"] if not name.startswith("data:")] == []


def test_the_browser_tells_of_what_a_page_tries_to_load(browser: Browser, page: Path) -> None:
    """Without this the test above could not fail."""
    bad = page.with_name("bad.html")
    bad.write_text(
        page.read_text().replace("</body>", '<img src="https://example.invalid/x.png"><script>x()</script></body>')
    )
    browser.open(bad.as_uri())
    assert any("img-src" in line for line in browser.console)
    assert any("script" in line for line in browser.console)


def test_everything_is_drawn(browser: Browser, page: Path) -> None:
    seen = probed(browser, page)
    all_sections = list(test_report.SECTIONS if page.stem == "one student" else test_family_report.SECTIONS)
    sections = all_sections[:5] if page.stem == COMPARED else all_sections
    assert [title for title, _ in seen["sections"]] == sections
    assert all(height > 60 for _, height in seen["sections"])
    num_images = {"one student": 2, FAMILY: 3, COMPARED: 0}[page.stem]
    assert [(complete, width) for complete, width, _ in seen["images"]] == [
        (True, 8 + 1)
    ] * num_images  # a gap between heads
    assert (
        page.stem != "one student" or min(height for *_, height in seen["images"]) > 100
    )  # those of a family are folded
    assert len(seen["plots"]) == {"one student": 7, FAMILY: 10, COMPARED: 4}[page.stem]
    assert min(seen["plots"]) > 100
    assert seen["texts"] > 50
    assert {"rgb(29, 33, 41)", "rgb(47, 95, 208)"} & set(seen["strokes"]), "the plots have the colours of the page"
    assert seen["links"] == [True] * len(sections)


@pytest.mark.parametrize("width", [*PHONES, 600, 799, 800, 1100])
def test_it_fits_every_width_and_its_text_can_be_read(browser: Browser, page: Path, width: int) -> None:
    browser.show(width, 900)
    browser.open(page.as_uri())
    seen = browser.evaluate(LAYOUT)
    assert seen["too_wide"] == []
    assert seen["page_width"] == width
    assert seen["in_pictures"] > 15
    assert seen["smallest"] >= SMALLEST_TEXT_PX


def test_light_and_dark(browser: Browser, page: Path) -> None:
    brightness = []
    for dark in (False, True):
        picture = page.with_name(f"dark-{dark}.png")
        browser.show(1100, 1600, dark=dark)
        browser.open(page.as_uri())
        browser.screenshot(picture)
        pixels = np.asarray(Image.open(picture).convert("RGB"))
        assert pixels.shape[:2] == (1600, 1100)
        assert len(np.unique(pixels @ [1, 256, 65536])) > 200
        brightness.append(pixels.mean())
    assert brightness[0] > 200
    assert brightness[1] < 60


def test_pictures_of_the_report(browser: Browser, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    page.write_text(render(make_run(tmp_path / "run")))
    sizes = {}
    for path in screenshots.take_report(browser, page, tmp_path):
        assert path.stat().st_size < MOST_BYTES
        with Image.open(path) as picture:
            sizes[path.name] = picture.size
            assert len(picture.getcolors() or ()) > 20, "it shows something"
    assert sizes == {screenshots.REPORT: (1250, 1750), screenshots.PHONE: (780, 1688)}


def test_picture_of_tensorboard(browser: Browser, tmp_path: Path) -> None:
    """Its first screen answers the first question, without a click."""
    run_dir = tmp_path / "runs" / "quick"
    run_dir.mkdir(parents=True)
    metrics = Metrics(RunPaths(run_dir), active=True, first_step=0, steps=8)
    for point in points(8):
        tags = {tag: value for tag, value in point.items() if "/" in tag}
        metrics.write(int(point["step"]), int(point["samples"]), tags)
    metrics.close()
    path = screenshots.take_tensorboard(browser, run_dir.parent, tmp_path)
    groups = browser.evaluate("[...document.querySelectorAll('.group-title')].map(title => title.textContent.trim())")
    assert groups[:3] == ["Pinned", "1_is_it_learning", "2_is_it_fast"]
    assert path.stat().st_size < MOST_BYTES
    with Image.open(path) as picture:
        assert picture.size == (1440, 900)
        assert len(picture.getcolors() or ()) > 20
