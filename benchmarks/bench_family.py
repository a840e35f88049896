"""Several students of one teacher in one run against one run for each: time of a step, memory of the loss, peak memory.

    OMP_NUM_THREADS=1 python benchmarks/bench_family.py [--quick] [--json FILE]

The step is that of a run: `build` and `Stepper`, ds_configs/zero2.json, the shards of `make demo`, a teacher in bf16. The
pair: recipes/xlmr_large_family.yaml (12x384 and 6x384 of XLM-R-large, layer 19, 512 tokens) with a teacher of random
weights and without dropout, with which a CPU's attention would leave its fused kernel. The sweep:
recipes/sweep_teacher_layer.yaml (six 6x384 students of the quickstart's teacher, layers 7 to 12), and the same with 3x384
students. A student alone is its own recipe in the same `Stepper`. Runs take turns in one thread. Times are medians of CPU
seconds. Memory: bytes of tensors that torch's profiler counts from the build of the run to the end of its second step, in a
process of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.bench_step import xlm_roberta
from benchmarks.measure import REPO, arguments, markdown_table, publish
from benchmarks.naive_baseline import interleaved_cpu_seconds
from pipeline.config import Recipe, load_recipe
from pipeline.planning.devices import DEVICES, Hardware
from pipeline.planning.family import FamilyPlanner
from pipeline.planning.plan import Planner
from pipeline.runtime import dist
from pipeline.training.build import build
from pipeline.training.resume import TrainState
from pipeline.training.stepper import Learner, Stepper

DS_CONFIG = REPO / "ds_configs/zero2.json"
DEMO_TEACHER, DEMO_SHARDS = REPO / "artifacts/teacher", REPO / "artifacts/shards"
TOGETHER = "together"
RELATION_LOSS = ("_GradientInForward", "_GradientInForwardBackward")
STEP = "the step that is measured"


@dataclass(frozen=True)
class Job:
    """A family recipe, and what differs from it here."""

    recipe: Path
    overrides: list[str]
    deepspeed: Path = DS_CONFIG

    @property
    def students(self) -> list[str]:
        return list(self.load().members())

    def load(self, name: str = TOGETHER) -> Recipe:
        """The recipe of all students, or that of one alone."""
        recipe = load_recipe(self.recipe, self.overrides)
        return recipe if name == TOGETHER else recipe.members()[name]

    def with_students(self, number: int) -> Job:
        """As many students that are equal to the recipe's first one."""
        recipe = load_recipe(self.recipe, self.overrides)
        first = json.dumps(next(iter((recipe.students or {}).values())))
        copies = ", ".join(f"s{copy}: {first}" for copy in range(number))
        return replace(self, overrides=[*self.overrides, f"students={{{copies}}}"])


def jobs(teacher: Path, quick: bool) -> dict[str, Job]:
    """The pair with a random teacher, the sweep with the quickstart's, and the same sweep of smaller students."""
    shared = [f"data={DEMO_SHARDS}", "teacher_options.dtype=bf16", "steps=1000", "heldout_rows=1"]
    rows = 1 if quick else 8
    large = [f"teacher={teacher}", f"global_batch={rows}", f"micro_batch_per_gpu={rows}", "student.dropout=0.0"]
    small = [f"teacher={DEMO_TEACHER}"]
    if quick:
        large += ["seq_len=32", "relations.teacher_layer=2", "relations.heads=16"]
        large += ["students.12x384.student.layers=2", "students.6x384.student.layers=1", "student.hidden=96"]
        small += ["seq_len=32", "global_batch=2", "micro_batch_per_gpu=2"]
    sweep = Job(REPO / "recipes/sweep_teacher_layer.yaml", [*shared, *small])
    three_layers = ["student.layers=3", "student.init_layers=[4, 8, 12]"]
    return {
        "pair": Job(REPO / "recipes/xlmr_large_family.yaml", [*shared, *large]),
        "sweep": sweep,
        "sweep_3x384": replace(sweep, overrides=[*sweep.overrides, *three_layers]),
    }


def write_random_teacher(directory: Path, quick: bool) -> None:
    """XLM-R-large's shape with the tokenizer of the shards."""
    layers, hidden = (3, 128) if quick else (24, 1024)
    vocabulary = json.loads((DEMO_TEACHER / "config.json").read_text())["vocab_size"]
    xlm_roberta(layers, hidden, vocabulary).save_pretrained(directory)
    for name in ("sentencepiece.bpe.model", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO_TEACHER / name, directory)


class OneRun:
    """The optimizer steps of one run, without its files."""

    def __init__(self, job: Job, name: str, stack: contextlib.ExitStack) -> None:
        launch = dist.read_launch()
        if not torch.distributed.is_initialized():
            dist.init_process_group(launch, 600)
        recipe = job.load(name)
        self.members = build(recipe, job.recipe, job.deepspeed, launch)
        learners = [Learner(parts, TrainState.restore({}, recipe.guard)) for parts in self.members]
        self._stepper = Stepper(learners)
        self._batches = iter(stack.enter_context(self._stepper.batches(0)))
        self._numbers = itertools.count()

    def step(self) -> None:
        """One optimizer step of every student, with its figures read."""
        for unread in self._stepper.train_step(next(self._numbers), self._batches):
            assert unread is not None
            unread.read()


def times(job: Job, repeats: int) -> dict[str, float]:
    """Median CPU seconds of a step: of each student alone, and of all together."""
    with contextlib.ExitStack() as stack:
        runs = {name: OneRun(job, name, stack) for name in (*job.students, TOGETHER)}
        return interleaved_cpu_seconds({name: run.step for name, run in runs.items()}, repeats)


def operations_ratio(job: Job) -> float:
    """Floating-point operations of a step of all students together, by those of all alone: what the time can reach."""
    planner = FamilyPlanner(job.load(), job.recipe, job.deepspeed, Hardware(DEVICES["cpu"]))
    return planner.plan(1, 1).step.flops / sum(plan.step.flops for plan in planner.plans_alone(1, 1).values())


def measure_bytes(job: Job, name: str) -> dict[str, float]:
    """MB of tensors in the second step of a run, with those that its build has left.

    `before`: at its beginning. `peak`: at any moment. `loss`: the most while a relation loss is computed, above `before`.
    `teacher`: its parameters. `planned`: the peak that `python -m pipeline plan` predicts, and the fp32 copy of the untrained
    weights for checkpoints, which is in host memory.
    """
    with contextlib.ExitStack() as stack, profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run = OneRun(job, name, stack)
        run.step()
        with record_function(STEP):
            run.step()
    events = profiler.profiler.kineto_results.events()
    (began,) = (event.start_ns() for event in events if event.name() == STEP)
    losses = [(e.start_ns(), e.end_ns()) for e in events if e.name() in RELATION_LOSS and e.start_ns() > began]
    alive, before, peak, in_loss = 0, 0, 0, 0
    for time_ns, size in sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"):
        alive += size
        if time_ns < began:
            before = alive
            continue
        peak = max(peak, alive)
        if any(start <= time_ns <= end for start, end in losses):
            in_loss = max(in_loss, alive - before)
    kind = FamilyPlanner if name == TOGETHER else Planner
    planner = kind(job.load(name), job.recipe, job.deepspeed, Hardware(DEVICES["cpu"]))
    planned = planner.plan(1, 1)
    of_plan = {
        "teacher": planned.memory.parts["teacher"],
        "planned": planned.memory.total + 4 * planner.parameters["untrained"],
    }
    found = {"before": before, "peak": peak, "loss": in_loss, **of_plan}
    return {what: size / 1e6 for what, size in found.items()}


def in_a_new_process(measure: Callable, job: Job, what: str | int) -> dict[str, float]:
    """Call `measure(job, what)` there: an engine's memory is not free before its process has ended."""
    files = map(str, (job.recipe, job.deepspeed))
    words = [sys.executable, __file__, "--child", measure.__name__, *files, str(what), *job.overrides]
    done = subprocess.run(words, cwd=REPO, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)} ended with {done.returncode}\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def child(function: str, recipe: str, deepspeed: str, what: str, *overrides: str) -> dict[str, float]:
    job = Job(Path(recipe), list(overrides), Path(deepspeed))
    return times(job, int(what)) if function == times.__name__ else measure_bytes(job, what)


# -- the report


def time_rows(of_jobs: dict[str, Job], repeats: int) -> tuple[list[list], dict[str, float]]:
    """A row for each run, and the time of all students together by that of all alone."""
    rows, ratios = [], {}
    for name, job in of_jobs.items():
        seconds = in_a_new_process(times, job, repeats)
        alone = sum(seconds[student] for student in job.students)
        ratios |= {f"{name}_ratio": seconds[TOGETHER] / alone, f"{name}_operations_ratio": operations_ratio(job)}
        rows += [[name, f"{student} alone", seconds[student], "", ""] for student in job.students]
        rows.append([name, "sum of these", alone, 1.0, 1.0])
        rows.append([name, TOGETHER, seconds[TOGETHER], *list(ratios.values())[-2:]])
    return rows, ratios


def memory_rows(of_jobs: dict[str, Job]) -> tuple[list[list], dict[str, float]]:
    """A row for each run, and the peak of all students together by the sum of those alone with the teacher counted once."""
    rows, ratios = [], {}
    for name, job in of_jobs.items():
        found = {student: in_a_new_process(measure_bytes, job, student) for student in (*job.students, TOGETHER)}
        rows += [
            [name, student, *(mb[what] for what in ("before", "peak", "loss", "planned")), mb["planned"] / mb["peak"]]
            for student, mb in found.items()
        ]
        together = found.pop(TOGETHER)
        teachers = sum(mb["teacher"] for mb in found.values()) - together["teacher"]
        limit = sum(mb["peak"] for mb in found.values()) - teachers
        rows.append([name, "sum of those alone, teacher once", "", limit, "", "", ""])
        ratios[f"{name}_peak_ratio"] = together["peak"] / limit
    return rows, ratios


def loss_rows(job: Job) -> tuple[list[list], dict[str, float]]:
    """MB at the peak of the relation loss above what is there before a step, with 1, 2 and 6 equal students."""
    found = {n: in_a_new_process(measure_bytes, job.with_students(n), TOGETHER) for n in (1, 2, 6)}
    rows = [[n, mb["before"], mb["loss"], mb["peak"]] for n, mb in found.items()]
    return rows, {f"loss_mb_of_{n}": mb["loss"] for n, mb in found.items()}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--child", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.child:
        print(json.dumps(child(*options.child)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        write_random_teacher(Path(temporary), options.quick)
        of_jobs = jobs(Path(temporary), options.quick)
        of_time, time_ratios = time_rows(of_jobs, 1 if options.quick else 3)
        of_memory, memory_ratios = memory_rows({name: of_jobs[name] for name in ("pair", "sweep")})
        of_loss, loss_figures = loss_rows(of_jobs["sweep"])
    tables = {"time": of_time, "memory": of_memory, "loss": of_loss}
    header = ["students", "run", "CPU s a step", "of the sum", "in operations"]
    figures = {**time_ratios, **memory_ratios, **loss_figures, **tables}
    publish("Several students of one teacher", header, of_time, figures, options.json)
    header = ["students", "run", "MB before a step", "MB at its peak", "MB of the loss", "MB planned", "planned / peak"]
    print(markdown_table(header, of_memory))
    print("\n" + markdown_table(["equal students", "MB before a step", "MB of the loss", "MB at its peak"], of_loss))


if __name__ == "__main__":
    main()
