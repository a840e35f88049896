"""Distil a student, by the same command on a laptop and on a cluster.

deepspeed pipeline/train.py --deepspeed ds_configs/zero2.json                      (recipes/quickstart.yaml)
deepspeed pipeline/train.py --deepspeed ds_configs/zero2.json --recipe recipes/xlmr_large_l12_h384.yaml
torchrun --nproc_per_node 8 pipeline/train.py --deepspeed ds_configs/zero2.json    or srun, or plain python
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if __name__ == "__main__":
    # Python puts the directory of a script, pipeline/, first on sys.path. The packages are one level up.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from data_prep.command_line import VERBOSE_HELP, CommandLine, add_version
from data_prep.outputs import output_path
from pipeline.errors import run_to_exit
from pipeline.installed import shipped_file

DEFAULT_RECIPE = "recipes/quickstart.yaml"


def main() -> None:
    """Parse the command line, and train. The slow imports follow after the arguments have been checked."""
    parser = CommandLine(description=__doc__, epilog=VERBOSE_HELP)
    parser.add_argument(
        "--deepspeed", type=shipped_file, required=True, metavar="JSON", help="for example ds_configs/zero2.json"
    )
    parser.add_argument(
        "--recipe", type=shipped_file, help=f"teacher, student, data and schedule (default: {DEFAULT_RECIPE})"
    )
    parser.add_argument("--run-dir", type=output_path, help="directory of all output (default: runs/NAME_OF_RECIPE)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a recipe key")
    parser.add_argument("--allow-change", action="store_true", help="resume although the recipe or the data changed")
    parser.add_argument("--dry-run", action="store_true", help="run one real step, print a summary, keep no files")
    add_version(parser)
    parser.add_argument("--local_rank", "--local-rank", type=int, default=0, help=argparse.SUPPRESS)  # launchers add it
    arguments = parser.parse_args()
    recipe_path = arguments.recipe or shipped_file(DEFAULT_RECIPE)

    from pipeline.training.launch import RunOptions, run_from_files

    options = RunOptions(
        recipe_path=recipe_path,
        recipe_is_default=arguments.recipe is None,
        ds_path=arguments.deepspeed,
        run_dir=arguments.run_dir or Path("runs") / recipe_path.stem,
        overrides=arguments.set,
        allow_change=arguments.allow_change,
        is_dry_run=arguments.dry_run,
    )
    run_from_files(options)


if __name__ == "__main__":
    run_to_exit(main)
