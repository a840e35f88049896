"""The parts of the loss in a report: times their weights they add up to the total, and where they do not it says so."""

from __future__ import annotations

import re

import pytest
import torch

from pipeline.distillation.config import LayerPair, RelationsConfig
from pipeline.distillation.distiller import part_weights
from pipeline.report import plots
from pipeline.report.loss_parts import loss_parts, loss_table, sum_note

CONFIGS = {
    "no tail": RelationsConfig(pairs={"q-q": 1.0, "k-k": 0.5}),
    "output": RelationsConfig(tail="mse", tail_weight=100.0),
    "relation of outputs": RelationsConfig(tail="relation", tail_weight=2.0),
    "both terms": RelationsConfig(tail="mse+pooled", tail_weight=10.0, pooled_weight=3.0),
    "layers": RelationsConfig(layers=[LayerPair(3, 1), LayerPair(6, 2, weight=0.25)], pairs={"v-v": 2.0}),
    "a weight of zero": RelationsConfig(pairs={"q-q": 1.0, "v-v": 0.0}),
}


def points_of(config: RelationsConfig, num_steps: int = 3) -> list[dict[str, float]]:
    """As training logs them: parts without weights in 32 bits, and the weighted sum."""
    generator = torch.Generator().manual_seed(0)
    points = []
    for step in range(1, num_steps + 1):
        parts = torch.rand(len(part_weights(config)), generator=generator)
        weights = torch.tensor(list(part_weights(config).values()))
        values = {f"loss/{name}": part.item() for name, part in zip(part_weights(config), parts, strict=True)}
        points.append(
            {"step": step, "samples": step, "time_s": step, "loss/total": (weights * parts).sum().item(), **values}
        )
    return points


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_the_curves_add_up_to_the_total(config: RelationsConfig) -> None:
    metrics = points_of(config)
    parts = loss_parts(metrics, config)
    assert [part.tag.removeprefix("loss/") for part in parts] == list(part_weights(config)), "in the recipe's order"
    sums = [sum(value for _, value in at) for at in zip(*(part.weighted(metrics) for part in parts), strict=True)]
    assert sums == pytest.approx([point["loss/total"] for point in metrics], rel=1e-5)
    assert sum_note(metrics, parts) == "The parts, each times its weight, add up to the total."
    rows = re.findall(r"<tr><td>(.*?)</td><td>(.*?)</td><td>(.*?)</td>", loss_table(metrics, parts))
    assert [label for label, *_ in rows] == [*(part.label for part in parts), "sum of the parts", "total, as logged"]
    assert rows[-2][1:] == rows[-1][1:]


def test_labels_name_weight_and_term() -> None:
    labels = [part.label for name in ("both terms", "layers", "output", "relation of outputs") for part in _parts(name)]
    assert labels[3:7] == [
        "10 × output (squared error)",
        "3 × pooled output (cosine)",
        "2 × v-v, layer 3 → 1",
        "0.5 × v-v, layer 6 → 2",
    ]
    assert labels[-1] == "2 × output (relation)"
    html = plots.loss_curves(points_of(CONFIGS["both terms"]), _parts("both terms"))
    assert re.findall(r"</i>(.*?)</li>", html) == ["total", *labels[:5]]


def _parts(name: str) -> list:
    return loss_parts(points_of(CONFIGS[name]), CONFIGS[name])


def test_other_weights_than_those_of_the_recipe_are_told() -> None:
    """A run that was resumed with another `tail_weight`: recipe.yaml has the new one."""
    metrics = points_of(CONFIGS["output"], 5)
    for point in metrics[:2]:
        point["loss/total"] += 1.0
    note = sum_note(metrics, loss_parts(metrics, CONFIGS["output"]))
    assert note.startswith("At 2 of 5 points, first at step 1, the parts do not add up")


def test_without_a_recipe_nothing_is_claimed() -> None:
    metrics = points_of(CONFIGS["output"])
    parts = loss_parts(metrics, None)
    assert [part.label for part in parts] == [f"{name}, without weight" for name in ("k-k", "output", "q-q", "v-v")]
    assert loss_table(metrics, parts) == ""
    assert "no weight for k-k, output" in sum_note(metrics, parts)


def test_a_loss_that_is_not_finite_is_no_contradiction() -> None:
    metrics = points_of(CONFIGS["output"])
    metrics[-1] |= {"loss/total": float("nan"), "loss/output": float("nan")}
    parts = loss_parts(metrics, CONFIGS["output"])
    assert sum_note(metrics, parts).endswith("add up to the total.")
    assert "nan" in loss_table(metrics, parts)
