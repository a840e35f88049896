"""The report of a made-up run: complete, well-formed, self-contained, safe, and clear about what is missing."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml

from pipeline.__main__ import main
from pipeline.errors import UserError
from pipeline.report.page import read_metrics, render
from pipeline.report.timeline import cost, duration, events_of, pauses
from pipeline.runtime.run_paths import RunPaths
from tests.unit.made_up_run import make_run, points

VOID_TAGS = {"meta", "br", "img", "link"}
SECTIONS = (
    *(
        "Loss",
        "Held-out loss per language",
        "Retrieval before and after",
        "Throughput",
        "Where the time goes",
        "Learning rate and health",
    ),
    *("Time line", "Relation maps", "Cost", "Recipe"),
)


class TagBalance(HTMLParser):
    """Raises when a closing tag does not match the innermost open tag."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.addresses += [value or "" for name, value in attributes if name in ("src", "href", "xlink:href")]
        if tag not in VOID_TAGS:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.addresses += [value or "" for name, value in attributes if name in ("src", "href", "xlink:href")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return make_run(tmp_path / "quick <b>start")


def test_the_page_is_well_formed_and_loads_nothing(run_dir: Path) -> None:
    page = render(run_dir)
    parser = TagBalance()
    parser.feed(page)
    assert parser.open == []
    loaded = [address[:22] for address in parser.addresses if not address.startswith("#")]
    assert loaded == ["data:,"] + ["data:image/png;base64,"] * 2
    assert "default-src 'none'" in page
    assert "<script" not in page
    assert "quick &lt;b&gt;start" in page
    assert not re.search(r"url\((?!#)", page)


def test_the_page_has_the_figures_of_the_run(run_dir: Path) -> None:
    page = render(run_dir)
    for text in (
        '<p class="state finished"><b>finished</b> All 8 steps are done.</p>',
        "3.000 → 0.625",
        "0.700 → 0.875",
        "1,000",
        "q-q, step 8",
        "<td>th</td>",
        "16,384",
        "2 start(s)",
        "2 x NVIDIA H200",
        "12.2%",
        "relation loss",
    ):
        assert text in page, text
    assert re.findall("<h2>(.*?)</h2>", page) == list(SECTIONS)
    assert page.count("<svg") == 2 * 7, "a wide and a narrow picture of each"
    assert "#01000" not in page, "a placeholder colour was not replaced"


def test_a_run_that_has_just_started(run_dir: Path) -> None:
    (run_dir / "metrics.jsonl").write_text(json.dumps(points(1)[0]) + '\n{"step": 1, "samp')
    for name in ("DONE", "recipe.yaml", "retrieval/teacher.json", "retrieval/before.json", "retrieval/after.json"):
        (run_dir / name).unlink()
    page = render(run_dir)
    assert '<div class="fact">step<b>0</b></div>' in page
    assert "<b>failed</b> No process trains it" in page
    assert "Retrieval before" not in page


def test_retrieval_of_an_evaluation(run_dir: Path) -> None:
    """The file that slurm/evaluate.sh writes, with a third model that is not of this run."""
    stages = {path.stem: json.loads(path.read_text())["result"] for path in (run_dir / "retrieval").iterdir()}
    shutil.rmtree(run_dir / "retrieval")
    (run_dir / "recipe.yaml").write_text("teacher: some/teacher\nseq_len: 128\n")
    student = "elsewhere/quick <b>start/student"
    results = {student: stages["after"], "other": stages["before"], "some/teacher@19": stages["teacher"]}
    models = {name: {"fingerprint": "x", "steps": 8 if name == student else None} for name in results}
    (run_dir / "evaluation").mkdir()
    report = run_dir / "evaluation" / "evaluation.json"
    report.write_text(json.dumps({"models": models, "tasks": {"retrieval": results}}))
    page = render(run_dir)
    assert "<h2>Retrieval</h2>" in page
    assert '<div class="fact">retrieval<b>0.875</b></div>' in page
    rows = re.findall(r"<tr><td>(\w+)</td><td>output</td><td>([\d.]+)</td>", page)
    assert rows == [("teacher", "0.975"), ("student", "0.875")]
    models[student]["steps"] = 4
    report.write_text(json.dumps({"models": models, "tasks": {"retrieval": results}}))
    page = render(run_dir)
    assert "<td>student of 4 steps</td>" in page, "the run continued after its evaluation"
    assert '<div class="fact">retrieval' not in page


def test_a_run_that_continued_after_its_demo(run_dir: Path) -> None:
    (run_dir / "demo_training.json").write_text(json.dumps({"steps": 4}))
    page = render(run_dir)
    assert "<td>after 4 steps</td>" in page
    assert '<div class="fact">retrieval' not in page
    (run_dir / "demo_training.json").write_text(json.dumps({"steps": 8}))
    assert '<div class="fact">retrieval<b>0.700 → 0.875</b></div>' in render(run_dir)


def test_the_command_writes_the_page(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["report", str(run_dir)])
    assert (run_dir / "report.html").read_text().startswith("<!DOCTYPE html>")
    assert "report.html" in capsys.readouterr().out


def test_a_long_gap_between_points_is_a_pause() -> None:
    lines = points(10)
    assert pauses(lines) == []
    for point in lines:
        if point["step"] > 6:
            point["time_s"] += 500.0
    assert pauses(lines) == [6]


def test_the_time_line_and_its_cost(run_dir: Path) -> None:
    metrics = read_metrics(RunPaths(run_dir))
    events = events_of(run_dir, metrics, [8])
    assert (events.saved_steps, events.restarts) == ([4, 6, 8], [4])
    first, second = events.attempts
    assert [step for _, step in first.progress] == [0, 0, 1, 2, 3, 4]
    assert second.progress[0] == (pytest.approx(66 / 3600), 4)
    assert first.hours == pytest.approx(9 / 3600)  # from its start to its last line
    assert second.hours == pytest.approx(94 / 3600)  # to the last evaluation at 1159
    shown = cost(metrics, events, {"device": "cuda"}, 128)
    assert shown["wall clock, first start to last line"] == "160 s"
    assert shown["of that running"] == "103 s in 2 start(s)"
    assert shown["GPU hours"] == "0.0572"  # two ranks
    assert shown["tokens that the student saw"] == "16,384"
    assert [duration(hours) for hours in (0.01, 1.5, 1234)] == ["36 s", "90.0 min", "1,234.0 h"]


def test_a_run_without_a_file_of_restarts(run_dir: Path) -> None:
    (run_dir / "restarts.json").unlink()
    events = events_of(run_dir, read_metrics(RunPaths(run_dir)), [4, 8])
    assert (len(events.attempts), events.saved_steps, events.restarts) == (1, [4, 8], [4])


def test_a_run_without_a_file_of_restarts_that_has_not_logged_yet(run_dir: Path) -> None:
    (run_dir / "restarts.json").unlink()
    events = events_of(run_dir, [], [4])
    assert (events.saved, events.saved_steps, events.restarts) == ([], [4], [])


@pytest.mark.parametrize("content", [None, "", '{"step": 0, "sam'])
def test_nothing_to_report(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    with pytest.raises(UserError, match=r"metrics\.jsonl"):
        read_metrics(RunPaths(tmp_path))


def test_nothing_of_a_run_directory_becomes_markup(run_dir: Path) -> None:
    """All names and values on the page are text from outside: recipe, languages, tags, hosts."""
    hostile = "<img src=x onerror=alert(1)>\"'<script>alert(2)</script>"
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        line |= {f"heldout/{hostile}": 3.0} if "heldout/mean" in line else {f"loss/{hostile}": 1.0}
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run_dir / "recipe.yaml").write_text(
        yaml.safe_dump({"teacher": hostile, "data": hostile, "languages": [hostile], hostile: hostile})
    )
    about = {
        "world_size": hostile,
        "device": hostile,
        "device_names": [hostile],
        "precision": hostile,
        "git_commit": hostile,
        "languages": [hostile],
    }
    (run_dir / "run.json").write_text(json.dumps(about))
    page = render(run_dir)
    parser = TagBalance()
    parser.feed(page)
    assert parser.open == []
    assert hostile.replace("<", "&lt;").replace(">", "&gt;")[:20] in page
    assert not re.search(r"<script|<img[^>]*onerror", page)
    assert "x" not in parser.addresses
