"""A not-a-number in one step, and a loss scale that begins too high: is the step skipped, and does training continue?

In: engines at ZeRO 1, 2 and 3. Out: whether the step with NaN changed a weight, the loss scale before and after, the next loss.
"""

from __future__ import annotations

import math
from functools import partial

import torch

from benchmarks.gpu_check.figures import Figures, NotHere, Row
from benchmarks.gpu_check.job import Job, job_of
from benchmarks.gpu_check.setting import Setting

NAN, OVERFLOW = "NaN in the loss of one step", "A loss scale that begins at 2^32"
GOOD_STEPS = 3


def measure(setting: Setting, figures: Figures) -> None:
    """One engine per row."""
    for stage, precision in ((1, "fp16"), (2, "fp16"), (3, "fp16"), (2, "bf16")):
        names = {"ZeRO": stage, "asked": precision}
        figures.attempt(NAN, names, partial(_nan, setting, stage, precision))
    figures.attempt(OVERFLOW, {"ZeRO": 2, "asked": "fp16"}, partial(_overflow, setting))


def _nan(setting: Setting, stage: int, precision: str) -> Row:
    with job_of(setting, setting.ds_json(stage, precision)) as job:
        for _ in range(GOOD_STEPS):
            job.step()
        weights, scale = _weights(job), float(job.engine.loss_scale)
        _, result = job.step(times_loss=float("nan"))
        unchanged = all(torch.equal(a, b) for a, b in zip(weights, _weights(job), strict=True))
        row: Row = {"precision": job.parts.precision, "skipped": bool(result.skipped), "weights unchanged": unchanged}
        row |= {"loss scale before": scale, "after": float(job.engine.loss_scale)}
        job.step()
        loss, result = job.step()
        changed = not all(torch.equal(a, b) for a, b in zip(weights, _weights(job), strict=True))
        row |= {"next loss": float(loss), "next step skipped": bool(result.skipped), "trains again": changed}
    if not (row["skipped"] and unchanged and changed and math.isfinite(row["next loss"])):
        raise RuntimeError(f"the step with NaN was not skipped, or training did not continue: {row}")
    return row


def _weights(job: Job) -> list[torch.Tensor]:
    """Copies of the fp32 weights."""
    return [fragment.view(fragment.buffer).clone() for fragment in job.engine.fragments()]


def _overflow(setting: Setting) -> Row:
    begins = {"initial_scale_power": 32, "hysteresis": 1}
    with job_of(setting, setting.ds_json(2, name="high-scale", fp16=begins)) as job:
        if job.parts.precision != "fp16":
            raise NotHere(f"this device computes in {job.parts.precision}, which has no loss scale")
        results = [job.step() for _ in range(setting.scale.overflow_steps)]
        skipped = [bool(result.skipped) for _, result in results]
        row: Row = {"steps": len(results), "skipped": sum(skipped), "loss scale after": float(job.engine.loss_scale)}
        return row | {"last step skipped": skipped[-1], "last loss": float(results[-1][0])}
