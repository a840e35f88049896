"""The same trainer, student and kills with DeepSpeed's own save_checkpoint and load_checkpoint, for comparison.

A rank uses them through the fault `stock` (tests/dist/fault_injection.py).
"""

from __future__ import annotations

import io
import json
import os
import random
import shutil
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any

from tests.dist.runs import end_group
from tests.faults.sweeps.lab import Lab, steps_done, wait_until

INTERVAL = 20
SETTINGS = {"steps": 100000, "save_every": INTERVAL, "eval_every": 100000, "optimizer.decay": "constant"}
PAUSE = {"kind": "pause", "seconds": 0.01}
RANDOM_KILLS = 100
# In the third save: inside the n-th torch.save of a rank (half of its bytes written; rank 1 has one), or as `latest` is written
NAMED_POINTS = [(0, "torch.save", 1), (0, "torch.save", 2), (1, "torch.save", 1), (0, "latest", 1)]
REPEATS = 5
IN_STARTUP = 5


# -- in the rank


def use_stock_checkpoints(options: dict[str, Any]) -> None:
    """Replace writer, pruning and resume by DeepSpeed's, and report what was loaded in the file `options["report"]`."""
    from pipeline.runtime.anomalies import SpikeDetector
    from pipeline.runtime.checkpoint_writer import SaveOutcome
    from pipeline.training import launch, saving
    from pipeline.training.resume import TrainState

    class StockWriter:
        def __init__(self, directory: Path, students: Any, *unused: Any):
            self._directory, (self._engine, _) = directory, students[""]
            self._outcome: SaveOutcome | None = None

        def begin(self, states: Any) -> None:
            state = states[""]
            began = time.monotonic()
            if state["step"] == options.get("kill_in"):
                _kill_in_this_save(options, self._directory)
            self._engine.deepspeed_engine.save_checkpoint(str(self._directory), tag=f"step{state['step']}")
            seconds = time.monotonic() - began
            self._outcome = SaveOutcome(state["step"], None, seconds, seconds)

        def wait(self) -> Any:
            outcome, self._outcome = self._outcome, None
            return outcome

        poll = wait

    def resume(run: Any, *unused: Any, **keywords: Any) -> list[TrainState]:
        report = Path(f"{options['report']}-{run.launch.rank}.json")
        report.write_text(json.dumps({"problem": "ended while loading"}))
        try:
            path, _ = run.shared.engine.deepspeed_engine.load_checkpoint(str(run.paths.checkpoints))
        except BaseException as error:
            report.write_text(json.dumps({"problem": f"{type(error).__name__}: {str(error)[:200]}"}))
            raise
        first = int(Path(path).parent.name.removeprefix("step")) if path else 0
        report.write_text(json.dumps({"problem": None, "step": first}))
        if run.launch.is_main:
            run.restarts.begin(first, run.launch.world_size)
        return [TrainState(SpikeDetector(run.recipe.guard), first_step=first)]

    saving.CheckpointWriter = StockWriter  # type: ignore[misc, assignment]
    saving.prune = lambda directory, *config: None
    launch.resume = resume


def _kill_in_this_save(options: dict[str, Any], directory: Path) -> None:
    """SIGKILL to this rank at a named point of DeepSpeed's save."""
    if int(os.environ["RANK"]) != options["victim"]:
        return
    import builtins

    import torch

    save, opened, calls = torch.save, builtins.open, [0]

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def half_saved(content: Any, target: Any, *arguments: Any, **keywords: Any) -> Any:
        calls[0] += 1
        if calls[0] < options["call"]:
            return save(content, target, *arguments, **keywords)
        buffer = io.BytesIO()
        save(content, buffer, *arguments, **keywords)
        with opened(target, "wb") as file:
            file.write(buffer.getvalue()[: buffer.getbuffer().nbytes // 2])
        return die()

    def open_latest(path: Any, *arguments: Any, **keywords: Any) -> Any:
        is_latest = str(path) == str(directory / "latest")
        file = opened(path, *arguments, **keywords)  # opened for writing, and by that emptied
        return die() if is_latest else file

    if options["operation"] == "torch.save":
        torch.save = half_saved
    elif options["operation"] == "latest":
        builtins.open = open_latest  # type: ignore[assignment]


# -- outside


def killed_with_stock_checkpoints(lab: Lab) -> Counter[str]:
    """How attempts after a kill -9 began: kind -> count. A directory that cannot be loaded is replaced by a good copy."""
    ends: Counter[str] = Counter()
    run_dir, report = lab.fresh("stock"), lab.directory / "stock-report"
    stock = {"kind": "stock", "report": str(report)}
    choice = random.Random(2)
    good = lab.fresh("stock-good")
    for number in range(RANDOM_KILLS):
        _attempt_to_a_random_kill(
            lab, run_dir, [PAUSE, stock], choice, in_startup=number % IN_STARTUP == IN_STARTUP - 1
        )
        ends[_next_attempt(lab, run_dir, [stock], report, good)] += 1
    for rank, operation, call in NAMED_POINTS * REPEATS:
        point = {"kill_in": _newest_stock(run_dir) + INTERVAL, "victim": rank, "operation": operation, "call": call}
        lab.run(run_dir, 2, SETTINGS, faults=[{**stock, **point}])
        ends[_next_attempt(lab, run_dir, [stock], report, good)] += 1
    return ends


def _attempt_to_a_random_kill(
    lab: Lab, run_dir: Path, faults: list[Any], choice: random.Random, in_startup: bool
) -> None:
    job = lab.begin(run_dir, 2, SETTINGS, faults=faults)
    try:
        if in_startup:
            time.sleep(choice.uniform(0.0, 1.5))
        else:
            goal = steps_done(run_dir) + INTERVAL + choice.randrange(2 * INTERVAL)
            assert wait_until(lambda: job.poll() is not None or steps_done(run_dir) >= goal, 120)
            time.sleep(choice.uniform(0.0, 0.03))
        assert job.poll() is None, run_dir.with_suffix(".log").read_text()[-2000:]
        os.kill(choice.choice(job.ranks), signal.SIGKILL)
    finally:
        end_group(job)
        job.wait()


def _newest_stock(run_dir: Path) -> int:
    return max((int(path.name[4:]) for path in (run_dir / "checkpoints").glob("step[0-9]*")), default=0)


def _next_attempt(lab: Lab, run_dir: Path, faults: list[Any], report: Path, good: Path) -> str:
    """Restart, wait until it is known what was loaded, and describe it."""
    for old in report.parent.glob(f"{report.name}-*.json"):
        old.unlink()
    expected = (steps_done(run_dir) // INTERVAL) * INTERVAL
    job = lab.begin(run_dir, 2, SETTINGS, faults=faults)
    files = [Path(f"{report}-{rank}.json") for rank in range(2)]
    wait_until(lambda: job.poll() is not None or all(_is_decided(file) for file in files))
    end_group(job)
    job.wait()
    said = [json.loads(file.read_text()) if file.exists() else {"problem": "no report"} for file in files]
    steps = {one.get("step") for one in said}
    if any(one["problem"] for one in said):
        _set_back(run_dir, good)
        return "could not load" if all(one["problem"] for one in said) else "loaded on one rank, failed on the other"
    if len(steps) > 1:
        _set_back(run_dir, good)
        return "loaded different steps on the two ranks"
    shutil.rmtree(good, ignore_errors=True)
    shutil.copytree(run_dir, good)
    (step,) = steps
    if step == 0 and expected > 0:
        return "began at step 0"
    return "resumed from the newest save" if step >= expected else "resumed from an older save"


def _is_decided(file: Path) -> bool:
    try:
        return json.loads(file.read_text())["problem"] != "ended while loading"
    except (OSError, ValueError):
        return False


def _set_back(run_dir: Path, good: Path) -> None:
    shutil.rmtree(run_dir)
    if good.exists():
        shutil.copytree(good, run_dir)
