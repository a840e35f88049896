"""Check this machine and a run's recipe, shards, teacher, memory and disk, and print how to fix each problem.

    python -m pipeline doctor                                        only the machine
    python -m pipeline doctor --recipe recipes/quickstart.yaml       also what that run needs

It writes only a probe file in the run directory, and removes it. Exit code 0, or 2 where a problem must be fixed before a
run can start.
"""

from __future__ import annotations

import argparse
import shlex
from collections import Counter
from pathlib import Path

from pipeline.doctor.machine import Finding, machine_findings
from pipeline.doctor.recipe import recipe_findings
from pipeline.doctor.versions import version_findings
from pipeline.errors import UserError
from pipeline.installed import shipped_file, training_command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--recipe", type=shipped_file, help="also check this run's shards, teacher, memory and disk")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a recipe key")
    parser.add_argument("--deepspeed", type=shipped_file, default="ds_configs/zero2.json", metavar="JSON")
    parser.add_argument("--run-dir", type=Path, help="directory of the run (default: runs/NAME_OF_RECIPE)")
    parser.add_argument("--ranks", type=int, help="number of processes of the run (default: GPUs here, or 1)")
    parser.add_argument("--hash", action="store_true", help="also check the hash of every shard, which reads all bytes")


def run(arguments: argparse.Namespace) -> None:
    name = arguments.recipe.stem if arguments.recipe else "."
    run_dir = arguments.run_dir or Path("runs") / name
    findings = [*version_findings(), *machine_findings(run_dir)]
    if arguments.recipe:
        ranks = arguments.ranks
        findings += recipe_findings(
            arguments.recipe, arguments.set, arguments.deepspeed, run_dir, ranks, check_hashes=arguments.hash
        )
    print(table(findings))
    failed = [finding.subject for finding in findings if finding.status == "fail"]
    if failed:
        raise UserError(
            f"not ready: {', '.join(dict.fromkeys(failed))}. The lines above that begin with FAIL say how to fix this"
        )
    if arguments.recipe:
        words = ["--deepspeed", str(arguments.deepspeed), "--recipe", str(arguments.recipe), "--run-dir", str(run_dir)]
        words += [word for override in arguments.set for word in ("--set", override)]
        print(f"next: {training_command()} {shlex.join(words)}")


def table(findings: list[Finding]) -> str:
    """One line per finding, its fix below it, and the count of each status."""
    lines = []
    for finding in findings:
        status = finding.status if finding.status == "ok" else finding.status.upper()
        lines.append(f"{status:<5} {finding.subject:<12} {finding.what}")
        if finding.fix:
            lines.append(f"{'':<18} fix: {finding.fix}")
    counts = Counter(finding.status for finding in findings)
    return "\n".join([*lines, f"{counts['ok']} ok, {counts['warn']} warnings, {counts['fail']} to fix"])
