"""The runs with which plans are compared: six shapes for memory and operations, ZeRO stages on 2 and 4 ranks for traffic.

In: a size, 1 (tests) or 2 (bench_plan.py). Out: cases for plan_ranks.py, and the plan of each. `measured_flops` counts the
operations of a real micro-batch.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count
from transformers import AutoModel

from pipeline.config import Recipe, load_recipe
from pipeline.distillation.distiller import DistillModule
from pipeline.distillation.models.architectures import architecture_of
from pipeline.distillation.models.student import build_student
from pipeline.distillation.models.teacher import load_teacher
from pipeline.planning.devices import DEVICES, Hardware
from pipeline.planning.meta_models import read_config
from pipeline.planning.plan import Plan, Planner

RECIPE = Path(__file__).resolve().parent.parent / "recipes" / "xlmr_large_l12_h384.yaml"
PLAIN = {"student.dropout": 0.0, "steps": 2, "relations.backend": "chunked"}
aten = torch.ops.aten


@dataclass
class Case:
    """One real run: a teacher's shape, changes to the recipe, and how it is launched."""

    name: str
    recipe: dict[str, Any]
    teacher: dict[str, Any]
    stage: int = 2
    precision: str = "fp32"
    ranks: int = 1
    zero: dict[str, Any] = field(default_factory=dict)
    keep_gathered: bool = False  # a partitioned teacher keeps gathered parameters up to DeepSpeed's defaults

    @property
    def overrides(self) -> list[str]:
        return [f"{key}={value}" for key, value in {**PLAIN, **self.recipe}.items()]

    def load(self) -> Recipe:
        return load_recipe(RECIPE, [*self.overrides, f"teacher_options.dtype={self.precision}"])

    def write_config(self, directory: Path) -> Path:
        path = directory / f"{self.name.replace(' ', '_')}.json"
        path.write_text(json.dumps(self.teacher))
        return path

    def for_ranks(self, directory: Path) -> dict[str, Any]:
        """The case as plan_ranks.py reads it."""
        return {
            "name": self.name,
            "recipe": str(RECIPE),
            "set": self.overrides,
            "config": str(self.write_config(directory)),
            "vocabulary": self.teacher["vocab_size"],
            "stage": self.stage,
            "precision": self.precision,
            "ranks": self.ranks,
            "zero": self.zero,
            "keep_gathered": self.keep_gathered,
        }

    def plan(self, directory: Path) -> Plan:
        """The predicted plan of this case."""
        ds = {"zero_optimization": {"stage": self.stage, "overlap_comm": False, **self.zero}}
        path = directory / "planned.json"
        path.write_text(json.dumps({**ds, "bf16": {"enabled": self.precision == "bf16"}}))
        planner = Planner(self.load(), RECIPE, path, Hardware(DEVICES["cpu"]), self.write_config(directory))
        return planner.plan(1, self.ranks)


def teacher_shape(layers: int, hidden: int, vocabulary: int, **changes: Any) -> dict[str, Any]:
    return {
        "model_type": "xlm-roberta",
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 32,
        "intermediate_size": 4 * hidden,
        "max_position_embeddings": 514,
        "type_vocab_size": 1,
        "pad_token_id": 1,
        "bos_token_id": 0,
        "eos_token_id": 2,
        **changes,
    }


def shapes(size: int) -> list[Case]:
    """Six runs on one rank. Widths and vocabulary grow with `size` (tests: 1, benchmark: 2)."""
    hidden, vocabulary = 96 * size, 2000 * size**2
    teacher = teacher_shape(4, 2 * hidden, vocabulary)
    same = teacher_shape(4, hidden, vocabulary)
    modern = {
        **same,
        "model_type": "modernbert",
        "intermediate_size": 2 * hidden,
        "local_attention": 32,
        **{f"{name}_token_id": 2 for name in ("cls", "sep")},
    }
    base = {
        "relations.heads": 12,
        "relations.teacher_layer": 3,
        "student.layers": 3,
        "student.hidden": hidden,
        "student.heads": hidden // 32,
        "seq_len": 128,
        "global_batch": 8,
        "micro_batch_per_gpu": 8,
    }
    bucket = {"reduce_bucket_size": 100_000}
    tail = {"relations.tail": "mse", "relations.pairs": "{q-k: 1.0, v-v: 1.0}"}
    frozen = {"student.init": "layers", "student.freeze": "[embeddings]"}
    return [
        Case("ZeRO-1, accumulation", {**base, "micro_batch_per_gpu": 4}, teacher, 1, zero=bucket),
        Case("ZeRO-2, bf16", base, teacher, 2, "bf16", zero=bucket),
        Case("ZeRO-3", {**base, "global_batch": 4}, teacher, 3, zero=bucket),
        Case("recomputed", {**base, "student.layers": 6, "student.checkpointing": True}, teacher, zero=bucket),
        Case("frozen, with output", {**base, **frozen, **tail}, same, zero=bucket),
        Case("ModernBERT", base, modern, zero=bucket),
    ]


def clusters(size: int) -> list[Case]:
    """The same step on 2 and 4 ranks. Tests run the first two."""
    hidden, vocabulary = 48 * size, 2000 * size
    teacher = teacher_shape(3, 2 * hidden, vocabulary, num_attention_heads=4)
    base = {
        "relations.heads": 12,
        "relations.teacher_layer": 2,
        "student.layers": 2,
        "student.hidden": hidden,
        "student.heads": 4,
        "seq_len": 32,
        "global_batch": 8,
        "micro_batch_per_gpu": 2,
    }
    bucket = {"reduce_bucket_size": 100_000, "stage3_param_persistence_threshold": 5_000}
    partitioned = {**base, "teacher_options.placement": "zero3"}
    return [
        Case("ZeRO-2, 2 ranks, 2 micro-batches", base, teacher, 2, ranks=2, zero=bucket),
        Case("ZeRO-3, 4 ranks, bf16", base, teacher, 3, "bf16", 4, bucket),
        Case("ZeRO-1, 2 ranks, 2 micro-batches", base, teacher, 1, ranks=2, zero=bucket),
        Case("ZeRO-1, 4 ranks", base, teacher, 1, ranks=4, zero=bucket),
        Case("ZeRO-2, 4 ranks, bf16", base, teacher, 2, "bf16", 4, bucket),
        Case("ZeRO-3, 2 ranks, 2 micro-batches", base, teacher, 3, ranks=2, zero=bucket),
        Case("teacher zero3, 2 ranks", partitioned, teacher, 2, ranks=2, zero=bucket),
    ]


def measured_flops(case: Case, directory: Path) -> int:
    """Operations that torch counts in one real micro-batch: both forward passes, the loss, the student's backward pass."""
    recipe, relations = case.load(), case.load().relations
    config = read_config(recipe.teacher, case.write_config(directory))
    pooler = {"add_pooling_layer": False} if architecture_of(config).has_pooler else {}
    torch.manual_seed(0)
    model = AutoModel.from_config(config, dtype=torch.float32, **pooler)
    student = build_student(model, recipe.student, 0, relations)
    teacher = load_teacher(model, relations.teacher_taps, **relations.tap_options)
    module = DistillModule(teacher, student.tapped, relations).train()
    rows = min(recipe.micro_batch_per_gpu, recipe.global_batch)
    ids_BL = torch.randint(4, case.teacher["vocab_size"], (rows, recipe.seq_len))
    with FlopCounterMode(display=False, custom_mapping=_CPU_ATTENTION) as counter:
        module(ids_BL)[0].backward()
    return counter.get_total_flops()


def _attention_forward(query, key, value, *arguments, out_shape=None, **keywords) -> int:
    return sdpa_flop_count(query, key, value)


def _attention_backward(gradient, query, key, value, *arguments, out_shape=None, **keywords) -> int:
    """Five products, as torch counts for its other attention kernels: the logits again, and a gradient for each factor."""
    return 5 * sdpa_flop_count(query, key, value) // 2


# torch's counter has formulas for GPU kernels only.
_CPU_ATTENTION = {
    aten._scaled_dot_product_flash_attention_for_cpu: _attention_forward,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}
