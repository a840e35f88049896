"""What a run directory holds about retrieval: what the demo measured, or else `pipeline evaluate`.

In: a run directory, its last step, its teacher's name. Out: results by what they are of, for the report: `teacher`,
`before` and `after` of a demo; `teacher` and `student` of an evaluation. A student of an earlier step says so.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.runtime.json_files import RESTORE, read_json_if_there

STAGES = ("teacher", "before", "after")
Results = dict[str, dict[str, Any]]


def _result_of(path: Path) -> dict[str, Any]:
    result = read_json_if_there(path).get("result")
    if not isinstance(result, dict):
        raise UserError(f"{path} has no `result` with figures. {RESTORE}.")
    return result


def read_retrieval(run_dir: Path, last_step: int, teacher: str | None) -> Results:
    """The demo's results while they are of the last step, else those of an evaluation, else the demo's earlier ones."""
    demo = {stage: _result_of(path) for stage in STAGES if (path := run_dir / "retrieval" / f"{stage}.json").is_file()}
    steps = read_json_if_there(run_dir / "demo_training.json").get("steps", last_step)
    if demo and steps == last_step:
        return demo
    evaluated = _evaluated(run_dir, last_step, teacher)
    return evaluated or {f"after {steps:,} steps" if stage == "after" else stage: demo[stage] for stage in demo}


def _evaluated(run_dir: Path, last_step: int, teacher: str | None) -> Results:
    """Teacher and student in `RUN_DIR/evaluation`, where slurm/evaluate.sh puts them; whatever stands beside them is not
    of this run."""
    report = read_json_if_there(run_dir / "evaluation" / "evaluation.json")
    found: Results = {}
    for name, result in report.get("tasks", {}).get("retrieval", {}).items():
        model = re.sub(r"@\d+$", "", name)
        steps = report.get("models", {}).get(name, {}).get("steps")
        if model == teacher:
            found["teacher"] = result
        elif Path(model).parts[-2:] == (run_dir.resolve().name, "student"):
            found["student" if steps in (None, last_step) else f"student of {steps:,} steps"] = result
    return dict(sorted(found.items(), key=lambda item: item[0] != "teacher"))
