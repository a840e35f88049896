"""Run the tests in each environment of `rows.toml`, and store the results (`make test-versions`).

    python -m tests.versions                                    all rows, all parts
    python -m tests.versions --row oldest --part unit --part dist
    python -m tests.versions --table                            the table of docs/versions.md, from the stored results

In: the committed code. Out: `pipeline/doctor/tested_versions.json`, which `doctor` reads as well. Exit code 1 if a test failed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from typing import Any

from pipeline.doctor.versions import TESTED, read_results
from tests.conftest import REPO
from tests.versions.environments import NotBuiltError, Row, build, installed_versions, read_rows

PARTS = ("unit", "golden", "dist", "e2e")
COLUMNS = ("torch", "transformers", "huggingface_hub", "tokenizers", "numpy", "sentencepiece")


def run_row(row: Row, parts: Sequence[str], jobs: int) -> dict[str, Any]:
    """Build the environment, run the parts, and return the result as it is stored."""
    try:
        build(row)
    except NotBuiltError as reason:
        return {"name": row.name, "python": row.python, "packages": {}, "not_run": str(reason), "parts": {}}
    commit = output_of(["git", "-C", str(row.tree), "rev-parse", "--short", "HEAD"])
    python = output_of([str(row.interpreter), "-c", "import platform; print(platform.python_version())"])
    return {
        "name": row.name,
        "python": python,
        "packages": installed_versions(row),
        "parts": {part: {"commit": commit, **run_part(row, part, jobs)} for part in parts},
    }


def run_part(row: Row, part: str, jobs: int) -> dict[str, Any]:
    """Run one directory of tests in the row's clone, and count the results."""
    report = row.directory / f"{part}.xml"
    report.unlink(missing_ok=True)
    words = [
        "-q",
        "-n",
        str(jobs),
        "--dist",
        "loadfile",
        "--no-loadscope-reorder",
        f"--junit-xml={report}",
        f"tests/{part}",
    ]
    path = f"{row.interpreter.parent}{os.pathsep}{os.environ['PATH']}"
    # Code that one version of torch compiled is not read by another.
    caches = {
        "TORCHINDUCTOR_CACHE_DIR": str(row.directory / "inductor"),
        "TRITON_CACHE_DIR": str(row.directory / "triton"),
    }
    environment = {**os.environ, **caches, "PATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    started = time.perf_counter()
    with open(row.directory / f"{part}.log", "w") as log:
        command = [str(row.interpreter), "-m", "pytest", *words]
        code = subprocess.run(command, cwd=row.tree, env=environment, stdout=log, stderr=log).returncode
    result = (
        {**counts(report.read_text(encoding="utf-8")), "exit_code": code} if report.is_file() else {"exit_code": code}
    )
    return {**result, "minutes": round((time.perf_counter() - started) / 60, 1), "date": time.strftime("%Y-%m-%d")}


def counts(junit_xml: str) -> dict[str, Any]:
    """Passed, failed (errors included) and skipped tests of a JUnit report, and the names of the failed ones."""
    suite = ET.fromstring(junit_xml)
    cases = list(suite.iter("testcase"))
    failed = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skipped = sum(case.find("skipped") is not None for case in cases)
    names = sorted({f"{case.get('classname')}.{case.get('name')}" for case in failed})
    return {"passed": len(cases) - len(failed) - skipped, "failed": names, "skipped": skipped}


def output_of(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def merged(stored: dict[str, Any] | None, new: dict[str, Any]) -> dict[str, Any]:
    """The new result, with the stored results of parts that were not run again in the same versions."""
    if stored is None:
        return new
    if "not_run" in new:  # an earlier result, from a machine that can build the row, is kept
        return new if "not_run" in stored else stored
    same = (stored["python"], stored["packages"]) == (new["python"], new["packages"])
    return {**new, "parts": {**stored["parts"], **new["parts"]}} if same else new


def table(results: Sequence[dict[str, Any]]) -> str:
    """The Markdown table of docs/versions.md: versions of each row, then what each part gave."""
    head = ["row", "Python", *COLUMNS, *PARTS]
    lines = [head, ["---"] * len(head)]
    for result in results:
        versions = [result["packages"].get(name, "") for name in COLUMNS]
        not_run = [f"not run: {result['not_run']}", *[""] * (len(PARTS) - 1)] if "not_run" in result else None
        parts = not_run or [cell(result["parts"].get(part)) for part in PARTS]
        lines.append([result["name"], result["python"], *versions, *parts])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cell(done: dict[str, Any] | None) -> str:
    if done is None:
        return "not run"
    if "passed" not in done:
        return f"pytest ended with code {done['exit_code']}"
    failed = f", **{len(done['failed'])} failed**" if done["failed"] else ""
    return f"{done['passed']} passed{failed}, {done['skipped']} skipped ({done['date']}, {done['commit']})"


def main() -> int:
    rows = {row.name: row for row in read_rows()}
    parser = argparse.ArgumentParser(
        prog="python -m tests.versions", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--row", action="append", choices=rows, help="only this row (default: all)")
    parser.add_argument("--part", action="append", choices=PARTS, help="only this directory of tests (default: all)")
    parser.add_argument("--jobs", type=int, default=2, help="processes that run tests (default: 2)")
    parser.add_argument("--table", action="store_true", help="only print the table of the stored results")
    arguments = parser.parse_args()
    results = {result["name"]: result for result in read_results()}
    if not arguments.table:
        ran = []
        for name in arguments.row or rows:
            print(f"{name}: environment in {rows[name].directory.relative_to(REPO)}", flush=True)
            ran.append(run_row(rows[name], arguments.part or PARTS, arguments.jobs))
            results = {result["name"]: result for result in read_results()}  # another process may have stored a row
            results[name] = merged(results.get(name), ran[-1])
            ordered = [results[known] for known in rows if known in results]
            TESTED.write_text(json.dumps(ordered, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
            print(table([ran[-1]]), flush=True)
        return int(any(part["exit_code"] for result in ran for part in result["parts"].values()))
    print(table([results[name] for name in rows if name in results]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
