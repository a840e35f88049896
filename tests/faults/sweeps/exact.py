"""Figures 1, 4 and 6: interrupted equals uninterrupted; ranks and stages may change; NaN changes no parameter."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.shards import ShardSet
from pipeline.config import load_recipe
from pipeline.errors import EXIT_DIVERGED
from tests.dist.runs import curve
from tests.faults.sweeps.lab import Lab, Outcome, newest, same_end, same_state

STEPS, SAVE_EVERY = 6, 3
SETTINGS = {"steps": STEPS, "save_every": SAVE_EVERY, "eval_every": STEPS}
KILL, STOP = "SIGKILL", "SIGUSR1"
# name: (signal, step counted from 0, micro-batch) of each attempt that does not reach the end
STOPS: dict[str, list[tuple[str, int, int]]] = {
    "stop after step 1": [(STOP, 0, 0)],
    "kill between micro-batches, mid-cycle of the sampler": [(KILL, 4, 1)],
    "stop at a save": [(STOP, SAVE_EVERY - 1, 1)],
    "stop, then kill": [(STOP, 1, 0), (KILL, 4, 1)],
}


def interrupted_equals_uninterrupted(lab: Lab, quick: bool) -> Outcome:
    """Figure 1: {four ways to stop} x {ZeRO 1, 2, 3} x {1, 2 ranks}."""
    cases = [(how, stage, ranks) for how in STOPS for stage in (1, 2, 3) for ranks in (1, 2)]
    if quick:
        cases = [(how, 1 + number % 3, 2 - number // 3) for number, how in enumerate(STOPS)]
    exact = []
    for how, stage, ranks in cases:
        run_dir = lab.fresh(f"exact-{stage}-{ranks}")
        for name, step, micro in STOPS[how]:
            fault = {"kind": "signal", "signal": name, "step": step, "micro": micro, "rank": ranks - 1}
            lab.run(run_dir, ranks, SETTINGS, stage, [fault])
            assert not (run_dir / "DONE").exists(), "the interruption did not happen"
        assert lab.run(run_dir, ranks, SETTINGS, stage) == 0
        exact.append(same_end(run_dir, lab.untouched(ranks, SETTINGS, stage)))
    return Outcome(
        "interrupted = uninterrupted: weights, moments, every later loss",
        len(cases),
        sum(exact),
        "difference 0.0: {stop at 1, mid-cycle, at a save, twice} x {ZeRO 1, 2, 3} x {1, 2 ranks}",
        "exact on an equal number of ranks",
    )


# -- other ranks, other stages


def ranks_and_stages_change(lab: Lab, quick: bool) -> Outcome:
    """Figure 4: 4 -> 2 -> 1 -> 4 ranks and ZeRO 1 -> 3 -> 2 -> 1, each attempt ends at a stop request."""
    restarts = [(4, 1, 2), (2, 3, 4), (1, 2, 6), (4, 1, 8)]
    if quick:
        restarts = [(2, 1, 2), (1, 3, 4), (2, 2, 6)]
    settings = {**SETTINGS, "steps": restarts[-1][2], "save_every": 100}
    run_dir, seen = lab.fresh("layouts"), lab.directory / "layouts.jsonl"
    seen.unlink(missing_ok=True)
    loads_equal = []
    for ranks, stage, end in restarts:
        before = newest(run_dir)
        copy = lab.fresh("layouts-resaved")
        faults: list[dict[str, Any]] = [{"kind": "witness", "file": str(seen)}, {"kind": "resave", "to": str(copy)}]
        if end != restarts[-1][2]:
            faults.append({"kind": "signal", "signal": STOP, "step": end - 1, "rank": 0})
        assert lab.run(run_dir, ranks, settings, stage, faults) == 0
        if before is not None:
            loads_equal.append(same_state(before, copy / before.name))
    straight, reference = lab.fresh("straight"), lab.directory / "straight.jsonl"
    reference.unlink(missing_ok=True)
    ranks, stage, _ = restarts[0]
    assert lab.run(straight, ranks, settings, stage, [{"kind": "witness", "file": str(reference)}]) == 0
    same_order = _rows_by_step(seen) == _rows_by_step(reference)
    one, two = curve(run_dir), curve(straight)
    off = max(abs(one[step] / two[step] - 1) for step in two)
    kept = sum(loads_equal) + same_order + (one.keys() == two.keys() and off < 1e-5)
    return Outcome(
        "ranks and ZeRO stage change between attempts",
        len(loads_equal) + 2,
        kept,
        f"ranks {' -> '.join(str(r) for r, _, _ in restarts)}, ZeRO {' -> '.join(str(s) for _, s, _ in restarts)}: state equal "
        f"bit for bit after each load, the same rows in each step, losses within {off:.0e}",
        "rejects another number of ranks at ZeRO 1, 2 and 3",
        {"largest_relative_loss_difference": off},
    )


def _rows_by_step(witness: Path) -> dict[int, list[Any]]:
    """Step -> token rows in the order of the global batch, for any ranks and micro-batches."""
    lines = [json.loads(line) for line in witness.read_text().splitlines()]
    steps: dict[int, list[Any]] = {}
    for line in sorted(lines, key=lambda line: (line["step"], line["rank"], line["micro"])):
        steps.setdefault(line["step"], []).extend(line["rows"])
    return steps


# -- NaN


def not_a_number(lab: Lab, quick: bool) -> Outcome:
    """Figure 6: NaN on one of two ranks changes no weight or moment; K such steps in a row stop the run and name the batch."""
    harmless = list(_harmless(lab, (2,) if quick else (1, 2, 3)))
    named = [_stops_and_names(lab, stage) for stage in ((2,) if quick else (1, 2, 3))]
    return Outcome(
        "NaN on one rank",
        len(harmless) + len(named),
        sum(harmless) + sum(named),
        "0 parameters and moments changed by poisoned steps at ZeRO 1, 2, 3; three in a row end with code 3; "
        "bad_batch.json holds the rows that the step was fed",
        "skips too, indefinitely",
    )


def _harmless(lab: Lab, stages: tuple[int, ...]) -> Iterator[bool]:
    settings = {**SETTINGS, "save_every": 1, "checkpoint.keep": 10}
    for stage in stages:
        run_dir = lab.fresh(f"nan-{stage}")
        assert lab.run(run_dir, 2, settings, stage, [{"kind": "nan", "steps": [2, 3], "rank": 1}]) == 0
        at = {step: run_dir / "checkpoints" / f"step-{step:08d}" for step in range(1, STEPS + 1)}
        unharmed = same_state(at[2], at[3]) and same_state(at[3], at[4])
        yield unharmed and not same_state(at[1], at[2]) and not same_state(at[4], at[5])


def _stops_and_names(lab: Lab, stage: int) -> bool:
    run_dir, seen = lab.fresh(f"diverged-{stage}"), lab.directory / f"diverged-{stage}.jsonl"
    settings = {**SETTINGS, "guard.max_bad_steps": 3}
    faults = [{"kind": "nan", "steps": [1, 2, 3, 4], "rank": 1}, {"kind": "witness", "file": str(seen)}]
    code = lab.run(run_dir, 2, settings, stage, faults)
    report = json.loads((run_dir / "bad_batch.json").read_text())
    recipe = load_recipe(lab.recipe, [])
    shards = ShardSet(recipe.data)
    named = [shards.rows(row["language"], np.array([row["row"]]), recipe.seq_len)[0].tolist() for row in report["rows"]]
    return code == EXIT_DIVERGED and report["step"] == 3 and named == _rows_by_step(seen)[3]
