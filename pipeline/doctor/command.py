"""Before a run: is this machine ready, and are recipe, shards and teacher? Each finding comes with its mend.

    python -m pipeline doctor                                        the machine alone
    python -m pipeline doctor --recipe recipes/quickstart.yaml       and what that run would need

Nothing is written but a probe in the run directory, which is removed. Exit code 0, or 2 when something must be mended
before a run can work. What it looks at: doctor_machine.py, doctor_recipe.py.
"""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path

from pipeline.doctor.machine import Finding, machine_findings
from pipeline.doctor.recipe import recipe_findings
from pipeline.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--recipe", type=Path, help="also look at this run's shards, teacher, memory and disk")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a recipe key")
    parser.add_argument("--deepspeed", type=Path, default=Path("ds_configs/zero2.json"), metavar="JSON")
    parser.add_argument("--run-dir", type=Path, help="where the run will be (default: runs/NAME_OF_RECIPE)")
    parser.add_argument("--ranks", type=int, help="processes that the run will have (default: GPUs here, or 1)")
    parser.add_argument("--hash", action="store_true", help="read every byte of the shards and check its hash")


def run(arguments: argparse.Namespace) -> None:
    name = arguments.recipe.stem if arguments.recipe else "."
    run_dir = arguments.run_dir or Path("runs") / name
    findings = machine_findings(run_dir)
    if arguments.recipe:
        ranks = arguments.ranks
        findings += recipe_findings(
            arguments.recipe, arguments.set, arguments.deepspeed, run_dir, ranks, check_hashes=arguments.hash
        )
    print(table(findings))
    failed = [finding.subject for finding in findings if finding.status == "fail"]
    if failed:
        raise UserError(
            f"not ready: {', '.join(dict.fromkeys(failed))}. The lines above that begin with FAIL say how to mend it"
        )


def table(findings: list[Finding]) -> str:
    """One line per finding, its mend below it where there is something to do, and the count of each kind."""
    lines = []
    for finding in findings:
        status = finding.status if finding.status == "ok" else finding.status.upper()
        lines.append(f"{status:<5} {finding.subject:<12} {finding.what}")
        if finding.fix:
            lines.append(f"{'':<18} mend: {finding.fix}")
    counts = Counter(finding.status for finding in findings)
    return "\n".join([*lines, f"{counts['ok']} ok, {counts['warn']} to look at, {counts['fail']} to mend"])
