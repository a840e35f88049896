"""Pages about several students: those of one run, or those of several runs.

In: run directories. Out: a page with the table of `pipeline compare` and one chart per measure with a curve per student.
The page of a run also has what its students share, and a section for each of them.
"""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence
from pathlib import Path

from pipeline.comparison.differences import differing_keys, heldout_differences, value_text
from pipeline.comparison.students import HELDOUT, LOSS, SPEED, Series, StudentRun, read_students
from pipeline.comparison.table import FIGURES, NONE, figures, not_comparable, notes
from pipeline.errors import UserError
from pipeline.report import plots
from pipeline.report import timeline as times
from pipeline.report.choice import Measure, caveats, evaluated_measures
from pipeline.report.evaluations import read_evaluations
from pipeline.report.html_parts import Page, fact_cells, facts_table, page_of, table
from pipeline.report.loss_parts import PREFIX, loss_parts, part_label
from pipeline.report.page import facts, heldout_note, heldout_table, recipe_section, subtitle
from pipeline.report.relation_maps import relation_maps
from pipeline.report.retrieval import read_retrieval
from pipeline.report.state import (
    ENDED_EARLY,
    FAILED,
    FINISHED,
    RUNNING,
    STOPPED,
    RunState,
    progress_facts,
    run_state,
)
from pipeline.runtime.checkpoint_files import committed_steps
from pipeline.runtime.run_paths import RunPaths

HEALTH = {tag: title for tag, title in plots.HEALTH.items() if tag.startswith("optimizer/")}  # of each student
OF_THE_RUN = ("tokens per second",)  # facts that are the same for all students of a run
ORDER = (RUNNING, FAILED, STOPPED, FINISHED, ENDED_EARLY)  # the first of its students' states is that of the run
NUM_LOSSES = FIGURES.index("best (step)") + 1  # figures before those of size and speed
TIME_NOTE = (
    "time, device h: of the training with saves and evaluations, from each start to its last report; the second times the "
    "number of devices. Students that are trained together share one time."
)
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
    states = {student.name: _state(student) for student in reported}
    ahead = min(reported, key=lambda student: ORDER.index(states[student.name].name))
    state = states[ahead.name]
    about = html.escape(f"{len(students)} students of {first.recipe.teacher}")
    top = {label: text for label, text in facts(first.points, {}).items() if label in OF_THE_RUN}
    progress = progress_facts(ahead.points, ahead.recipe.steps, state)
    return page_of(
        Page(run_dir.resolve().name, f"{about} · {subtitle(first.about, {})}", {**progress, **top}, state.html()),
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
        ("Loss", "Training loss of single steps (logarithmic): the total, and its parts, which add up to it.",
         plots.overlaid(_loss_panels(students), is_log=True)),
        ("Learning rate and health", "", _overlaid(students, HEALTH)),
        ("Throughput", "Tokens per second of the training; students that were trained together have the same curve.",
         _overlaid(students, {SPEED: "tokens per second"})),
    ]  # fmt: skip


def further_columns(students: Sequence[StudentRun], measures: Sequence[Measure]) -> list[tuple[str, list[str]]]:
    """Title and cells of the columns after `FIGURES`: the time of the training, then every evaluated figure."""
    hours = [times.training_hours(student.paths, student.points) for student in students]
    return [
        ("time", [NONE if found is None else times.duration(found[0]) for found in hours]),
        ("device h", [NONE if found is None else f"{found[1]:,.3g}" for found in hours]),
        *((measure.name, [measure.text(row, each) for row, each in enumerate(students)]) for measure in measures),
    ]


def _tables(students: Sequence[StudentRun], measures: Sequence[Measure]) -> str:
    """What `pipeline compare` prints: figures, states, and the keys that differ."""
    more = further_columns(students, measures)
    # what decides comes first: a phone shows three columns, and scrolls to the others
    header = ["student", *FIGURES[:NUM_LOSSES], *(title for title, _ in more), *FIGURES[NUM_LOSSES:]]
    rows = []
    for row, student in enumerate(students):
        cells = figures(student)
        rows.append([student.name, *cells[:NUM_LOSSES], *(column[row] for _, column in more), *cells[NUM_LOSSES:]])
    parts = [table(header, rows)]
    parts += [
        f'<p class="note">{html.escape(note)}</p>' for note in (*notes(students)[:1], TIME_NOTE, *caveats(measures))
    ]
    parts.append(facts_table({student.name: student.status for student in students}))
    if keys := differing_keys(students):
        header = ["what differs", *(student.name for student in students)]
        parts.append(table(header, [[key, *map(value_text, values)] for key, values in keys.items()]))
    return "\n".join(parts)


def _loss_panels(students: Sequence[StudentRun]) -> dict[str, dict[str, Series]]:
    """Title -> student -> curve, of the total loss and of every part times its weight in the student's recipe."""
    parts = {student.name: loss_parts(student.points, student.recipe.relations) for student in students}
    panels: dict[str, dict[str, Series]] = {"total": {student.name: student.series(LOSS) for student in students}}
    for tag in dict.fromkeys(part.tag for of_one in parts.values() for part in of_one):
        having = {name: part for name, of_one in parts.items() for part in of_one if part.tag == tag}
        labels = list(dict.fromkeys(part.label for part in having.values()))
        relations = next(student.recipe.relations for student in students if student.name in having)
        words = f"{part_label(tag.removeprefix(PREFIX), relations)} × the weight of each student"
        panels[labels[0] if len(labels) == 1 else words] = {
            student.name: having[student.name].weighted(student.points) if student.name in having else []
            for student in students
        }
    return panels


def _state(student: StudentRun) -> RunState:
    return run_state(student.paths, student.points, student.recipe.steps, student.state)


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
    progress = progress_facts(student.points, student.recipe.steps, _state(student))
    own = {
        label: text
        for label, text in {**progress, **facts(student.points, retrieval)}.items()
        if label not in OF_THE_RUN
    }
    maps = relation_maps(student.paths, student.recipe, student.about)
    parts = [
        fact_cells({"state": student.status, **own}),
        plots.heldout_curves(student.points),
        heldout_note(student.points),
        heldout_table(student.points),
        f"<details><summary>relation maps</summary>{maps}</details>" if maps else "",
        recipe_section(student.paths, {}),
    ]
    shape = f"{student.recipe.student.layers} x {student.recipe.student.hidden}"
    return f"Student {html.escape(student.name)}", shape, "\n".join(filter(None, parts))
