"""Everything except training, as `python -m pipeline VERB ...`. Training: `pipeline/train.py --help`."""

from __future__ import annotations

import argparse
import ast
import importlib
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

from data_prep.command_line import VERBOSE_HELP, CommandLine, add_version
from pipeline.errors import run_to_exit

PROGRAM = "python -m pipeline"
VERBS = {  # each module has a docstring, `add_arguments` and `run`
    "export": "pipeline.export.command",
    "evaluate": "pipeline.export.evaluate",
    "report": "pipeline.report.command",
    "compare": "pipeline.report.compare",
    "trim": "pipeline.export.trim",
    "card": "pipeline.export.card",
    "doctor": "pipeline.doctor.command",
    "plan": "pipeline.planning.command",
    "recipes": "pipeline.recipe_reference",
}


def main(arguments: list[str], program: str = PROGRAM) -> None:
    """Import and run the module of one verb. The other verbs' imports would take seconds."""
    parser = CommandLine(prog=program, description=__doc__, epilog=f"{_describe_verbs()}\n\n{VERBOSE_HELP}")
    parser.add_argument("verb", choices=VERBS, metavar="VERB", help="one of those below; its options: VERB --help")
    add_version(parser)
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)  # deepspeed --module adds it
    rest = parser.add_argument("rest", nargs=argparse.REMAINDER, metavar="...", help="options of the verb")
    rest.required = False  # so that the message about a missing verb does not name it
    chosen = parser.parse_args(arguments)
    run_verb(chosen.verb, importlib.import_module(VERBS[chosen.verb]), chosen.rest, program)


def run_verb(name: str, module: ModuleType, arguments: list[str], program: str = PROGRAM) -> None:
    """Parse the verb's own arguments and run it."""
    parser = CommandLine(prog=f"{program} {name}", description=module.__doc__)
    module.add_arguments(parser)
    module.run(parser.parse_args(arguments))


def _describe_verbs() -> str:
    return verb_lines({name: first_line(module) for name, module in VERBS.items()})


def verb_lines(described: Mapping[str, str]) -> str:
    """One line per verb."""
    return "\n".join(["verbs:", *(f"  {name:<10} {text}" for name, text in described.items())])


def first_line(module: str) -> str:
    """The first line of a module's docstring, without an import: torch would take seconds."""
    path = Path(__file__).parent.parent / f"{module.replace('.', '/')}.py"
    return (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").partition("\n")[0]


if __name__ == "__main__":
    run_to_exit(lambda: main(sys.argv[1:]))
