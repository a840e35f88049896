"""TensorBoard's own server on the log directory of a run, read back over HTTP."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.runtime.metrics import Metrics
from pipeline.runtime.run_paths import RunPaths
from pipeline.runtime.tensorboard_tags import LAYOUT, tensorboard_tag

VALUES = {
    "loss/total": 2.0,
    "loss/q-q": 0.5,
    "heldout/mean": 3.0,
    "heldout/de": 2.5,
    "speed/tokens_per_second": 1000.0,
    "speed/data_wait_share": 0.01,
    "speed/teacher_share": 0.3,
    "speed/student_share": 0.4,
    "speed/loss_share": 0.1,
    "speed/optimizer_share": 0.1,
    "speed/model_tflops_per_device": 120.0,
    "speed/mfu": 0.12,
    "speed/peak_memory_gib": 5.4,
    "speed/save_stall_seconds": 0.3,
    "optimizer/learning_rate": 1e-4,
    "optimizer/gradient_norm": 1.5,
    "optimizer/loss_scale": 1.0,
    "optimizer/skipped_steps": 0.0,
    "loss/spike_sigmas": 9.0,
}
Get = Callable[..., Any]


@pytest.fixture(scope="module")
def get(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Get]:
    """Query TensorBoard's server about a log directory that `Metrics` wrote."""
    run_dir = tmp_path_factory.mktemp("runs") / "quick"
    run_dir.mkdir()
    metrics = Metrics(RunPaths(run_dir), active=True, first_step=0, steps=2)
    metrics.describe("steps: 2", "{}", {"steps": 2})
    for step in (1, 2):
        metrics.write(step, step * 16, {tag: value * step for tag, value in VALUES.items()})
    metrics.image("relations/q-q", 2, torch.rand(1, 4, 4))
    metrics.close()
    command = [
        sys.executable,
        "-m",
        "tensorboard.main",
        "--logdir",
        str(run_dir.parent),
        "--host",
        "127.0.0.1",
        "--port",
        "0",
    ]
    log = run_dir / "server.log"
    with open(log, "w") as file:
        server = subprocess.Popen([*command, "--load_fast", "false"], stdout=file, stderr=file)
    try:
        address = _address(server, log)

        def ask(path: str, **query: str) -> Any:
            with urllib.request.urlopen(f"{address}data/{path}?{urllib.parse.urlencode(query)}", timeout=30) as answer:
                return json.load(answer)

        deadline = time.monotonic() + 60
        while not ask("plugin/images/tags") and time.monotonic() < deadline:  # the last thing that was written
            time.sleep(0.2)
        yield ask
    finally:
        server.kill()
        server.wait()


def _address(server: subprocess.Popen, log: Path) -> str:
    deadline = time.monotonic() + 100
    while not (found := re.search(r"http://127\.0\.0\.1:\d+/", log.read_text())):
        assert server.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.1)
    return found[0]


def test_every_value_is_found_under_its_group(get: Get) -> None:
    (run,) = get("runs")
    tags = get("plugin/scalars/tags")[run]
    assert set(tags) == {tensorboard_tag(tag) for tag in VALUES}
    for tag, value in VALUES.items():
        points = get("plugin/scalars/scalars", run=run, tag=tensorboard_tag(tag))
        assert [(step, found) for _, step, found in points] == [
            (1, pytest.approx(value)),
            (2, pytest.approx(2 * value)),
        ]
    assert list(get("plugin/images/tags")[run]) == ["relations/q-q"]
    assert set(get("plugin/text/tags")[run]) >= {"recipe/text_summary", "hyper-parameters/text_summary"}


def test_groups_sort_in_the_order_of_the_questions(get: Get) -> None:
    (tags,) = get("plugin/scalars/tags").values()
    groups = sorted({tag.partition("/")[0] for tag in tags})
    assert groups[:3] == ["1_is_it_learning", "2_is_it_fast", "3_is_it_healthy"]
    first = {tag for tag in tags if tag.startswith(groups[0])}
    assert first == {"1_is_it_learning/loss", "1_is_it_learning/heldout_loss"}


def test_the_layout_answers_three_questions(get: Get) -> None:
    categories = get("plugin/custom_scalars/layout")["category"]
    assert [category["title"] for category in categories] == list(LAYOUT)
    (tags,) = get("plugin/scalars/tags").values()
    shown = set()
    for category in categories:
        for chart in category["chart"]:
            patterns = chart["multiline"]["tag"]
            matching = {tag for tag in tags for pattern in patterns if re.fullmatch(pattern, tag)}
            assert matching, f"no curve in {chart['title']}"
            shown |= matching
    assert shown == set(tags)


def test_a_tag_without_a_group_keeps_its_name() -> None:
    assert tensorboard_tag("other/thing") == "other/thing"
    assert len({tensorboard_tag(tag) for tag in VALUES}) == len(VALUES)
