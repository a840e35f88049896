"""Measure what identity checks and the directory lock add to the start of a run, in seconds. They add nothing to a step.

    python benchmarks/bench_start.py [--quick] [--json FILE]

Runs on recipes/quickstart.yaml after `make demo`. Identity: hashes of the teacher's weights and config, and of the
tokenizer's files. Facts: what all ranks compare, with every shape of a student, serialised and hashed. Lock: acquire and
release the lock of a run directory.
"""

from __future__ import annotations

import hashlib
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))

from benchmarks.measure import arguments, publish  # noqa: E402
from data_prep.ownership import owned_directory  # noqa: E402
from pipeline.config import load_recipe  # noqa: E402
from pipeline.distillation.models.teacher import load_encoder  # noqa: E402
from pipeline.training.agreement import settings_facts, shape_facts  # noqa: E402
from pipeline.training.identity import identity_of  # noqa: E402

ROUNDS = 7


def seconds(action: Callable[[], object], rounds: int) -> float:
    """Median of `rounds`, after one that fills the page cache and is not counted."""
    spent = []
    for _ in range(rounds + 1):
        began = time.perf_counter()
        action()
        spent.append(time.perf_counter() - began)
    return statistics.median(spent[1:])


def main() -> None:
    options = arguments(__doc__).parse_args()
    recipe = load_recipe(REPO / "recipes/quickstart.yaml", [])
    config = json.loads((REPO / "ds_configs/zero2.json").read_text())
    weights = load_encoder(recipe.teacher).state_dict()

    def facts() -> None:
        everything = {**settings_facts(recipe, config, {}), **shape_facts(weights)}
        hashlib.sha256(json.dumps(everything, sort_keys=True).encode()).hexdigest()

    def lock() -> None:
        with tempfile.TemporaryDirectory() as directory, owned_directory(Path(directory) / "run", "the run directory"):
            pass

    parts = {"identity": lambda: identity_of(recipe.teacher, recipe.vocabulary), "facts": facts, "lock": lock}
    found = {name: seconds(part, 2 if options.quick else ROUNDS) for name, part in parts.items()}
    found["together"] = sum(found.values())
    millions = sum(tensor.numel() for tensor in weights.values()) / 1e6
    title = f"Cost at the start of a run: {recipe.teacher}, {millions:.1f} M parameters"
    publish(title, ["part", "seconds"], [list(row) for row in found.items()], found, options.json)


if __name__ == "__main__":
    main()
