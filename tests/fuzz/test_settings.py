"""Fuzz: recipe and --set, DeepSpeed JSON, the teacher's config.json, and the launcher's environment."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import yaml

from pipeline.config import Recipe, as_tree, load_recipe, recipe_to_yaml
from pipeline.distillation.models.loading import load_config
from pipeline.runtime.dist import read_launch
from pipeline.runtime.ds_config import BatchShape, Precisions, resolve
from pipeline.runtime.optimizer import OptimizerConfig
from tests.conftest import REPO
from tests.fuzz.mutations import CHUNKS, ODD_VALUES, mutated_bytes, mutated_json, mutated_tree
from tests.fuzz.trials import fuzz, rejected_or_done

RECIPES = [path.read_bytes() for path in sorted((REPO / "recipes").glob("*.yaml"))]
DS_CONFIGS = [json.loads(path.read_text()) for path in sorted((REPO / "ds_configs").glob("*.json"))]
DEFAULTS = as_tree(Recipe())
KEYS = [*DEFAULTS, *(f"{name}.{key}" for name, part in DEFAULTS.items() if isinstance(part, dict) for key in part)]
CPU = Precisions(fp16=True, bf16=True, bf16_fast=False, device="a CPU")
VARIABLES = ["RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_LOCALID",
             "SLURM_STEP_NUM_NODES", "SLURM_JOB_ID", "SLURM_RESTART_COUNT", "SLURM_STEP_ID"]  # fmt: skip


def override(choice: random.Random) -> str:
    value = choice.choice(ODD_VALUES)
    text = yaml.safe_dump(value, default_flow_style=True).removesuffix("\n...\n").strip()
    raw = choice.choice(CHUNKS).decode("latin-1")
    key = choice.choice([*KEYS, "", "a.b.c", "steps.x", "student", ".", "relations.pairs.q-q", "language_weights.de"])
    return f"{key}={choice.choice([text, text, text, raw, '', '.inf', '.nan', '-1', '1e30', '9' * 30])}"


def test_recipe_and_overrides(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"

    def trial(seed: int, times: int) -> None:
        choice = random.Random(seed)
        kind = seed % 3
        if kind == 0:
            content = mutated_bytes(choice.choice(RECIPES), seed, times)
        elif kind == 1:
            content = yaml.safe_dump(mutated_tree(DEFAULTS, seed, times)).encode("utf-8", "surrogatepass")
        else:
            content = choice.choice(RECIPES)
        path.write_bytes(content)
        overrides = [override(choice) for _ in range(times if kind == 2 else choice.randrange(2))]

        def read() -> None:
            recipe = load_recipe(path, overrides)
            path.write_text(recipe_to_yaml(recipe), encoding="utf-8")
            assert load_recipe(path, []) == recipe, "the recipe that a run writes reads back"

        rejected_or_done(read)

    fuzz("recipe and --set", trial, kept=[(2021, 1)])


def test_deepspeed_json(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"

    def trial(seed: int, times: int) -> None:
        path.write_bytes(mutated_json(random.Random(seed).choice(DS_CONFIGS), seed, times))
        rejected_or_done(lambda: resolve(path, "recipes/x.yaml", OptimizerConfig(), BatchShape(4, 2), 8, CPU))

    fuzz("DeepSpeed JSON", trial, kept=[(263, 1)])


def test_teacher_config(tmp_path: Path, tiny_teacher: Path) -> None:
    config = json.loads((tiny_teacher / "config.json").read_text())

    def trial(seed: int, times: int) -> None:
        (tmp_path / "config.json").write_bytes(mutated_json(config, seed, times))
        rejected_or_done(lambda: load_config(tmp_path, "teacher"))

    fuzz("teacher's config.json", trial, kept=[(102035, 1)], quick_trials=60)


def test_launcher_environment(no_launcher: pytest.MonkeyPatch) -> None:
    odd = ["", " ", "0", "1", "2", "-1", "1.5", "x", "٣", "²", "9" * 30, "1e3", "0x1", "65536", "70000", "nan", "inf"]

    def trial(seed: int, times: int) -> None:
        choice = random.Random(seed)
        with no_launcher.context() as patch:
            for name in VARIABLES:
                patch.delenv(name, raising=False)
            patch.setenv("MASTER_ADDR", "127.0.0.1")
            for name in choice.sample(VARIABLES, times + 1):
                patch.setenv(name, choice.choice(odd))
            rejected_or_done(read_launch)

    fuzz("launcher's environment", trial)
