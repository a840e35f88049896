"""What all ranks must have in common before they work together, and how a checkpoint's surroundings differ from these.

In: a recipe, an effective DeepSpeed config, versions, shapes. Out: flat facts for `preflight.agree`, so that a difference is
named by its key, and lines of warning at a resume.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from pipeline.config import Recipe, as_tree
from pipeline.provenance import code_fingerprint, library_versions

# They follow from recipe and number of ranks, or decide over what is printed.
NO_CHANGE = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "train_batch_size", "steps_per_print")


def settings_facts(recipe: Recipe, config: Mapping[str, Any], precisions: Mapping[str, str]) -> dict[str, Any]:
    """Code, libraries, recipe and DeepSpeed config of one rank; what causes other differences comes first."""
    return {
        "code": code_fingerprint(),
        **{f"version of {name}": version for name, version in _versions(library_versions()).items()},
        **{f"`{key}` in the recipe": value for key, value in flat(as_tree(recipe)).items()},
        **precisions,
        **{f"`{key}` in the DeepSpeed config": value for key, value in flat(config).items()},
    }


def shape_facts(parameters: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Shape of every parameter and buffer of the student."""
    return {f"shape of `{name}`": list(tensor.shape) for name, tensor in parameters.items()}


def other_surroundings(state: Mapping[str, Any], config: Mapping[str, Any], dropout: float) -> list[str]:
    """What is neither recipe nor data, may change within a run, and is no longer what wrote this checkpoint. `dropout` is
    the student's highest."""
    lines = []
    if versions := _differences(_versions(state.get("versions", {})), _versions(library_versions())):
        lines.append(
            f"this checkpoint was written with other versions ({'; '.join(versions)}): results may change by rounding"
        )
    then, now = flat(state.get("deepspeed", {})), flat(config)
    if then and (changed := _differences(then, now, NO_CHANGE)):
        lines.append(f"the DeepSpeed config is no longer the one of this checkpoint ({'; '.join(changed)})")
    cut = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    if dropout > 0 and (
        changed := _differences({key: then.get(key) for key in cut} if then else {}, {key: now.get(key) for key in cut})
    ):
        lines.append(
            f"other ranks or another micro-batch than this checkpoint's ({'; '.join(changed)}) draw other dropout masks "
            f"(dropout is {dropout:g}): later losses are like those of another seed, not equal up to rounding"
        )
    return lines


def flat(tree: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    """Nested dictionaries as one, under dotted keys."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{where}{key}.")
        else:
            found[f"{where}{key}"] = value
    return found


def _versions(versions: Mapping[str, Any]) -> dict[str, Any]:
    return flat({"python": versions["python"], **versions["packages"]}) if versions else {}


def _differences(then: Mapping[str, Any], now: Mapping[str, Any], but: tuple[str, ...] = ()) -> list[str]:
    """Of an empty `then` nothing is known."""
    names = [name for name in {**then, **now} if name not in but] if then else []
    return [f"{name}: {then.get(name)} -> {now.get(name)}" for name in names if then.get(name) != now.get(name)]
