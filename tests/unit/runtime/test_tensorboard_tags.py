"""TensorBoard's own server on the log directory of a run, read back over HTTP."""

from __future__ import annotations

import json
import re
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from pipeline.runtime.metrics import Metrics
from pipeline.runtime.run_paths import RunPaths
from pipeline.runtime.tensorboard_tags import LAYOUT, tensorboard_point, tensorboard_tag
from tests.tensorboard_server import tensorboard_server

VALUES = {
    "loss/total": 2.0,
    "loss/q-q": 0.5,
    "loss/v-v": 1.0,
    "loss/output": 0.01,
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
WEIGHTS = {"q-q": 1.0, "v-v": 0.5, "output": 100.0}
Get = Callable[..., Any]


@pytest.fixture(scope="module")
def get(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Get]:
    """Query TensorBoard's server about a log directory that `Metrics` wrote."""
    run_dir = tmp_path_factory.mktemp("runs") / "quick"
    run_dir.mkdir()
    metrics = Metrics(RunPaths(run_dir), active=True, first_step=0, steps=2)
    metrics.describe("steps: 2", "{}", {"steps": 2}, WEIGHTS)
    for step in (1, 2):
        metrics.write(step, step * 16, {tag: value * step for tag, value in VALUES.items()})
    metrics.image("relations/q-q", 2, torch.rand(1, 4, 4))
    metrics.close()
    with tensorboard_server(run_dir.parent, run_dir / "server.log") as address:

        def ask(path: str, **query: str) -> Any:
            with urllib.request.urlopen(f"{address}data/{path}?{urllib.parse.urlencode(query)}", timeout=30) as answer:
                return json.load(answer)

        deadline = time.monotonic() + 60
        while not ask("plugin/images/tags") and time.monotonic() < deadline:  # the last thing that was written
            time.sleep(0.2)
        yield ask


def test_every_value_is_found_under_its_group(get: Get) -> None:
    (run,) = get("runs")
    tags = get("plugin/scalars/tags")[run]
    shown = dict(tensorboard_point(tag, value, WEIGHTS) for tag, value in VALUES.items())
    assert set(tags) == set(shown)
    for tag, value in shown.items():
        points = get("plugin/scalars/scalars", run=run, tag=tag)
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


def test_the_curves_next_to_the_loss_add_up_to_it(get: Get) -> None:
    """And the held-out loss, which has other terms, is in no chart with it."""
    (run,) = get("runs")
    (tags,) = get("plugin/scalars/tags").values()
    charts = get("plugin/custom_scalars/layout")["category"][0]["chart"]
    curves = [
        {tag for tag in tags for pattern in chart["multiline"]["tag"] if re.fullmatch(pattern, tag)} for chart in charts
    ]
    (learning,) = (names for names in curves if "1_is_it_learning/loss" in names)
    last = {tag: get("plugin/scalars/scalars", run=run, tag=tag)[-1][2] for tag in learning}
    assert last.pop("1_is_it_learning/loss") == pytest.approx(sum(last.values()))
    assert set(last) == {"4_loss_parts/q-q", "4_loss_parts/v-v_x0.5", "4_loss_parts/output_x100"}


def test_a_tag_without_a_group_keeps_its_name() -> None:
    assert tensorboard_tag("other/thing") == "other/thing"
    assert len({tensorboard_tag(tag) for tag in VALUES}) == len(VALUES)
    assert tensorboard_point("other/thing", 2.0, {"thing": 3.0}) == ("other/thing", 2.0), (
        "only parts of the loss have weights"
    )
