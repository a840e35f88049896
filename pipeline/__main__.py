"""`python -m pipeline VERB ...`: everything but training. Each verb is one module with `add_arguments` and `run`."""

from __future__ import annotations

import argparse
import importlib
import sys
from types import ModuleType

from data_prep.command_line import CommandLine
from pipeline.errors import exit_code_of

VERBS = {
    "export": "pipeline.export.command",
    "evaluate": "pipeline.evaluation.command",
    "report": "pipeline.report.page",
    "trim": "pipeline.export.trim",
    "card": "pipeline.export.card",
    "doctor": "pipeline.doctor.command",
    "plan": "pipeline.planning.command",
    "recipes": "pipeline.recipe_reference",
}


def main(arguments: list[str]) -> None:
    """Import the verb's module alone: `--help` of one verb must not cost the imports of all."""
    parser = CommandLine(prog="python -m pipeline", description=__doc__)
    parser.add_argument("verb", choices=VERBS)
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)  # deepspeed --module adds it
    parser.add_argument("rest", nargs=argparse.REMAINDER, help="see `python -m pipeline VERB --help`")
    chosen = parser.parse_args(arguments)
    run_verb(chosen.verb, importlib.import_module(VERBS[chosen.verb]), chosen.rest)


def run_verb(name: str, module: ModuleType, arguments: list[str]) -> None:
    """Parse the verb's own arguments and run it."""
    parser = CommandLine(prog=f"python -m pipeline {name}", description=module.__doc__)
    module.add_arguments(parser)
    module.run(parser.parse_args(arguments))


if __name__ == "__main__":
    sys.exit(exit_code_of(lambda: main(sys.argv[1:])))
