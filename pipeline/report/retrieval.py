"""The retrieval results about a student: those of the demo in its directory, or else those of `pipeline evaluate`.

In: the files of a student, its last step, its teacher's name. Out: results by label: `teacher`, `before` and `after` of a
demo; `teacher` and `student` of an evaluation. The label of a student of an earlier step has its number of steps.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.evaluation import results
from pipeline.evaluation.encoder import POOLINGS, split_name
from pipeline.evaluation.task import Results
from pipeline.report.owners import evaluations_of, owner
from pipeline.runtime.json_files import RESTORE, read_json_if_there
from pipeline.runtime.run_paths import RunPaths

AFTER = "after"
STAGES = ("teacher", "before", AFTER)


def demo_file(paths: RunPaths, stage: str) -> Path:
    return paths.files / "retrieval" / f"{stage}.json"


def _checked(result: Any, path: Path) -> dict[str, Any]:
    """The result, if it has the means of a retrieval task, which all readers need."""
    try:
        means = [*(result["mean"][pooling] for pooling in POOLINGS), *result["mean"].values()]
        means += [pair[pooling]["mean"] for pair in result["per_pair"].values() for pooling in POOLINGS]
        are_figures = all(math.isfinite(mean) for mean in means)
    except (AttributeError, KeyError, TypeError, OverflowError):
        are_figures = False
    if not are_figures:
        raise UserError(f"{path} has no `result` with the figures of a retrieval task. {RESTORE}.")
    return result


def read_demo(paths: RunPaths, last_step: int) -> tuple[Results, int]:
    """The demo's results, and the number of steps that they are of: the last one where that is not recorded."""
    files = {stage: path for stage in STAGES if (path := demo_file(paths, stage)).is_file()}
    demo = {stage: _checked(read_json_if_there(path).get("result"), path) for stage, path in files.items()}
    return demo, read_json_if_there(paths.files / "demo_training.json").get("steps", last_step)


def read_retrieval(paths: RunPaths, last_step: int, teacher: str | None) -> Results:
    """The demo's results if they are of the last step, else those of an evaluation, else the demo's earlier results."""
    demo, steps = read_demo(paths, last_step)
    if demo and steps == last_step:
        return demo
    evaluated = _evaluated(paths, last_step, teacher)
    return evaluated or {f"after {steps:,} steps" if stage == AFTER else stage: demo[stage] for stage in demo}


def _evaluated(paths: RunPaths, last_step: int, teacher: str | None) -> Results:
    """Teacher and student in the evaluations of this run. Other models in the files do not belong to this student."""
    found: Results = {}
    for path in sorted(evaluations_of(paths), key=lambda path: path.stat().st_mtime):
        report = results.read(path)
        try:
            of_task = report["tasks"].get("retrieval", {})
            evaluated = [(name, result, report["models"][name].get("steps")) for name, result in of_task.items()]
        except (AttributeError, KeyError, TypeError) as error:
            raise UserError(f"{path} is not an evaluation ({type(error).__name__}: {error}). {RESTORE}.") from None
        for name, result, steps in evaluated:
            if split_name(name)[0] == teacher:
                found["teacher"] = _checked(result, path)
            elif owner(name, path, [paths]) is not None:
                label = "student" if steps in (None, last_step) else f"student of {steps:,} steps"
                found[label] = _checked(result, path)
    return dict(sorted(found.items(), key=lambda item: item[0] != "teacher"))
