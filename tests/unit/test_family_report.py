"""The report of a made-up run with three students: one chart per measure, a section per student, and safe."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from pipeline.__main__ import main
from pipeline.comparison.students import read_students
from pipeline.errors import UserError
from pipeline.report.family import render_family
from pipeline.report.page import render
from pipeline.report.plots import overlaid
from pipeline.report.timeline import Events, cost, events_of
from pipeline.runtime.checkpoint_files import checkpoint_path, committed_steps
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
        assert section.count("<svg") == 2, "for wide pages and for phones"
        assert section.count('<g id="axes_') == 2 * panels
        for name, color in (("deep", "c0"), ("flat", "c1"), ("late", "c2")):
            assert f'solid var(--{color})"></i>{name}</li>' in section
            assert section.count(f"stroke: var(--{color})") >= 2 * panels, "a curve in each panel"


def test_more_students_than_colours_have_dashes() -> None:
    curves = {f"s{number}": [(0, 1.0), (5, number + 1.0)] for number in range(8)}
    svg = overlaid({"loss": curves})
    styles = re.findall(r'style="(fill: none;[^"]*var\(--c\d\)[^"]*)"', svg)
    assert len(styles) == 2 * 8, "in both pictures"
    assert len(set(styles)) == 8
    assert len(set(re.findall(r"border-top:3px (\w+ var\(--c\d\))", svg))) == 8, "and in the legend"


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


def restarts_of(family: Path, *starts: tuple[float, int, list[int], str | None]) -> None:
    """Write the attempts: time, first step, saved steps, how it ended."""
    keys = ("time_s", "first_step", "saved_steps", "ended")
    attempts = [{**dict(zip(keys, start, strict=True)), "world_size": 1} for start in starts]
    (family / "restarts.json").write_text(json.dumps(attempts))


def events_of_student(family: Path, name: str) -> Events:
    (student,) = (student for student in read_students(family) if student.name == name)
    return events_of(family, student.points, committed_steps(student.paths.checkpoints), name)


FIRST, LATE = (999.0, 0, [4, 8], "DONE"), (2000.0, 0, [2], None)


def test_a_student_that_was_added_later_has_its_own_time_and_checkpoints(family: Path) -> None:
    restarts_of(family, FIRST, LATE)
    late = events_of_student(family, "late")
    assert late.saved_steps == [2]
    assert cost(read_students(family)[2].points, late, {}, None)["wall clock, first start to last line"] == "6 s"
    assert events_of_student(family, "deep").saved_steps == [4, 8]
    shutil.rmtree(family / "checkpoints-2")
    restarts_of(family, FIRST, (2000.0, 0, [], None))
    assert events_of_student(family, "late").saved_steps == [], "before its first checkpoint"


def test_the_page_of_all_has_the_checkpoints_and_rows_of_every_group(family: Path) -> None:
    restarts_of(family, FIRST, (2000.0, 0, [2], None))
    checkpoint_path(family / "checkpoints-2", 2).rename(checkpoint_path(family / "checkpoints-2", 4))
    late = RunPaths(family, "late").metrics
    late.write_text(
        late.read_text() + json.dumps({"step": 4, "samples": 64, "time_s": 2010.0, "loss/total": 1.0}) + "\n"
    )
    restarts_of(family, FIRST, (2000.0, 0, [4], None))
    points = sorted(
        (point for student in read_students(family) for point in student.points if "loss/total" in point),
        key=lambda point: point["time_s"],
    )
    events = events_of(family, points, [4, 8])
    assert [step for _, step in events.saved] == [4, 8, 4]
    assert events.saved_steps == [4, 8]
    page = render_family(family)
    assert "<td>rows that the students saw</td><td>192</td>" in page, "128 of the first group, 64 of the second"
    assert "<td>tokens that the students saw</td><td>24,576</td>" in page


@pytest.mark.parametrize(
    ("starts", "attempts"),
    [
        ([FIRST, LATE], (1, 1, 1)),
        ([FIRST, (1990.0, 0, [], None), LATE], (1, 1, 2)),
        ([FIRST, LATE, (2050.0, 2, [], None)], (1, 1, 2)),
        ([FIRST, LATE, (2050.0, 2, [], None), (2060.0, 2, [], None)], (1, 1, 3)),
        ([(990.0, 0, [], None), FIRST, LATE], (2, 2, 1)),
        ([FIRST, (1010.0, 4, [8], "DONE"), LATE], (2, 1, 1)),
    ],
)
def test_an_attempt_that_ended_before_any_report_is_one_of_the_students_that_it_trained(
    family: Path, starts: list[tuple[float, int, list[int], str | None]], attempts: tuple[int, int, int]
) -> None:
    restarts_of(family, *starts)
    assert tuple(len(events_of_student(family, name).attempts) for name in ("deep", "flat", "late")) == attempts


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
