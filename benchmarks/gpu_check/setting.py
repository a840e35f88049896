"""The sizes of the check and the files of its working directory.

In: the working directory and whether the check is tiny. Out: recipe overrides, DeepSpeed JSON files and paths, the same in
every part.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.measure import REPO

RECIPE = REPO / "recipes" / "xlmr_large_l12_h384.yaml"
LANGUAGES = ("de", "en", "ru", "tr")
NEVER = 10**6


@dataclass(frozen=True)
class Scale:
    """How large everything is."""

    rows: int  # per step, in one micro-batch
    seq_len: int
    relation_heads: int
    teacher: dict[str, int]  # keys of its Hugging Face config
    overrides: dict[str, Any]  # of the recipe, besides those that every size has
    steps: int  # measured per variant, after the warm-up
    warm_up: int
    run_steps: int  # of the reproducibility runs; half of them are a resumed run's
    launcher_steps: int
    overflow_steps: int  # with a loss scale that begins too high
    patience: float = 1.0  # factor on time limits


FULL = Scale(
    rows=32,
    seq_len=512,
    relation_heads=64,
    teacher={
        "vocab_size": 250_002,
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "intermediate_size": 4096,
        "max_position_embeddings": 514,
    },
    overrides={},
    steps=15,
    warm_up=3,
    run_steps=12,
    launcher_steps=90,
    overflow_steps=24,
)
TINY = Scale(
    rows=4,
    seq_len=32,
    relation_heads=12,
    teacher={
        "vocab_size": 2002,
        "hidden_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "intermediate_size": 192,
        "max_position_embeddings": 66,
    },
    overrides={"relations.teacher_layer": 3, "student.layers": 2, "student.hidden": 48, "student.heads": 4},
    steps=2,
    warm_up=1,
    run_steps=4,
    launcher_steps=4,
    overflow_steps=2,
    patience=8.0,
)


@dataclass(frozen=True)
class Setting:
    """The working directory of one check, and its sizes."""

    work: Path
    is_tiny: bool

    @property
    def scale(self) -> Scale:
        return TINY if self.is_tiny else FULL

    @property
    def teacher(self) -> Path:
        return self.work / "teacher"

    @property
    def tokenizer(self) -> Path:
        return self.work / "tokenizer"

    @property
    def shards(self) -> Path:
        return self.work / "shards"

    def figures(self, part: str) -> Path:
        return self.work / f"{part}.jsonl"

    def log(self, name: str) -> Path:
        return self.work / f"{name}.log"

    def overrides(self, changes: dict[str, Any] | None = None) -> list[str]:
        """The XLM-R-large recipe on this check's teacher and shards, on one GPU; `changes` are further recipe keys."""
        scale = self.scale
        keys = {
            "teacher": self.teacher,
            "data": self.shards,
            "languages": f"[{', '.join(LANGUAGES)}]",
            "steps": 2000,
            "global_batch": scale.rows,
            "micro_batch_per_gpu": scale.rows,
            "seq_len": scale.seq_len,
            "relations.heads": scale.relation_heads,
            "heldout_rows": 1,
            "save_every": NEVER,
            "eval_every": NEVER,
        }
        return [f"{key}={value}" for key, value in (keys | scale.overrides | (changes or {})).items()]

    def ds_json(self, stage: int, precision: str = "fp16", name: str = "shipped", **changes: dict[str, Any]) -> Path:
        """The DeepSpeed JSON of this stage in `precision`, as `name`; `changes` are added to its sections."""
        config = json.loads((REPO / "ds_configs" / f"zero{stage}.json").read_text(encoding="utf-8"))
        if precision == "bf16":
            config["fp16"] = {"enabled": False}
            config["bf16"] = {"enabled": True}
        for section, keys in changes.items():
            for key, value in keys.items():
                old = config[section].get(key)
                config[section][key] = old | value if isinstance(old, dict) else value
        path = self.work / f"zero{stage}-{precision}-{name}.json"
        path.write_text(json.dumps(config, indent=1), encoding="utf-8")
        return path


def words_of(overrides: list[str]) -> list[str]:
    """Overrides as words of a command line."""
    return [word for override in overrides for word in ("--set", override)]
