"""The report of a made-up run with three students: one chart per measure, a section per student, and safe."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from pipeline.__main__ import main
from pipeline.errors import UserError
from pipeline.report.family import render_family
from pipeline.report.page import render
from pipeline.report.plots import overlaid
from pipeline.runtime.run_paths import RunPaths
from tests.unit.made_up_run import make_family, make_run
from tests.unit.test_report import TagBalance

SECTIONS = (
    *(
        "Students",
        "Held-out loss",
        "Loss",
        "Learning rate and health",
        "Throughput",
        "Where the time goes",
        "Time line",
    ),
    *("Cost", "Student deep", "Student flat", "Student late", "Recipe"),
)


@pytest.fixture
def family(tmp_path: Path) -> Path:
    return make_family(tmp_path / "fam <b>ily")


def check_markup(page: str) -> TagBalance:
    parser = TagBalance()
    parser.feed(page)
    assert parser.open == []
    assert not re.search(r"<script|<img[^>]*onerror", page)
    assert not re.search(r"url\((?!#)", page)
    return parser


def test_the_page_shows_the_students_side_by_side(family: Path) -> None:
    page = render_family(family)
    assert re.findall("<h2>(.*?)</h2>", page) == list(SECTIONS)
    for text in (
        "3 students of some/&lt;b&gt;teacher",
        "<td>deep</td><td>8</td><td>0.3750</td><td>0.6250</td><td>0.5000 (4)</td>",
        "<td>ended at step 4: no better held-out loss for 1 evaluation</td>",
        "<td>student.layers</td><td>4</td><td>2</td><td>1</td>",
        "2 start(s)",
    ):
        assert text in page, text
    loaded = [address[:22] for address in check_markup(page).addresses if not address.startswith("#")]
    assert loaded == ["data:,"] + ["data:image/png;base64,"] * 3
    assert "#01000" not in page, "a placeholder colour was not replaced"
    ids = re.findall(r'<section id="(.*?)"', page)
    assert len(set(ids)) == len(SECTIONS)


def test_every_chart_has_a_curve_per_student(family: Path) -> None:
    sections = re.findall(r"<section.*?</section>", render_family(family), re.DOTALL)
    for title, panels in (("Held-out loss", 1), ("Loss", 2), ("Learning rate and health", 2), ("Throughput", 1)):
        (section,) = (text for text in sections if f"<h2>{title}</h2>" in text)
        assert section.count("<svg") == 1
        assert section.count('<g id="axes_') == panels
        for name, color in (("deep", "c0"), ("flat", "c1"), ("late", "c2")):
            assert f">{name}</text>" in section
            assert section.count(f"stroke: var(--{color})") >= panels + 1, "a curve in each panel, and in the legend"


def test_more_students_than_colours_have_dashes() -> None:
    curves = {f"s{number}": [(0, 1.0), (5, number + 1.0)] for number in range(8)}
    svg = overlaid({"loss": curves})
    styles = re.findall(r'style="(fill: none;[^"]*var\(--c\d\)[^"]*)"', svg)
    assert len(styles) == 2 * 8
    assert len(set(styles)) == 8


def test_one_student_of_a_family_has_a_page_like_a_run_with_one(family: Path, tmp_path: Path) -> None:
    main(["report", str(family), "--student", "deep"])
    page = (family / "students" / "deep" / "report.html").read_text()
    check_markup(page)
    assert "fam &lt;b&gt;ily, deep" in page
    assert "1 start(s)" in page, "the second start trained another student"
    assert "1 start(s)" in render(family, "late")
    alone = re.findall("<h2>(.*?)</h2>", render(make_run(tmp_path / "alone")))
    assert re.findall("<h2>(.*?)</h2>", page) == [title for title in alone if not title.startswith("Retrieval")]
    for wrong, message in (
        ([str(tmp_path / "alone"), "--student", "x"], "one student"),
        ([str(family), "--student", "x"], "deep"),
    ):
        with pytest.raises(UserError, match=message):
            main(["report", *wrong])


def test_the_command_writes_the_page_of_all(family: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["report", str(family)])
    assert (family / "report.html").read_text() == render_family(family)
    assert "report.html" in capsys.readouterr().out


def test_a_family_that_has_just_started(family: Path) -> None:
    for name in ("flat", "late"):
        (family / "students" / name / "metrics.jsonl").unlink()
    page = render_family(family)
    assert "Student deep" in page
    assert "Student flat" not in page
    assert "<td>flat</td><td>0</td><td>-</td>" in page
    RunPaths(family, "deep").metrics.write_text('{"step": 1, "samp')
    with pytest.raises(UserError, match="have not reported anything yet"):
        render_family(family)


def test_nothing_of_a_family_becomes_markup(family: Path) -> None:
    """Names of directories, values of recipes, reasons and tags are text from outside."""
    hostile = "<img src=x onerror=alert(1)>\"'<script>alert(2)</script>"
    (family / "students" / "deep").rename(family / "students" / "<script>x<|script>")
    state = family / "checkpoints" / "step-00000008" / "flat" / "state.json"
    state.write_text(json.dumps({"step": 8, "ended": {"step": 4, "reason": hostile}}))
    metrics = family / "students" / "flat" / "metrics.jsonl"
    lines = [json.loads(line) | {f"loss/{hostile}": 1.0} for line in metrics.read_text().splitlines()]
    metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    recipe = family / "students" / "late" / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("data: artifacts/shards", f"data: {json.dumps(hostile)}"))
    page = render_family(family)
    assert "x" not in check_markup(page).addresses
    assert page.count(hostile[:5].replace("<", "&lt;")) > 2
