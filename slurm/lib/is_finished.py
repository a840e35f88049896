"""Tell whether a run with the marker file DONE is the run that this job asks for. Prints `finished` or `asked for more`.

python slurm/lib/is_finished.py RECIPE RUN_DIR [arguments of pipeline/train.py]        (distill_xlmr.sh, before it starts ranks)

After `asked for more`, training decides: it trains more steps, and accepts or rejects other changes by its own rules.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])

from pipeline.config import as_tree, load_recipe  # noqa: E402
from pipeline.errors import UserError  # noqa: E402


def is_finished(recipe_path: Path, run_dir: Path, overrides: list[str]) -> bool:
    """Whether the recipe in the run directory equals the one that is asked for."""
    asked_for = as_tree(load_recipe(recipe_path, overrides))
    try:
        trained = as_tree(load_recipe(run_dir / "recipe.yaml", []))
    except UserError:  # missing, or written by a version with other keys
        return False
    return asked_for == trained


def main() -> int:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--set", action="append", default=[])
    arguments, _ = parser.parse_known_args()
    try:
        print("finished" if is_finished(arguments.recipe, arguments.run_dir, arguments.set) else "asked for more")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
