"""Which student of a run a model in an evaluation is.

In: the name of the model, the `evaluation.json` with it, and the files of the students it may be. Out: one of them, or None.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.comparison.students import read_recipe
from pipeline.config import Recipe, build_recipe
from pipeline.errors import UserError
from pipeline.evaluation import results
from pipeline.evaluation.encoder import split_name
from pipeline.export.card import LINEAGE_FILE
from pipeline.export.evaluate import EXPORTED, export_name
from pipeline.provenance import changed_keys, resume_critical_config
from pipeline.runtime.json_files import read_json
from pipeline.runtime.run_paths import STUDENTS, RunPaths

EXPORT = "student"  # where an export of a student is, next to its other files


def evaluations_of(paths: RunPaths) -> list[Path]:
    """The evaluations in the directories of a run and of its student. They may concern this run's students only."""
    places = dict.fromkeys((paths.directory, paths.files))
    inside = [place / name for place in places for name in (results.FILE, f"evaluation/{results.FILE}")]
    return [path for path in inside if path.is_file()]


def owner(model: str, evaluation: Path, candidates: Sequence[RunPaths]) -> int | None:
    """The number of the student that a model is an export of; None for any other model, or if several may be.

    `MODEL@LAYER` reads other values than those that were distilled and belongs to none, nor does a trimmed student.
    """
    name, layer = split_name(model)
    if layer is not None:
        return None
    export = _find(name, evaluation)
    if export is None:
        fits = [_common_end(name, paths) for paths in candidates]
    else:
        fits = [_is_export_of(export, paths) for paths in candidates]
    best = max(fits, default=0)
    return fits.index(best) if best and fits.count(best) == 1 else None


def _find(name: str, evaluation: Path) -> Path | None:
    """The directory of a model. A relative name is that of a directory next to the evaluation, or above it, or here."""
    bases = (*evaluation.resolve().parents, Path())
    return next((path.resolve() for base in bases if (path := base / name).is_dir()), None)


def _common_end(name: str, paths: RunPaths) -> int:
    """For a model that is no longer where it was: how many of its last directories are those of the student's export."""
    run_dir = paths.directory.resolve()
    place = (STUDENTS, paths.student, EXPORT) if paths.student else (EXPORT,)
    parts, ends = Path(name).parts, (run_dir / Path(*place)).parts
    if parts[-2:] == (EXPORTED, export_name(run_dir, paths.student)):
        return 2
    common = next((n for n, (a, b) in enumerate(zip(reversed(parts), reversed(ends), strict=False)) if a != b), None)
    length = min(len(parts), len(ends)) if common is None else common
    return length if length > len(place) else 0


def _is_export_of(export: Path, paths: RunPaths) -> bool:
    if export == paths.files.resolve() / EXPORT:
        return True
    if not (export / LINEAGE_FILE).is_file():
        return False
    lineage = read_json(export / LINEAGE_FILE)
    if "trimmed" in lineage:  # its figures are those of a smaller vocabulary
        return False
    if lineage.get("student", "") != paths.student or not _is_of_recipe(lineage.get("recipe"), paths.recipe):
        return False
    if export.parent.name == EXPORTED:
        return export.name == export_name(paths.directory, paths.student)
    run_dir = next((place for place in export.parents if _is_run(place)), None)
    return run_dir is None or run_dir in (paths.directory.resolve(), paths.files.resolve())


def _is_run(directory: Path) -> bool:
    """Whether an export in this directory is one of its student or students."""
    paths = RunPaths(directory)
    return paths.description.is_file() or (paths.recipe.is_file() and (directory / STUDENTS).is_dir())


def _is_of_recipe(tree: Any, file: Path) -> bool:
    """Whether a lineage's recipe computes the same as that of a run. A key that it lacks, of a newer version, has its default."""
    try:
        known = {key: value for key, value in tree.items() if key in Recipe.__dataclass_fields__}
        return not changed_keys(resume_critical_config(build_recipe(known)), read_recipe(file), by_path=True)
    except (UserError, AttributeError):
        return False
