"""`make mutants`: plant each bug of bugs.py in a copy of the tree, and check that its test fails.

The tests must pass in the copy without a bug. Prints one row per bug; the exit code is 1 if a bug was not caught. It takes
a few minutes. `python -m tests.mutants mask sqrt` plants only the bugs whose names contain one of the words.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tests.conftest import REPO
from tests.mutants.bugs import BUGS, Bug

PASSED, FAILED = 0, 1  # pytest's exit codes; any other means that the test did not run


def copy_tree(target: Path, below: Sequence[str] = ()) -> None:
    """Copy tracked and new files as they are now, without those that git ignores. `below`: only these directories."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z", "--", *below]
    listed = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split("\0")):
        if (REPO / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(REPO / name, target / name)


def run_tests(root: Path, tests: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """pytest in the copy."""
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONPATH", None)
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)


def verdict(root: Path, bug: Bug) -> str:
    """ "caught" if the test fails with the bug. The file is restored afterwards."""
    path = root / bug.file
    clean = path.read_bytes()
    bug.plant(root)
    try:
        code = run_tests(root, [bug.test]).returncode
    finally:
        path.write_bytes(clean)
    return {FAILED: "caught", PASSED: "NOT CAUGHT"}.get(code, f"TEST DID NOT RUN (pytest exit code {code})")


def main(words: Sequence[str]) -> int:
    """Exit code 0 if every bug was caught."""
    bugs = [bug for bug in BUGS if not words or any(word in bug.name for word in words)]
    with tempfile.TemporaryDirectory(prefix="mutants-") as directory:
        root = Path(directory)
        copy_tree(root)
        clean = run_tests(root, sorted({bug.test for bug in bugs}))
        if clean.returncode != PASSED:
            print(f"{clean.stdout[-3000:]}\nthe tests do not pass without any bug; fix that first", file=sys.stderr)
            return 1
        print(f"{'bug':<30} {'file':<42} {'result':<11} test", flush=True)
        verdicts = []
        for bug in bugs:
            verdicts.append(verdict(root, bug))
            print(f"{bug.name:<30} {bug.file:<42} {verdicts[-1]:<11} {bug.test}", flush=True)
    caught = verdicts.count("caught")
    print(f"{caught} of {len(bugs)} caught")
    return int(caught < len(bugs))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
