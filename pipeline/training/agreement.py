"""Facts that must be equal on all ranks, and the differences between a checkpoint's environment and the present one.

In: a recipe, an effective DeepSpeed config, versions, shapes. Out: flat facts for `preflight.agree`, which names a difference
by its key, and warnings for a resume.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from pipeline.config import Recipe, as_tree
from pipeline.provenance import code_fingerprint, library_versions

# They follow from the recipe and the number of ranks, or concern only what is printed.
NO_CHANGE = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "train_batch_size", "steps_per_print")


def settings_facts(recipe: Recipe, config: Mapping[str, Any], precisions: Mapping[str, str]) -> dict[str, Any]:
    """Code, libraries, recipe and DeepSpeed config of one rank. Causes come before their effects."""
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


def environment_warnings(state: Mapping[str, Any], config: Mapping[str, Any], dropout: float) -> list[str]:
    """Warnings about versions, DeepSpeed config and batch split that differ from those of a checkpoint.

    Args:
        state: the checkpoint's `state.json`
        config: the present effective DeepSpeed config
        dropout: the student's highest dropout probability
    """
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
    """Nested dictionaries as one dictionary with dotted keys."""
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
    """`key: then -> now` for each difference; none if `then` is empty, which means unknown."""
    names = [name for name in {**then, **now} if name not in but] if then else []
    return [f"{name}: {then.get(name)} -> {now.get(name)}" for name in names if then.get(name) != now.get(name)]
