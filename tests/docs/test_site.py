"""The documentation as a site: every page is reached, links and anchors have a target, nothing is loaded from elsewhere.

In: mkdocs.yml and the environment that `make docs` makes. Out: a strict build in a directory of its own, which a parser and a real
browser read. The Python of another environment with requirements-docs.txt may be named in DOCS_PYTHON.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
import yaml
from PIL import Image

import minilmv2
from tests.browser import Browser
from tests.conftest import REPO
from tests.docs.documents import DOCUMENTS, relative
from tests.unit.test_report_in_browser import browser

__all__ = ["browser"]  # a fixture

PYTHON = Path(os.environ.get("DOCS_PYTHON", REPO / ".docs-venv" / "bin" / "python"))
with_mkdocs = pytest.mark.skipif(not PYTHON.exists(), reason="`make docs` installs mkdocs")
GENERATED = {"docs/reference.md"}
LOADING = {"script": "src", "img": "src", "iframe": "src", "source": "srcset", "video": "src", "object": "data"}
# The pages as CommonMark renders them; formulas are the same placeholders in both.
EXPECTED = """
import json, sys
from pathlib import Path
from markdown_it import MarkdownIt
sys.path.insert(0, "docs/site")
from dialect import put_formulas, take_formulas
markdown = MarkdownIt("commonmark", {"html": True}).enable("table")
pages = {}
for name in sys.argv[1:]:
    formulas = []
    text = take_formulas(Path(name).read_text(encoding="utf-8"), formulas)
    pages[name] = put_formulas(markdown.render(text), formulas)
print(json.dumps(pages))
"""
MORE_LINKS = """
[a](no_such.md) [b](method.md#no-such) `slurm/site.env` [a notebook](../first.ipynb) [a folder](../slurm) [data](site/archive.bin)

<details>
<summary>More</summary>

- a **folded** item

</details>
"""
PNG = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNgAAAAAgABSK+kcQAAAABJRU5ErkJggg=="
NOTEBOOK = {
    "cells": [
        {"cell_type": "markdown", "source": ["## A heading"]},
        {
            "cell_type": "code",
            "source": ["print(6 * 7)"],
            "outputs": [{"text": ["42\n"]}, {"data": {"image/png": PNG + "\n", "text/plain": ["<Figure>"]}}],
        },
    ]
}
# What is loaded, and the width of what a reader can scroll to.
PROBE = """({
  width: document.documentElement.scrollWidth,
  loaded: performance.getEntriesByType("resource").map(entry => entry.name),
})"""


@dataclass
class Built(HTMLParser):
    """What a page contains: its links, its anchors, what it loads, its text, and how often each tag occurs in the text."""

    links: list[str] = field(default_factory=list)
    anchors: set[str] = field(default_factory=set)
    loads: list[str] = field(default_factory=list)
    text: list[str] = field(default_factory=list)
    tags: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__init__()
        self._in_permalink = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.tags[tag] = self.tags.get(tag, 0) + 1
        self.anchors |= {values[name] for name in ("id", "name") if values.get(name)}
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
            self._in_permalink = values.get("class") == "headerlink"
        if tag == "link" and values.get("rel") in ("stylesheet", "icon", "preload", "preconnect", "modulepreload"):
            self.loads.append(values["href"])
        if values.get(LOADING.get(tag, "")):
            self.loads.append(values[LOADING[tag]])

    def handle_endtag(self, tag: str) -> None:
        self._in_permalink = self._in_permalink and tag != "a"

    def handle_data(self, data: str) -> None:
        if not self._in_permalink:
            self.text.append(data)


def parsed(text: str) -> Built:
    page = Built()
    page.feed(text)
    return page


def navigation(entries: list) -> list[str]:
    """The pages of a navigation, in order."""
    pages: list[str] = []
    for entry in entries:
        for value in entry.values():
            pages += navigation(value) if isinstance(value, list) else [value]
    return pages


def build(checkout: Path, output: Path) -> subprocess.CompletedProcess[str]:
    command = [str(PYTHON), "-m", "mkdocs", "build", "--strict", "--site-dir", str(output)]
    settings = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run(command, cwd=checkout, env=settings, capture_output=True, text=True, timeout=200, check=False)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built strictly: a warning ends the build."""
    directory = tmp_path_factory.mktemp("built") / "site"
    done = build(REPO, directory)
    assert done.returncode == 0, done.stderr[-4000:]
    return directory


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[str, Built]:
    return {
        path.relative_to(site).as_posix(): parsed(path.read_text(encoding="utf-8"))
        for path in sorted(site.rglob("*.html"))
    }


def test_every_document_is_in_the_navigation() -> None:
    named = navigation(yaml.safe_load((REPO / "mkdocs.yml").read_text(encoding="utf-8"))["nav"])
    assert len(named) == len(set(named))
    assert {name for name in named if not (REPO / name).is_file()} == GENERATED
    documents = {relative(path) for path in (REPO / "docs").glob("*.md")}
    assert {name for name in named if name.startswith("docs/")} == documents | GENERATED
    assert named[0] == "README.md"


def test_an_environment_that_cannot_be_made_is_explained(tmp_path: Path) -> None:
    for name in ("Makefile", "requirements-docs.txt"):
        shutil.copy(REPO / name, tmp_path)
    command = ["make", "docs", "PYTHON=false"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    what, fix = done.stderr.splitlines()[:2]
    assert what.startswith("error: the packages of requirements-docs.txt could not be installed")
    assert fix.startswith("fix: ")
    assert not (tmp_path / ".docs-venv" / ".installed").exists()


@with_mkdocs
def test_every_link_has_a_target(site: Path, pages: dict[str, Built]) -> None:
    broken, checked = [], 0
    for name, page in pages.items():
        for link in page.links:
            if re.match(r"[a-z]+:", link) or name == "404.html":  # 404.html is shown at any address
                continue
            file, _, anchor = unquote(link).partition("#")
            target = os.path.normpath(Path(name).parent / file) if file else name
            checked += 1
            anchors = pages[target].anchors if target in pages else {anchor}
            if not (site / target).is_file() or (anchor and anchor not in anchors):
                broken.append((name, link))
    assert not broken
    assert checked > 2000
    assert pages["docs/recipes.html"].links.count("../recipes/quickstart.yaml.html") >= 1
    assert "../benchmarks/results/2026-11-27-gpu-h200.html" in pages["docs/method.html"].links


@with_mkdocs
def test_no_page_names_anything_elsewhere_to_load(site: Path, pages: dict[str, Built]) -> None:
    loads = {load for page in pages.values() for load in page.loads}
    assert [load for load in loads if re.match(r"(https?:)?//", load)] == []
    assert any("iframe-worker.js" in load for load in loads)
    for path in site.rglob("*.css"):
        assert not re.search(r"(url\(|@import)\s*[\"']?(https?:)?//", path.read_text(encoding="utf-8")), path


@with_mkdocs
def test_pages_are_what_the_repository_page_shows(site: Path, pages: dict[str, Built]) -> None:
    """Text, lists, tables, blocks of code and headings are those of CommonMark."""
    names = sorted({relative(path) for path in DOCUMENTS if path.parent in (REPO, REPO / "docs")} | {"docs/log.md"})
    command = [str(PYTHON), "-c", EXPECTED, *names]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=100, check=True)
    tags = ("h1", "h2", "h3", "h4", "ol", "ul", "li", "pre", "table", "tr", "td", "strong", "em", "math", "img")
    for name, expected in json.loads(done.stdout).items():
        built = "index.html" if name == "README.md" else f"{name.removesuffix('.md')}.html"
        article = re.search(r"<article.*?</article>", (site / built).read_text(encoding="utf-8"), re.DOTALL)
        assert article
        is_now, is_meant = parsed(article[0]), parsed(expected)
        assert "".join("".join(is_now.text).split()) == "".join("".join(is_meant.text).split()), name
        assert {tag: is_now.tags.get(tag, 0) for tag in tags} == {tag: is_meant.tags.get(tag, 0) for tag in tags}, name


@with_mkdocs
def test_the_reference_has_every_public_name(site: Path, pages: dict[str, Built]) -> None:
    page = pages["docs/reference.html"]
    assert {f"minilmv2.{name}" for name in minilmv2.__all__} <= page.anchors
    text = " ".join("".join(page.text).split())
    assert "num_relation_heads (int) – A; must divide both widths" in text
    assert "A does not divide a width, or there is no such backend" in text
    links = pages["docs/api.html"].links
    assert [f"reference.html#minilmv2.{name}" in links for name in minilmv2.__all__] == [True] * 10


@with_mkdocs
def test_a_broken_link_ends_the_build_and_a_private_file_is_left_out(tmp_path: Path) -> None:
    checkout = tmp_path / "checkout"
    checkout.mkdir()
    for name in ("mkdocs.yml", *(path.name for path in REPO.glob("*.md"))):
        shutil.copy(REPO / name, checkout)
    for name in ("docs", "minilmv2", "slurm", "benchmarks/results"):
        shutil.copytree(REPO / name, checkout / name, ignore=shutil.ignore_patterns("__pycache__"))
    settings = yaml.safe_load((checkout / "mkdocs.yml").read_text(encoding="utf-8"))
    settings |= {"plugins": ["search"], "watch": []}  # without the reference, which takes most of the time
    (checkout / "mkdocs.yml").write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
    (checkout / "docs" / "site" / "archive.bin").write_bytes(b"\xff\x00")
    (checkout / "slurm" / "site.env").write_text("TOKEN=secret-of-the-site\n", encoding="utf-8")
    page = checkout / "docs" / "faq.md"
    page.write_text(page.read_text(encoding="utf-8") + MORE_LINKS, encoding="utf-8")
    (checkout / "first.ipynb").write_text(json.dumps(NOTEBOOK), encoding="utf-8")
    done = build(checkout, tmp_path / "site")
    assert done.returncode == 1, done.stderr
    assert "no_such.md" in done.stderr, done.stderr
    assert "method.md#no-such" in done.stderr
    assert not re.search(r"first\.ipynb|'\.\./slurm'|archive\.bin", done.stderr)
    notebook = parsed((tmp_path / "site" / "first.ipynb.html").read_text(encoding="utf-8"))
    text = "".join(notebook.text)
    assert all(part in text for part in ("A heading", "print(6 * 7)", "\n42\n"))
    assert f"data:image/png;base64,{PNG}" in notebook.loads
    faq = (tmp_path / "site" / "docs" / "faq.html").read_text(encoding="utf-8")
    assert re.search(
        r"<summary>More</summary>\s*<ul>\s*<li>a <strong>folded</strong> item</li>\s*</ul>\s*</details>", faq
    )
    assert "distill_xlmr.sh" in (tmp_path / "site" / "slurm" / "index.html").read_text(encoding="utf-8")
    assert (tmp_path / "site" / "docs" / "site" / "archive.bin").read_bytes() == b"\xff\x00"
    assert "secret-of-the-site" not in "".join(
        path.read_text(encoding="utf-8") for path in (tmp_path / "site").rglob("*") if path.suffix in (".html", ".env")
    )


@with_mkdocs
def test_search_works_from_the_file_system(browser: Browser, site: Path) -> None:
    browser.show(1280, 800)
    browser.open(f"{(site / 'docs' / 'faq.html').as_uri()}?q=relation+heads")
    browser.wait("document.querySelectorAll('.md-search-result__link').length > 3")
    found = browser.evaluate("[...document.querySelectorAll('.md-search-result__link')].map(link => link.href)")
    assert any("docs/recipes.html" in link for link in found)
    assert browser.console == []


@with_mkdocs
def test_the_picture_of_the_site(browser: Browser, site: Path, tmp_path: Path) -> None:
    """WRITE_PICTURES=yes replaces docs/images/site.png, which is to be looked at before it is committed."""
    picture = tmp_path / "site.png"
    browser.show(1280, 800)
    browser.open((site / "index.html").as_uri())
    browser.screenshot(picture)
    kept = REPO / "docs" / "images" / "site.png"
    if os.environ.get("WRITE_PICTURES"):
        shutil.copy(picture, kept)
    taken, shown = (np.asarray(Image.open(path).convert("L"), dtype=float) for path in (picture, kept))
    assert taken.shape == shown.shape == (800, 1280)
    assert kept.stat().st_size < 200_000
    assert 20 < taken[60:].std() < 100, "text on a light ground"
    # The header is alike; the text of the README may have changed since.
    assert abs(taken[:48] - shown[:48]).mean() < 10


@with_mkdocs
@pytest.mark.parametrize("width", [320, 430])
def test_pages_fit_a_phone_and_load_only_the_site(browser: Browser, site: Path, width: int) -> None:
    browser.show(width, 800)
    wide, loaded = [], set()
    for path in (site / "index.html", *sorted((site / "docs").glob("*.html"))):
        browser.open(path.as_uri())
        seen = browser.evaluate(PROBE)
        wide += [path.name] if seen["width"] > width else []
        loaded |= {name.split(":")[0] for name in seen["loaded"]}
        assert browser.console == [], path.name
    assert wide == []
    assert loaded <= {"file", "data"}
