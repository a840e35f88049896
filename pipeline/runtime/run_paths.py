"""The names of all files in a run directory, in one place.

In: the run directory, and of a run with several students the name of one. Out: the path of each file. What describes one
student is in `students/NAME/`; ranks, checkpoints and markers belong to the run. docs/reliability.md describes the files.
"""

from __future__ import annotations

from pathlib import Path

from data_prep.command_line import module_command
from pipeline.errors import UserError
from pipeline.recipe.text import parse, shown
from pipeline.runtime.restarts import restarts_file

STUDENTS = "students"  # directory of a run with several students


class RunPaths:
    """The files of one run. `RunPaths(run_dir)` makes nothing; it only names.

    Args:
        directory: the run directory
        student: a name in the recipe's `students`; empty for a run with one student, and for what all students share
        group: the students of a directory that were begun together, from 1: those added to a finished run are the next group
    """

    def __init__(self, directory: Path, student: str = "", group: int = 1):
        self.directory, self.student, self.group = directory, student, group
        self.files = files = directory / STUDENTS / student if student else directory  # of this student
        # What the run is, written before its first step; `export` reads these four.
        self.description = files / "run.json"  # versions, commit, ranks, data, teacher
        self.recipe = files / "recipe.yaml"  # with the overrides of --set
        self.deepspeed = files / "deepspeed.json"  # the effective config
        self.student_config = files / "student_config.json"  # in Hugging Face's format
        # What the run leaves.
        self.checkpoints = directory / (
            "checkpoints" if group == 1 else f"checkpoints-{group}"
        )  # step-N/, see runtime/checkpoint.py
        self.metrics = files / "metrics.jsonl"  # one JSON object per logged step
        self.tensorboard = directory / "tensorboard" / student
        self.loggers = files / "loggers.json"  # the run's identifier in the other `metrics.loggers`
        self.logs = directory / "logs"
        self.spikes = files / "spikes.jsonl"  # losses far above the ones before them, with their rows
        self.bad_batch = files / "bad_batch.json"  # rows of the non-finite step that ended the run
        # Markers: STOP comes from the user, the others say how the last start ended. FAILED comes from slurm/.
        self.stop = directory / "STOP"
        self.done = directory / "DONE"
        self.preempted = directory / "PREEMPTED"
        self.failed = directory / "FAILED"

    @property
    def restarts(self) -> Path:
        """One entry per start: `restarts.json`, or `lives.json` in a run that an earlier version began."""
        return restarts_file(self.directory)

    @property
    def needed_by_export(self) -> tuple[Path, ...]:
        """The files that describe the run."""
        return self.description, self.recipe, self.deepspeed, self.student_config

    @property
    def end_markers(self) -> tuple[Path, ...]:
        """At most one of them exists, once a start has ended."""
        return self.done, self.preempted, self.failed

    def log(self, rank: int) -> Path:
        """Everything that this rank printed, over all starts."""
        return self.logs / f"rank{rank}.log"

    def stacks(self, rank: int, is_dry_run: bool = False) -> Path:
        """The stacks of this rank's threads, where it hung. A dry run leaves those of earlier starts alone."""
        return self.logs / f"{'dry-run-' if is_dry_run else ''}stacks-rank{rank}.txt"


def check_is_no_student(directory: Path) -> None:
    """Raise a `UserError` if this is `RUN/students/NAME`: ranks, checkpoints and markers are those of the run."""
    place = directory.resolve()
    run_dir, name = place.parent.parent, place.name
    if place.parent.name == STUDENTS and RunPaths(run_dir).recipe.is_file() and name in students_of(run_dir):
        export = module_command("pipeline", "export", run_dir, "--student", name, "--output", "DIR")
        raise UserError(
            f"{directory} is a student of the run {run_dir}, and no run directory. Name {run_dir} --student {name}; as a "
            f"model it is what this writes: {export}"
        )


def is_run_directory(directory: Path) -> bool:
    """Whether a run has begun in this directory. Raises `UserError` if it is that of one of a run's students."""
    check_is_no_student(directory)
    return RunPaths(directory).description.is_file() or bool(students_of(directory))


def students_of(run_dir: Path) -> list[str]:
    """The names of a run's students, in the order of its recipe; none where the run has one student without a name."""
    directory = run_dir / STUDENTS
    if not directory.is_dir():
        return []
    present = sorted(path.name for path in directory.iterdir() if path.is_dir())
    try:
        in_order = list(parse(RunPaths(run_dir).recipe.read_text(encoding="utf-8"))["students"])
    except (OSError, ValueError, KeyError, TypeError):
        in_order = []
    return sorted(present, key=lambda name: (in_order.index(name) if name in in_order else len(in_order), name))


def one_student(run_dir: Path, asked: str | None) -> str:
    """The student that a command is about: the one of `--student`, or "" in a run with one student without a name.

    Raises:
        UserError: the run has several students and none is named, or it has not the one that is; or this is no run directory
            but that of a student
    """
    check_is_no_student(run_dir)
    names = students_of(run_dir)
    if asked is None and not names:
        return ""
    if asked not in names:
        has = f"has the students {', '.join(names)}" if names else "has one student, without a name"
        fix = f"Add --student {names[0]}, or another of these" if names else "Leave --student out"
        raise UserError(f"{run_dir} {has}{'' if asked is None else f', and none called {shown(asked)}'}. {fix}")
    return asked
