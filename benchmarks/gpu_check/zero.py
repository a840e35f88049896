"""The same step at ZeRO 1, 2 and 3 in fp16 and bf16, with larger micro-batches, separate documents, a partitioned teacher."""

from __future__ import annotations

from functools import partial
from typing import Any

from benchmarks.gpu_check.figures import Figures
from benchmarks.gpu_check.setting import Setting
from benchmarks.gpu_check.step import row_of

TABLE = "Stages and precisions"
MORE_ROWS = 4  # times the rows of the other variants


def measure(setting: Setting, figures: Figures) -> None:
    """One engine per row."""
    rows = MORE_ROWS * setting.scale.rows
    many = {"global_batch": rows, "micro_batch_per_gpu": rows}
    variants: dict[tuple[str, int, str], dict[str, Any]] = {
        (f"ZeRO-{stage}", stage, precision): {} for precision in ("fp16", "bf16") for stage in (1, 2, 3)
    }
    variants |= {
        (f"{rows} rows in one micro-batch", 2, "fp16"): many,
        ("documents: separate", 2, "fp16"): {"documents": "separate"},
        ("teacher partitioned", 3, "fp16"): {"teacher_options.placement": "zero3"},
    }
    for (name, stage, precision), changes in variants.items():
        row = partial(row_of, setting, changes, setting.ds_json(stage, precision))
        figures.attempt(TABLE, {"variant": name, "asked": precision}, row)
