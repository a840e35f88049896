"""The parts that every `bench_*.py` shares: two options, the machine and commit in the report, a Markdown table.

A benchmark calls `arguments(__doc__)`, measures, and calls `publish(...)`, which prints the table and, with `--json FILE`,
writes the same figures for programs.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

from data_prep.command_line import CommandLine

REPO = Path(__file__).resolve().parent.parent


def arguments(description: str | None) -> argparse.ArgumentParser:
    """A parser with `--quick` and `--json FILE`. A benchmark adds its own options."""
    parser = CommandLine(description=description)
    parser.add_argument("--quick", action="store_true", help="a small version, in seconds; its figures are rough")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to FILE")
    return parser


def machine() -> str:
    """Processor, cores and memory, without the name of the host."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    memory_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{model}, {os.cpu_count()} cores, {memory_gib:.0f} GiB, {platform.system()}, Python {platform.python_version()}"


def commit() -> str:
    """Short commit hash, with `+` for local changes; "unknown" outside a checkout."""
    describe = ["git", "-C", str(REPO), "describe", "--always", "--exclude=*", "--dirty=+"]
    try:
        return subprocess.run(describe, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table. Floats have three significant digits."""
    cells = [[f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows]
    return "\n".join("| " + " | ".join(row) + " |" for row in [list(header), ["---"] * len(header), *cells])


def publish(
    title: str, header: Sequence[str], rows: Sequence[Sequence[Any]], figures: dict[str, Any], json_file: Path | None
) -> str:
    """Print the report as Markdown and return it. With `json_file`, also write `figures` with machine, commit and date."""
    command = " ".join(["python", *(word.removeprefix(f"{REPO}/") for word in sys.argv)])
    about = {"date": date.today().isoformat(), "commit": commit(), "machine": machine(), "command": command}
    report = "\n".join(
        [f"# {title}", "", *(f"- {key}: {value}" for key, value in about.items()), "", markdown_table(header, rows), ""]
    )
    print(report)
    if json_file:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(json.dumps({**about, **figures}, indent=1) + "\n")
    return report
