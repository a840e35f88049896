"""The retrieval settings of the demo. A training recipe has none.

In: a recipe file and `--set` overrides. Out: the settings, and the overrides that are for training.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.config import apply_override, build_section
from pipeline.errors import UserError
from pipeline.evaluation.retrieval import RetrievalConfig
from pipeline.recipe.text import read_yaml

QUICKSTART = Path("recipes/quickstart.yaml")


def retrieval_settings(recipe: Path, overrides: list[str]) -> RetrievalConfig:
    """What the demo evaluates: defaults < a `retrieval:` section of the recipe < `--set retrieval.KEY=VALUE`.

    Recipes had such a section in earlier versions.
    """
    tree: dict[str, Any] = {"retrieval": read_yaml(recipe).get("retrieval", {})}
    for override in overrides:
        if _is_retrieval(override):
            apply_override(tree, override)
    try:
        return build_section(RetrievalConfig, tree["retrieval"], "retrieval")
    except UserError as error:
        raise UserError(f"{recipe}: {error}") from None


def training_overrides(overrides: list[str]) -> list[str]:
    """The overrides of recipe keys."""
    return [override for override in overrides if not _is_retrieval(override)]


def _is_retrieval(override: str) -> bool:
    return override.partition("=")[0].partition(".")[0] == "retrieval"
