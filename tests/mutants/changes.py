"""Does a planted bug change any figure? A list of bugs as JSON on standard input, verdicts as JSON on standard output.

    python -m tests.mutants.changes        bug name -> "changed", "SAME", or why its probe gave no figures

The libraries are imported once. Each probe then runs in a fork that imports `pipeline` and `data_prep` from the changed copy.
"""

from __future__ import annotations

import json
import math
import os
import sys
import tempfile
import traceback
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tests.mutants import probes
from tests.mutants.__main__ import copy_tree
from tests.mutants.bugs import Bug

TOLERANCE = 1e-3


def figures(root: Path, probe: str) -> Any:
    """What the probe returns with the packages of `root`; a string begins with "failed" where it raised."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        try:
            os.dup2(2, 1)  # libraries print there
            sys.path.insert(0, str(root))
            answer: Any = getattr(probes, probe)()
        except BaseException:
            answer = "failed: " + traceback.format_exc()[-1500:]
        with os.fdopen(writing, "w") as pipe:
            json.dump(answer, pipe)
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        answer = json.loads(pipe.read() or '"failed: it died"')
    os.waitpid(pid, 0)
    return answer


def same(one: Any, other: Any) -> bool:
    """Whether both are equal; numbers are compared to a relative difference of 1e-3."""
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, int | float) and isinstance(other, int | float):
        both_nan = math.isnan(one) and math.isnan(other)
        return both_nan or math.isclose(one, other, rel_tol=TOLERANCE, abs_tol=1e-7)
    return one == other


def verdicts(bugs: list[Bug]) -> dict[str, str]:
    """Plant, probe and remove each bug in one copy of the packages."""
    import deepspeed  # noqa: F401
    import transformers.models.xlm_roberta.modeling_xlm_roberta  # noqa: F401

    found, clean = {}, {}
    with tempfile.TemporaryDirectory(prefix="changes-") as directory:
        root = Path(directory)
        copy_tree(root, ["pipeline", "data_prep"])
        for bug in bugs:
            if bug.probe not in clean:
                clean[bug.probe] = figures(root, bug.probe)
            if isinstance(clean[bug.probe], str):
                found[bug.name] = f"without the bug {clean[bug.probe]}"
                continue
            path = root / bug.file
            before = path.read_bytes()
            bug.plant(root)
            planted = figures(root, bug.probe)
            path.write_bytes(before)
            found[bug.name] = (
                planted if isinstance(planted, str) else "SAME" if same(planted, clean[bug.probe]) else "changed"
            )
    return found


def as_json(bugs: list[Bug]) -> str:
    return json.dumps([asdict(bug) for bug in bugs])


if __name__ == "__main__":
    os.environ["DS_ACCELERATOR"] = "cpu"
    sys.dont_write_bytecode = True  # a planted file may have the size and the second of the clean one
    answers = verdicts([Bug(**fields) for fields in json.load(sys.stdin)])
    print(json.dumps(answers))
