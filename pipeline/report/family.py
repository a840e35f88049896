"""Pages about several students: those of one run, or those of several runs.

In: run directories. Out: a page with the table of `pipeline compare` and one chart per measure with a curve per student.
The page of a run also has what its students share, and a section for each of them.
"""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence
from pathlib import Path

from pipeline.comparison.differences import differing_keys, heldout_differences, value_text
from pipeline.comparison.students import HELDOUT, LOSS, SPEED, StudentRun, read_students
from pipeline.comparison.table import FIGURES, figures, not_comparable, notes
from pipeline.errors import UserError
from pipeline.report import plots
from pipeline.report import timeline as times
from pipeline.report.choice import Measure, evaluated_measures
from pipeline.report.evaluations import read_evaluations
from pipeline.report.html_parts import Page, fact_cells, facts_table, page_of, relation_maps, table
from pipeline.report.page import facts, heldout_table, recipe_section, subtitle
from pipeline.report.retrieval import read_retrieval
from pipeline.runtime.checkpoint_files import committed_steps
from pipeline.runtime.run_paths import RunPaths

HEALTH = {tag: title for tag, title in plots.HEALTH.items() if tag.startswith("optimizer/")}  # of each student
OF_THE_RUN = ("state", "tokens per second")  # facts that are the same for all students of a run
Section = tuple[str, str, str]  # title, note, content, all HTML


def render_comparison(students: Sequence[StudentRun], measures: Sequence[Measure], choice: str) -> str:
    """The page of `pipeline compare`.

    Args:
        measures: figures of `pipeline evaluate`, each a column of the table
        choice: the sentence about the chosen student
    """
    runs = dict.fromkeys(student.paths.directory.resolve().name for student in students)
    teachers = dict.fromkeys(student.recipe.teacher for student in students)
    about = html.escape(f"{len(students)} students of {', '.join(teachers)}")
    return page_of(Page(", ".join(runs), about, {}), compared_sections(students, measures, choice))


def render_family(run_dir: Path) -> str:
    """The page of a run with several students, also while it is in progress."""
    students = read_students(run_dir)
    reported = [student for student in students if student.points]
    if not reported:
        raise UserError(f"the students of {run_dir} have not reported anything yet. Try again in a minute.")
    first = reported[0]
    about = html.escape(f"{len(students)} students of {first.recipe.teacher}")
    top = {label: text for label, text in facts(first.paths, first.points, {}).items() if label in OF_THE_RUN}
    steps = f"{max(student.step for student in reported):,}"
    return page_of(
        Page(run_dir.resolve().name, f"{about} · {subtitle(first.about, {})}", {"steps": steps, **top}),
        [
            *compared_sections(students, evaluated_measures(read_evaluations(students, ()))),
            *_shared_sections(run_dir, reported),
            *map(_student_section, reported),
            ("Recipe", "The settings of the run.", recipe_section(RunPaths(run_dir), {})),
        ],
    )


def compared_sections(students: Sequence[StudentRun], measures: Sequence[Measure], choice: str = "") -> list[Section]:
    """The table of the students, and their curves, one chart per measure."""
    keys = heldout_differences(students)
    heldout = "On rows that training never saw, mean over the languages (logarithmic)."
    return [
        ("Students", html.escape(choice), _tables(students, measures)),
        ("Held-out loss", f"{heldout} {html.escape(not_comparable(keys)) if keys else ''}".strip(),
         _overlaid(students, {HELDOUT: "held-out loss"}, is_log=True)),
        ("Loss", "Training loss: the sum, and each relation (logarithmic).",
         _overlaid(students, _loss_titles(students), is_log=True)),
        ("Learning rate and health", "", _overlaid(students, HEALTH)),
        ("Throughput", "Tokens per second of the training; students that were trained together have the same curve.",
         _overlaid(students, {SPEED: "tokens per second"})),
    ]  # fmt: skip


def _tables(students: Sequence[StudentRun], measures: Sequence[Measure]) -> str:
    """What `pipeline compare` prints: figures, states, and the keys that differ."""
    rows = [
        [student.name, *figures(student), *(measure.text(number, student) for measure in measures)]
        for number, student in enumerate(students)
    ]
    parts = [table(["student", *FIGURES, *(measure.name for measure in measures)], rows)]
    parts += [f'<p class="note">{html.escape(note)}</p>' for note in notes(students)[:1]]
    parts.append(facts_table({student.name: student.status for student in students}))
    if keys := differing_keys(students):
        header = ["what differs", *(student.name for student in students)]
        parts.append(table(header, [[key, *map(value_text, values)] for key, values in keys.items()]))
    return "\n".join(parts)


def _loss_titles(students: Sequence[StudentRun]) -> dict[str, str]:
    """Tag -> title of the total loss and of every part that a student has."""
    tags = {tag for student in students for point in student.points for tag in point if tag.startswith("loss/")}
    parts = sorted(tags - {LOSS, "loss/spike_sigmas"})
    return {LOSS: "total", **{tag: tag.removeprefix("loss/") for tag in parts}}


def _overlaid(students: Sequence[StudentRun], titles: dict[str, str], is_log: bool = False) -> str:
    curves_of: Callable = lambda tag: {student.name: student.series(tag) for student in students}  # noqa: E731
    return plots.overlaid({title: curves_of(tag) for tag, title in titles.items()}, is_log)


def _shared_sections(run_dir: Path, students: Sequence[StudentRun]) -> list[Section]:
    """Time and cost of the run. Students that were added later were trained after the others, as a group."""
    longest = {student.paths.group: student for student in sorted(students, key=lambda student: student.step)}
    groups = [longest[number] for number in sorted(longest)]  # the points of these are those of the run
    points = sorted((point for student in groups for point in student.points), key=lambda point: point["time_s"])
    saved = {step for student in groups for step in committed_steps(student.paths.checkpoints)}
    finished = [point for point in points if LOSS in point or HELDOUT in point]  # a save is reported when complete
    events = times.events_of(run_dir, finished, sorted(saved))
    first, later = students[0], [student.points for student in groups[1:]]
    return [
        ("Where the time goes", "Shares of the training time on one device, all students together, saves and evaluations left out.",
         "".join(plots.time_shares(student.points) for student in groups)),
        ("Time line", "Finished steps against time. Green dots are checkpoints, red dashes are restarts.", plots.time_line(events)),
        ("Cost", "", facts_table(times.cost(groups[0].points, events, first.about, first.recipe.seq_len, later))),
    ]  # fmt: skip


def _student_section(student: StudentRun) -> Section:
    """Figures, languages, relation maps and settings of one student."""
    retrieval = read_retrieval(student.paths, student.step, student.recipe.teacher)
    own = {
        label: text
        for label, text in facts(student.paths, student.points, retrieval).items()
        if label not in OF_THE_RUN
    }
    maps = relation_maps(student.paths.tensorboard)
    parts = [
        fact_cells({"state": student.status, **own}),
        plots.heldout_curves(student.points),
        heldout_table(student.points),
        f"<details><summary>relation maps</summary>{maps}</details>" if maps else "",
        recipe_section(student.paths, {}),
    ]
    shape = f"{student.recipe.student.layers} x {student.recipe.student.hidden}"
    return f"Student {html.escape(student.name)}", shape, "\n".join(filter(None, parts))
