"""The students of `bench_quality.py`: the recipe that all begin from, what each changes, and the sweeps."""

from __future__ import annotations

import dataclasses
from typing import Any

from pipeline.distillation.config import RelationsConfig
from pipeline.distillation.models.student import StudentConfig

COPIED = StudentConfig(layers=6, hidden=384, heads=12, init="layers", freeze=["embeddings"], dropout=0.0)
BASE = RelationsConfig(heads=48)


@dataclasses.dataclass
class Variant:
    """One student recipe. The defaults are the base; each variant changes one or two things of it."""

    student: StudentConfig = dataclasses.field(default_factory=lambda: COPIED)
    relations: RelationsConfig = dataclasses.field(default_factory=lambda: BASE)
    rate: float = 5e-4
    calibrated: bool = True  # of a projected student: whether its layers are projected too, or only its embeddings


def changed(
    student: dict | None = None, relations: dict | None = None, rate: float = 5e-4, calibrated: bool = True
) -> Variant:
    student_config = dataclasses.replace(COPIED, **(student or {}))
    return Variant(student_config, dataclasses.replace(BASE, **(relations or {})), rate, calibrated)


RANDOM = {"init": "random", "freeze": []}
NARROW = {"hidden": 192, "heads": 12}
PROJECTED = {**NARROW, "init": "project"}
ODD = {"init_layers": [1, 3, 5, 7, 9, 11]}
UPPER = {"init_layers": [1, 3, 5, 8, 10, 12]}
MSE_10 = {"tail": "mse", "tail_weight": 10.0}
MSE_100 = {"tail": "mse", "tail_weight": 100.0}
MSE_1000 = {"tail": "mse", "tail_weight": 1000.0}


def pooled(distance: str, weight: float, tail: str = "pooled", **options: float) -> dict[str, Any]:
    return {"tail": tail, "pooled_weight": weight, "pooled_distance": distance, "pooling": "mean", **options}


VARIANTS: dict[str, Variant] = {
    "base": changed(),
    "lr_2e-4": changed(rate=2e-4),
    "lr_1e-3": changed(rate=1e-3),
    "heads_12": changed(relations={"heads": 12}),
    "lower_layers": changed({"init_layers": [1, 2, 3, 4, 5, 6]}),
    "upper_layers": changed(UPPER),
    "teacher_layer_11": changed(relations={"teacher_layer": 11}),
    "train_embeddings": changed({"freeze": []}),
    "tail_relation": changed(relations={"tail": "relation"}),
    "tail_mse": changed(relations={"tail": "mse"}),
    "tail_mse_10": changed(relations=MSE_10),
    "tail_mse_10_lr_1e-3": changed(relations=MSE_10, rate=1e-3),
    "tail_mse_100": changed(relations=MSE_100),
    "tail_mse_100_lr_1e-3": changed(relations=MSE_100, rate=1e-3),
    "tail_mse_300": changed(relations={"tail": "mse", "tail_weight": 300.0}),
    "tail_mse_1000": changed(relations=MSE_1000),
    "tail_mse_1000_lr_1e-3": changed(relations=MSE_1000, rate=1e-3),
    "upper_tail_mse_100": changed(UPPER, MSE_100),
    "upper_tail_mse_100_lr_1e-3": changed(UPPER, MSE_100, rate=1e-3),
    "upper_tail_mse_1000": changed(UPPER, MSE_1000),
    "upper_tail_mse_1000_lr_1e-3": changed(UPPER, MSE_1000, rate=1e-3),
    "odd": changed(ODD),
    "odd_lr_2e-4": changed(ODD, rate=2e-4),
    "odd_tail_mse_10": changed(ODD, MSE_10),
    "odd_tail_mse_10_lr_2e-4": changed(ODD, MSE_10, rate=2e-4),
    "odd_tail_mse_100": changed(ODD, MSE_100),
    "odd_tail_mse_100_lr_1e-3": changed(ODD, MSE_100, rate=1e-3),
    "train_embeddings_tail_mse_100_lr_1e-3": changed({"freeze": []}, MSE_100, rate=1e-3),
    "random": changed(RANDOM),
    "random_tail_mse_10": changed(RANDOM, MSE_10),
    "narrow_random": changed({**RANDOM, **NARROW}),
    "narrow_embeddings": changed({**PROJECTED, "freeze": []}, calibrated=False),
    "narrow_embeddings_frozen": changed(PROJECTED, calibrated=False),
    "narrow_project": changed({**PROJECTED, "freeze": []}),
    "narrow_project_frozen": changed(PROJECTED),
    "narrow_project_frozen_lr_2e-3": changed(PROJECTED, rate=2e-3),
    "narrow_project_mse_100_lr_1e-3": changed({**PROJECTED, "freeze": []}, MSE_100, rate=1e-3),
    "narrow_project_frozen_mse_100_lr_1e-3": changed(PROJECTED, MSE_100, rate=1e-3),
    "narrow_project_frozen_mse_100_lr_2e-3": changed(PROJECTED, MSE_100, rate=2e-3),
    "narrow_project_frozen_mse_100_lr_4e-3": changed(PROJECTED, MSE_100, rate=4e-3),
    "narrow_upper_project_frozen_mse_100_lr_2e-3": changed({**PROJECTED, **UPPER}, MSE_100, rate=2e-3),
    # Norms of a term's first gradient at weight 1: cosine .44, mse .063, similarity .99, at .01 15.7; `tail: mse` .074, and
    # the relations 18.
    "pooled_cosine_20": changed(relations=pooled("cosine", 20.0), rate=1e-3),
    "pooled_cosine_100": changed(relations=pooled("cosine", 100.0), rate=1e-3),
    "pooled_mse_100": changed(relations=pooled("mse", 100.0), rate=1e-3),
    "pooled_similarity_10": changed(relations=pooled("similarity", 10.0), rate=1e-3),
    "pooled_similarity_1_at_.01": changed(relations=pooled("similarity", 1.0, pooled_temperature=0.01), rate=1e-3),
    "mse_100_pooled_cosine_20": changed(relations={**MSE_100, **pooled("cosine", 20.0, "mse+pooled")}, rate=1e-3),
    "mse_100_pooled_similarity_10": changed(
        relations={**MSE_100, **pooled("similarity", 10.0, "mse+pooled")}, rate=1e-3
    ),
    "narrow_project_frozen_pooled_cosine_20_lr_2e-3": changed(PROJECTED, pooled("cosine", 20.0), rate=2e-3),
    "narrow_project_frozen_pooled_similarity_10_lr_2e-3": changed(PROJECTED, pooled("similarity", 10.0), rate=2e-3),
}
# Layers to start from: evenly spaced, and others that end on the distilled layer.
LAYER_SETS = """
2-4-6-8-10-12 1-3-5-8-10-12 1-4-6-8-10-12 1-3-6-8-10-12 1-3-5-7-10-12 1-3-5-7-9-12 1-2-5-8-10-12 1-2-4-7-10-12 1-2-4-6-9-12
1-2-3-5-9-12 1-2-4-8-10-12 1-2-3-8-10-12 1-3-6-9-11-12 1-3-5-9-11-12 1-3-5-8-11-12 1-4-7-10-11-12
""".split()
STARTS = {
    f"layers_{layers}": changed({"init_layers": [int(layer) for layer in layers.split("-")]}, MSE_100, rate=1e-3)
    for layers in LAYER_SETS
}
VARIANTS |= STARTS
# What is compared with the quickstart's recipe (`layers_1-3-5-9-11-12`; in `pooled`, that with even layers): students as
# wide as their teacher, half as wide, and a change of each kind.
SWEEPS = {
    "kinds": [
        *("layers_1-3-5-9-11-12", "layers_1-3-5-7-10-12", "tail_mse_100_lr_1e-3"),
        *("upper_tail_mse_100_lr_1e-3", "upper_tail_mse_100", "odd_tail_mse_100_lr_1e-3"),
        *("pooled_cosine_20", "pooled_similarity_10", "mse_100_pooled_cosine_20"),
        "train_embeddings_tail_mse_100_lr_1e-3",
    ],
    "starts": [*STARTS],
    "pooled": ["tail_mse_100_lr_1e-3", *(n for n in VARIANTS if "pooled" in n and "narrow" not in n)],
    "pooled_narrow": [name for name in VARIANTS if name.startswith("narrow_project_frozen") and "lr_2e-3" in name],
}
