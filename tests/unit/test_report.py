"""The report of a made-up run: complete, well-formed, self-contained, harmless, and clear about what is missing."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from torch.utils.tensorboard import SummaryWriter

from pipeline.__main__ import main
from pipeline.errors import UserError
from pipeline.report import read_metrics, render
from pipeline.report_plots import restarts

VOID_TAGS = {"meta", "br", "img"}
POOLINGS = ("output", "last_input", "values")


class TagBalance(HTMLParser):
    """Raises when a tag is closed that is not the innermost open one."""

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


def points(num_steps: int) -> list[dict[str, float]]:
    lines: list[dict[str, float]] = [
        {"step": 0, "samples": 0, "time_s": 0.0, "heldout/mean": 3.0, "heldout/de": 2.9, "heldout/th": 3.1}
    ]
    for step in range(1, num_steps + 1):
        lines.append(
            {
                "step": step,
                "samples": step * 16,
                "time_s": 2.0 * step,
                "loss/total": 3.0 / step,
                "loss/q-q": 1.0 / step,
                "optimizer/learning_rate": 1e-4,
                "optimizer/gradient_norm": 1.0,
                "speed/tokens_per_second": 1000.0,
                "speed/data_wait_share": 0.01,
            }
        )
    lines.append({**lines[0], "step": num_steps, "samples": num_steps * 16, "time_s": 99.0, "heldout/mean": 0.625})
    return lines


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    directory = tmp_path / "quick <b>start"
    (directory / "retrieval").mkdir(parents=True)
    (directory / "checkpoints" / "step-00000004").mkdir(parents=True)
    (directory / "metrics.jsonl").write_text("".join(json.dumps(point) + "\n" for point in points(8)))
    (directory / "recipe.yaml").write_text("teacher: <script>alert(1)</script>\n")
    for stage, accuracy in (("teacher", 0.975), ("before", 0.7), ("after", 0.875)):
        pair = {pooling: {"mean": accuracy} for pooling in POOLINGS}
        result = {"mean": dict.fromkeys(POOLINGS, accuracy), "per_pair": {"de": pair, "th": pair}}
        (directory / "retrieval" / f"{stage}.json").write_text(json.dumps({"identity": "x", "result": result}))
    board = SummaryWriter(str(directory / "tensorboard"))
    board.add_image("relations/q-q", torch.rand(1, 8, 8), 0)
    board.add_image("relations/q-q", torch.rand(1, 8, 8), 8)
    board.close()
    (directory / "DONE").write_text("done\n")
    return directory


def test_the_page_is_well_formed_and_loads_nothing(run_dir: Path) -> None:
    page = render(run_dir)
    parser = TagBalance()
    parser.feed(page)
    assert parser.open == []
    assert [address[:22] for address in parser.addresses if not address.startswith("#")] == [
        "data:image/png;base64,"
    ] * 2
    assert "<script" not in page
    assert "quick &lt;b&gt;start" in page
    assert not re.search(r"url\((?!#)", page)


def test_the_page_says_what_happened(run_dir: Path) -> None:
    page = render(run_dir)
    for text in ("DONE", "3.000 → 0.625", "1,000", "relations/q-q, step 8", "0.875", "<td>th</td>"):
        assert text in page
    assert page.count("<svg") == 4


def test_a_run_that_has_only_begun(run_dir: Path) -> None:
    (run_dir / "metrics.jsonl").write_text(json.dumps(points(1)[0]) + '\n{"step": 1, "samp')
    for name in ("DONE", "recipe.yaml", "retrieval/teacher.json", "retrieval/before.json", "retrieval/after.json"):
        (run_dir / name).unlink()
    page = render(run_dir)
    assert "no end marker" in page
    assert "Cross-lingual" not in page


def test_the_command_writes_the_page(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["report", str(run_dir)])
    assert (run_dir / "report.html").read_text().startswith("<!DOCTYPE html>")
    assert "report.html" in capsys.readouterr().out


def test_a_restart_is_where_nothing_was_reported_for_long() -> None:
    lines = points(10)
    assert restarts(lines) == []
    for point in lines:
        if point["step"] > 6:
            point["time_s"] += 500.0
    assert restarts(lines) == [6]


@pytest.mark.parametrize("content", [None, "", '{"step": 0, "sam'])
def test_nothing_to_report(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    with pytest.raises(UserError, match=r"metrics\.jsonl"):
        read_metrics(tmp_path)
