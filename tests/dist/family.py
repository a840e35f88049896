"""Three students of one recipe that differ in most keys, runs of them together and alone, and the state that they end in."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pipeline.runtime.checkpoint import CheckpointReader, newest_valid
from pipeline.runtime.run_paths import RunPaths
from tests.conftest import REPO
from tests.faults.sweeps.lab import Lab
from tests.faults.sweeps.lab import state_of as lab_state_of

# Other depth, width, heads, dropout, layers, tail, relations, rate, warm-up and clipping; one of them is frozen in part.
DEEP = {
    "student": {"layers": 3, "hidden": 24, "heads": 4, "dropout": 0.1},
    "relations": {"teacher_layer": 2, "tail": "pooled", "pooled_distance": "similarity", "pooled_temperature": 0.2},
    "optimizer": {"lr": 1e-3, "warmup_steps": 5, "gradient_clipping": 0.1},
}
WIDE = {
    "student": {
        "layers": 2,
        "hidden": 48,
        "heads": 4,
        "ffn": 96,
        "init": "layers",
        "freeze": ["embeddings"],
        "dropout": 0.2,
    },
    "relations": {"tail": "mse", "pairs": {"q-k": 1.0, "v-v": 2.0}, "heads": 4},
}
PAIRS = {
    "student": {"layers": 2, "hidden": 12, "heads": 2, "init": "project"},
    "relations": {
        "teacher_layer": None,
        "layers": [{"teacher": 1, "student": 1}, {"teacher": 4, "student": 2, "weight": 2.0}],
        "tail": "mse+pooled",
        "pooled_weight": 3.0,
    },
    "optimizer": {"weight_decay": 0.0, "betas": [0.8, 0.95]},
}
STUDENTS = {"deep": DEEP, "wide": WIDE, "pairs": PAIRS}
SETTINGS: dict[str, Any] = {"steps": 6, "save_every": 3, "eval_every": 3, "relations.backend": "chunked"}
WILD = {
    **DEEP,
    "optimizer": {"lr": 0.01, "warmup_steps": 0, "decay": "constant"},
}  # the held-out loss rises from step 2 on


class Family(Lab):
    """Runs with several students, and of each student alone, in any precision."""

    precision = "fp32"

    def arguments(self, stage: int, settings: Mapping[str, Any]) -> list[str]:
        config = json.loads((REPO / "ds_configs" / f"zero{stage}.json").read_text())
        del config["fp16"]
        if self.precision == "fp16":  # a scale that overflows in the first steps, and rises again
            config["fp16"] = {"enabled": True, "initial_scale_power": 18, "loss_scale_window": 2, "hysteresis": 1}
        elif self.precision == "bf16":
            config["bf16"] = {"enabled": True}
        path = self.directory / f"zero{stage}.json"
        path.write_text(json.dumps(config))
        return super().arguments(stage, settings)

    def alone(
        self, name: str, ranks: int, settings: Mapping[str, Any], stage: int = 2, faults: Iterable[Any] = ()
    ) -> Path:
        return self.untouched(ranks, {**settings, **overrides_of(STUDENTS[name])}, stage, faults)

    def together(self, ranks: int, settings: Mapping[str, Any], stage: int = 2, faults: Iterable[Any] = ()) -> Path:
        return self.untouched(ranks, {"students": STUDENTS, **settings}, stage, faults)


def overrides_of(student: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The settings of a student as those of a run with this student alone."""
    return {f"{section}.{key}": value for section, keys in student.items() for key, value in keys.items()}


def state_of(run_dir: Path, student: str = "", group: int = 1) -> dict[Any, Any]:
    """Weights, moments, weights that are not trained, and what decides later steps."""
    checkpoint, problems = newest_valid(RunPaths(run_dir, group=group).checkpoints)
    assert checkpoint is not None
    assert not problems
    reader = CheckpointReader(checkpoint, student)
    tensors = {**lab_state_of(checkpoint, student), **{("untrained", n): t for n, t in reader.untrained().items()}}
    keys = ("step", "adam_step", "skipped_steps", "scaler", "last_losses", "evaluations", "ended")
    return {**{key: tensor.tolist() for key, tensor in tensors.items()}, **{key: reader.state[key] for key in keys}}
