"""Compare the reports of all nodes, and name every node that has a problem or differs from the others.

python slurm/lib/compare_nodes.py REPORTS_DIRECTORY NODE [NODE ...]          exit code 1 where a node is bad
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any


def read_report(directory: Path, node: str) -> dict[str, Any]:
    """The last line that the node wrote, or a report with the problem that there is none."""
    try:
        return json.loads((directory / f"{node}.json").read_text(encoding="utf-8").splitlines()[-1])
    except (OSError, ValueError, IndexError):
        log = directory / f"{node}.log"
        last = log.read_text(errors="replace").strip().splitlines()[-1:] if log.is_file() else []
        return {"facts": {}, "problems": [f"no report; {last[0] if last else 'it did not start'} (see {log})"]}


def differences(reports: dict[str, dict[str, Any]]) -> list[str]:
    """`node: fact is this, elsewhere that`, for every node that differs from the majority."""
    found = []
    names = {name for report in reports.values() for name in report["facts"]}
    for name in sorted(names):
        values = {node: report["facts"][name] for node, report in reports.items() if name in report["facts"]}
        usual = Counter(map(str, values.values())).most_common(1)[0][0]
        found += [
            f"{node}: {name} is {value}, elsewhere {usual}" for node, value in values.items() if str(value) != usual
        ]
    return found


def main(directory: Path, nodes: list[str]) -> int:
    reports = {node: read_report(directory, node) for node in nodes}
    bad = [f"{node}: {problem}" for node, report in reports.items() for problem in report["problems"]]
    bad += differences(reports)
    for node, report in reports.items():
        print(f"{node}: " + ", ".join(f"{name} {value}" for name, value in report["facts"].items()))
    for line in bad:
        print(f"BAD {line}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
