"""The students of a run as a table on the console: what differs between them, and their figures.

In: a run directory, finished or in progress. Out: lines of text.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from data_prep.shards import DataError
from pipeline.comparison.differences import differing_keys, heldout_differences, value_text
from pipeline.comparison.students import HELDOUT, LOSS, StudentRun, read_students
from pipeline.errors import UserError
from pipeline.runtime.text_tables import text_table

FIGURES = ("step", "loss", "held-out", "best (step)", "M param", "MB", "GFLOP/row", "tokens/s")
NONE = "-"


def comparison_lines(run_dir: Path) -> list[str]:
    """What differs between the students of a run, then held-out loss, size and speed of each.

    It never raises for what is in the directory: a file that cannot be read must not end a run that is finished.
    """
    try:
        students = read_students(run_dir)
        return [*difference_lines(students), *figure_lines(students)]
    except (UserError, DataError, OSError) as error:
        return [f"warning: the students cannot be compared: {error}"]


def difference_lines(students: Sequence[StudentRun]) -> list[str]:
    """One row per recipe key that differs, one column per student."""
    keys = differing_keys(students)
    if not keys:
        return []
    rows = [[key, *map(value_text, values)] for key, values in keys.items()]
    names = [student.name for student in students]
    widths = [max(map(len, column)) for column in zip(*[names, *(row[1:] for row in rows)], strict=True)]
    return [*text_table("what differs:", ["key", *names], rows, [f">{width + 2}" for width in widths]).split("\n"), ""]


def figure_lines(students: Sequence[StudentRun], more: Sequence[tuple[str, Sequence[str]]] = ()) -> list[str]:
    """One row per student.

    Args:
        more: further columns: title, and the text for each student
    """
    header = ["student", *FIGURES, *(title for title, _ in more), "state"]
    rows = [
        [student.name, *figures(student), *(texts[number] for _, texts in more), student.status]
        for number, student in enumerate(students)
    ]
    widths = [max(map(len, column)) for column in zip(*([header[1:-1], *(row[1:-1] for row in rows)]), strict=True)]
    columns = [*(f">{width + 2}" for width in widths), "<1"]
    return text_table("figures of each student:", header, rows, columns, notes(students)).split("\n")


def figures(student: StudentRun) -> list[str]:
    """The cells under `FIGURES`; `NONE` where there is no figure yet."""
    loss, heldout, speed = student.last(LOSS), student.last(HELDOUT), student.tokens_per_second
    best, size = student.best, student.size
    return [
        f"{student.step:,}",
        NONE if loss is None else f"{loss:.4f}",
        NONE if heldout is None else f"{heldout:.4f}",
        f"{best[1]:.4f} ({best[0]:,})" if best else NONE,
        *([f"{size.parameters / 1e6:.1f}", f"{size.megabytes:.0f}"] if size else [NONE] * 2),
        f"{size.forward_flops / 1e9:.3g}" if size else NONE,
        NONE if speed is None else f"{speed:,.0f}",
    ]


def notes(students: Sequence[StudentRun]) -> list[str]:
    """What the columns mean, and what must not be compared."""
    lengths = sorted({student.recipe.seq_len for student in students})
    found = [
        "held-out: mean over the languages, lower is better. M param, MB (fp32): the complete student. GFLOP/row: one forward "
        f"of it over {' or '.join(map(str, lengths))} tokens, calculated. tokens/s: of the training, median"
        + (", all students of a run together" if any(student.paths.student for student in students) else "")
    ]
    if len(students) > 1 and (keys := heldout_differences(students)):
        found.append(not_comparable(keys))
    return found


def not_comparable(keys: Sequence[str]) -> str:
    """Why held-out losses say nothing about which student is better."""
    return (
        f"The held-out losses measure different things ({', '.join(keys)} not the same for all), so they do not tell which "
        "student is better."
    )
