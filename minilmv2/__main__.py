"""All commands as `minilmv2 VERB ...`: those of `python -m data_prep`, of `python -m pipeline`, and the training.

In: the command line. Out: what the verb prints and writes, and its exit code.
"""

from __future__ import annotations

import argparse
import os
import sys

from data_prep.__main__ import VERBS as DATA_VERBS
from data_prep.__main__ import main as data_main
from data_prep.command_line import PROGRAM, VERBOSE_HELP, CommandLine, add_version, quiet_launcher
from pipeline.__main__ import VERBS, first_line, verb_lines
from pipeline.__main__ import main as pipeline_main
from pipeline.errors import run_to_exit
from pipeline.installed import training_script

TRAIN = "train"
VERBS_OF_ALL = [*DATA_VERBS, TRAIN, *VERBS]
LAUNCHER_OPTIONS = (
    "--num_gpus",
    "--num_nodes",
    "--include",
    "--exclude",
    "--hostfile",
    "--master_addr",
    "--master_port",
)


def main() -> None:
    """Run one verb. The entry point of the program `minilmv2`."""
    parser = CommandLine(
        prog=PROGRAM,
        description="Distil multilingual encoders by MiniLMv2.",
        epilog=f"{_describe_verbs()}\n\n{VERBOSE_HELP}",
    )
    parser.add_argument(
        "verb", choices=VERBS_OF_ALL, metavar="VERB", help="one of those below; its options: VERB --help"
    )
    add_version(parser)
    rest = parser.add_argument("rest", nargs=argparse.REMAINDER, metavar="...", help="options of the verb")
    rest.required = False  # so that the message about a missing verb does not name it
    chosen = parser.parse_args()
    if chosen.verb == TRAIN:
        run_to_exit(lambda: _train(chosen.rest))
    if chosen.verb in VERBS:
        run_to_exit(lambda: pipeline_main([chosen.verb, *chosen.rest], PROGRAM))
    sys.exit(data_main([chosen.verb, *chosen.rest], PROGRAM))


def _train(arguments: list[str]) -> None:
    """Replace this process by the `deepspeed` command, which starts one process per GPU. Its own options come first."""
    program, *options = quiet_launcher()
    for_launcher: list[str] = []
    while arguments and arguments[0].partition("=")[0] in LAUNCHER_OPTIONS:
        count = 1 if "=" in arguments[0] else 2
        for_launcher, arguments = for_launcher + arguments[:count], arguments[count:]
    os.execv(program, [program, *options, *for_launcher, str(training_script()), *arguments])


def _describe_verbs() -> str:
    described = {name: f"{text[0].upper()}{text[1:]}." for name, text in DATA_VERBS.items()}
    described |= {name: first_line(module) for name, module in {TRAIN: "pipeline.train", **VERBS}.items()}
    return verb_lines(described)


if __name__ == "__main__":
    main()
