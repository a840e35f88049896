"""How TensorBoard groups the curves of a run: is it learning, is it fast, is it healthy?

In: the tags and values of `metrics.jsonl`. Out: the curves that TensorBoard shows, in groups that sort in the order of
reading, and the charts of its Custom Scalars tab. The parts of the loss are shown times their weights: they add up to it.
"""

from __future__ import annotations

from collections.abc import Mapping

LEARNING, FAST, HEALTHY = "1_is_it_learning", "2_is_it_fast", "3_is_it_healthy"
PARTS, LANGUAGES = "4_loss_parts", "5_heldout_loss_per_language"
NAMED = {
    "loss/total": f"{LEARNING}/loss",
    "heldout/mean": f"{LEARNING}/heldout_loss",
    "loss/spike_sigmas": f"{HEALTHY}/spike_sigmas",
}
GROUPS = {"speed": FAST, "optimizer": HEALTHY, "loss": PARTS, "heldout": LANGUAGES}
# Chart -> tags as regular expressions: several curves in one chart.
LAYOUT = {
    "Is it learning?": {
        "loss and its parts, which add up to it": ["Multiline", [f"{LEARNING}/loss", f"{PARTS}/.*"]],
        # Not with the loss in one chart: it has no term for the output, and every language counts the same.
        "held-out loss": ["Multiline", [f"{LEARNING}/heldout_loss"]],
        "held-out loss per language": ["Multiline", [f"{LANGUAGES}/.*"]],
    },
    "Is it fast?": {
        "tokens per second": ["Multiline", [f"{FAST}/tokens_per_second"]],
        "shares of the time": ["Multiline", [f"{FAST}/(teacher|student|loss|optimizer|data_wait)_share"]],
        "TFLOP/s that the models need, per device": ["Multiline", [f"{FAST}/model_tflops_per_device"]],
        "share of the device's peak TFLOP/s (MFU)": ["Multiline", [f"{FAST}/mfu"]],
        "memory at the peak, GiB": ["Multiline", [f"{FAST}/peak_memory_gib"]],
        "seconds held up by a save": ["Multiline", [f"{FAST}/save_stall_seconds"]],
    },
    "Is it healthy?": {
        "gradient norm": ["Multiline", [f"{HEALTHY}/gradient_norm"]],
        "learning rate": ["Multiline", [f"{HEALTHY}/learning_rate"]],
        "skipped steps and spikes": ["Multiline", [f"{HEALTHY}/(skipped_steps|spike_sigmas)"]],
        "loss scale": ["Multiline", [f"{HEALTHY}/loss_scale"]],
    },
}


def tensorboard_tag(tag: str) -> str:
    """TensorBoard's name of a curve. A tag without a group keeps its name."""
    group, _, name = tag.partition("/")
    return NAMED.get(tag) or (f"{GROUPS[group]}/{name}" if group in GROUPS else tag)


def tensorboard_point(tag: str, value: float, loss_weights: Mapping[str, float]) -> tuple[str, float]:
    """Name and value of a point in TensorBoard: a part of the loss times its weight, which its name has unless it is 1.

    Args:
        tag, value: as in `metrics.jsonl`, where parts are without their weights
        loss_weights: name of a part -> its weight
    """
    group, _, name = tag.partition("/")
    weight = loss_weights.get(name, 1.0) if group == "loss" else 1.0
    return tensorboard_tag(tag) + ("" if weight == 1 else f"_x{weight:g}"), value * weight
