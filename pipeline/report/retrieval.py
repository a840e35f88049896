"""The retrieval results in a run directory: those of the demo, or else those of `pipeline evaluate`.

In: a run directory, its last step, its teacher's name. Out: results by label: `teacher`, `before` and `after` of a demo;
`teacher` and `student` of an evaluation. The label of a student of an earlier step has its number of steps.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.evaluation.task import Results
from pipeline.runtime.json_files import RESTORE, read_json_if_there

AFTER = "after"
STAGES = ("teacher", "before", AFTER)


def _result_of(path: Path) -> dict[str, Any]:
    result = read_json_if_there(path).get("result")
    if not isinstance(result, dict):
        raise UserError(f"{path} has no `result` with figures. {RESTORE}.")
    return result


def read_retrieval(run_dir: Path, last_step: int, teacher: str | None) -> Results:
    """The demo's results if they are of the last step, else those of an evaluation, else the demo's earlier results."""
    demo = {stage: _result_of(path) for stage in STAGES if (path := run_dir / "retrieval" / f"{stage}.json").is_file()}
    steps = read_json_if_there(run_dir / "demo_training.json").get("steps", last_step)
    if demo and steps == last_step:
        return demo
    evaluated = _evaluated(run_dir, last_step, teacher)
    return evaluated or {f"after {steps:,} steps" if stage == AFTER else stage: demo[stage] for stage in demo}


def _evaluated(run_dir: Path, last_step: int, teacher: str | None) -> Results:
    """Teacher and student of the run in `RUN_DIR/evaluation`, where slurm/evaluate.sh writes them. Other models in the
    file do not belong to this run."""
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
