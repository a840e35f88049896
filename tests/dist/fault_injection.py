"""Faults inside a real rank, at places that a signal from outside would hit only by chance.

A fault is a dictionary: `kind`, `rank` (absent: every rank), `student` (of faults in a forward; absent: every one), and when. Steps count from 0, calls of an operation from 1.
The harness wraps public functions and methods of `pipeline.training` and `CheckpointWriter`, before the rank's program starts.

    signal     sends `signal` to the rank itself in step `step`, before its micro-batch `micro`
    at call    in the save of step `save`, at call number `call` of `operation` (fsync, rename, mkdir, link): SIGKILL, or
               with `error` an OSError of that number, as from a full disk, or that exception (MemoryError, for example)
    file size  in the save of step `save` no file may grow past `bytes`: the kernel rejects the write
    nan        the loss of `steps` is multiplied by NaN, so that every gradient of this rank is NaN
    spike      the loss of `steps` is multiplied by a hundred
    broken weights  after step `step` one master weight of this rank is NaN
    pause      every step takes `seconds` longer
    error      step `step` raises `error`: UserError or AssertionError
    out of memory  in step `step`, in `part` (teacher, student, loss, backward, optimizer), a petabyte is asked for; in
               optimizer after backward, before the update changes a weight
    fp16       no fault: the CPU is said to have fp16, in which torch computes slowly
    no farewell    no fault of a step: to leave the process group takes ten minutes, as with NCCL when another rank waits
    witness    no fault: every micro-batch of the student is appended to `file`
    kernels    no fault: whether torch's strict mode was on in the student's forward and in backward goes to `file`
    host reads  no fault: at the start of each step, how often a tensor's numbers were read so far is appended to `file`
    resave     no fault: what was loaded is saved again to the directory `to`
    no memory  a save finds no memory for a snapshot
    stop file  STOP is made while the run starts, after it has begun to listen for it
    elsewhere  the rank starts in the directory `directory` and with `environment` in its environment, as on another node
    bug        an IndexError while the student is built, or with `after load` after the checkpoint was loaded
    other text a projected student is measured on `tokens` tokens
    stock      checkpoints are DeepSpeed's own (tests/faults/sweeps/stock.py)
"""

from __future__ import annotations

import builtins
import dataclasses
import json
import os
import resource
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from pipeline.errors import UserError
from tests.host_reads import HostReads

InjectedFault = dict[str, Any]
IN_STEPS = (
    "signal", "nan", "spike", "broken weights", "pause", "witness", "kernels", "host reads", "error", "out of memory",
)  # fmt: skip
IN_SAVES = ("at call", "file size")


def arrange(faults: list[InjectedFault], rank: int) -> None:
    """Prepare this rank's share of `faults`. Called in the rank before its program starts."""
    kinds: dict[str, list[InjectedFault]] = {}
    for fault in faults:
        if fault.get("rank", rank) == rank:
            kinds.setdefault(fault["kind"], []).append(fault)
    for fault in kinds.get("elsewhere", []):
        os.chdir(fault.get("directory", "."))
        os.environ |= fault.get("environment", {})
    if not kinds.keys() - {"elsewhere"}:
        return
    from pipeline.runtime import checkpoint_writer
    from pipeline.training import build, launch, run_logger

    if "signal" in kinds:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # tests under nohup inherit that it is ignored
    if in_steps := [fault for kind in IN_STEPS for fault in kinds.get(kind, [])]:
        _around_steps(in_steps)
    if in_saves := [fault for kind in IN_SAVES for fault in kinds.get(kind, [])]:
        _around_saves(in_saves)
    if "fp16" in kinds:
        from deepspeed.accelerator import get_accelerator

        get_accelerator().is_fp16_supported = lambda: True
    if "no farewell" in kinds:
        torch.distributed.destroy_process_group = lambda *unused: time.sleep(600)
    if "no memory" in kinds:
        checkpoint_writer.available_memory_bytes = lambda: 0
    if "other text" in kinds:
        build.CALIBRATION_TOKENS = kinds["other text"][0]["tokens"]
    if "bug" in kinds:
        if kinds["bug"][0].get("after load"):
            run_logger.RunLogger.describe = lambda *unused: [][0]  # type: ignore[method-assign]
        else:
            build.student_of = lambda *unused: [][0]
    if "stop file" in kinds:
        launch.check_ready = _followed_by(launch.check_ready, lambda run, *_: run.paths.stop.touch())
    if "resave" in kinds:
        launch.resume = _resumed_and_saved(launch.resume, Path(kinds["resave"][0]["to"]))
    if "stock" in kinds:
        from tests.faults.sweeps.stock import use_stock_checkpoints

        use_stock_checkpoints(kinds["stock"][0])


def _followed_by(function: Callable, after: Callable) -> Callable:
    def both(*arguments: Any, **keywords: Any) -> Any:
        result = function(*arguments, **keywords)
        after(*arguments)
        return result

    return both


def _preceded_by(function: Callable, before: Callable) -> Callable:
    def both(*arguments: Any, **keywords: Any) -> Any:
        before(*arguments)
        return function(*arguments, **keywords)

    return both


# -- in steps


def _around_steps(faults: list[InjectedFault]) -> None:
    from pipeline.training import launch
    from pipeline.training.stepper import Stepper
    from pipeline.training.trainer import Trainer

    build, train_step, now = launch.build, Stepper.train_step, {"step": -1}

    def build_with_faulty_engine(*arguments: Any) -> Any:
        members = build(*arguments)
        for parts in members:
            for fault in faults:
                if fault["kind"] == "out of memory":
                    _ask_for_a_petabyte(parts, fault, now)
        return [dataclasses.replace(m, engine=FaultyEngine(m.engine, _of(m.name, faults), now)) for m in members]

    def faulty_step(self: Any, step: int, batches: Any) -> Any:
        now.update(step=step)
        for fault in faults:
            if fault["kind"] == "host reads":
                with open(fault["file"], "a") as file:
                    file.write(f"{reads.count}\n")
        time.sleep(sum(fault["seconds"] for fault in faults if fault["kind"] == "pause"))
        report = train_step(self, step, batches)
        if any(fault["kind"] == "broken weights" and fault["step"] == step for fault in faults):
            fragment = next(self.learners[0].parts.engine.fragments())
            fragment.view(fragment.buffer)[0] = float("nan")
        return report

    def train_and_count(self: Any) -> None:
        with reads:
            train(self)

    reads, train = HostReads(), Trainer.train
    if any(fault["kind"] == "host reads" for fault in faults):
        Trainer.train = train_and_count  # type: ignore[method-assign]
    launch.build = build_with_faulty_engine
    Stepper.train_step = faulty_step  # type: ignore[method-assign]


def _of(student: str, faults: list[InjectedFault]) -> list[InjectedFault]:
    """The faults of one student of a run: those that name it or none."""
    return [fault for fault in faults if fault.get("student", student) == student]


class FaultyEngine:
    """An engine in whose forward the faults of the present step and micro-batch happen."""

    def __init__(self, engine: Any, faults: list[InjectedFault], step: dict[str, int]):
        self._engine, self._faults, self._step = engine, faults, step
        self._now = {"step": -1, "micro": -1}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        now = self._now
        now.update(step=self._step["step"], micro=now["micro"] + 1 if now["step"] == self._step["step"] else 0)
        for fault in self._faults:
            if fault["kind"] == "signal" and (fault["step"], fault.get("micro", 0)) == (now["step"], now["micro"]):
                os.kill(os.getpid(), signal.Signals[fault["signal"]])
            if fault["kind"] == "error" and fault["step"] == now["step"]:
                raise {"UserError": UserError, "AssertionError": AssertionError}[fault["error"]]("injected: only here")
            if fault["kind"] == "witness":
                line = {**now, "rank": torch.distributed.get_rank(), "rows": arguments[0].tolist()}
                with open(fault["file"], "a") as file:
                    file.write(json.dumps(line) + "\n")
        files = [fault["file"] for fault in self._faults if fault["kind"] == "kernels"]
        hook = self._engine.module.student.register_forward_hook(lambda *unused: _note_mode(files, "forward"))
        loss, parts = self._engine(*arguments, **keywords)
        hook.remove()
        loss.register_hook(lambda unused: _note_mode(files, "backward"))
        for kind, factor in (("nan", float("nan")), ("spike", 100.0)):
            if any(now["step"] in fault["steps"] for fault in self._faults if fault["kind"] == kind):
                loss = loss * factor
        return loss, parts


def _ask_for_a_petabyte(parts: Any, fault: InjectedFault, now: dict[str, int]) -> None:
    """In the fault's step and part, torch's own allocator fails."""
    from pipeline.distillation import distiller

    def ask(*unused: Any) -> None:
        if now["step"] == fault["step"]:
            torch.empty(1 << 50, dtype=torch.uint8)

    def first_leaf(model: torch.nn.Module) -> torch.nn.Module:
        return next(module for module in model.modules() if not list(module.children()))

    part, engine = fault["part"], parts.engine
    if part == "teacher":
        first_leaf(parts.distiller._teacher[0]).register_forward_pre_hook(ask)
    elif part == "student":
        first_leaf(parts.distiller.student).register_forward_pre_hook(ask)
    elif part == "loss":
        distiller.relation_kl = _followed_by(distiller.relation_kl, ask)
    elif part == "backward":
        next(parameter for parameter in parts.distiller.parameters() if parameter.requires_grad).register_hook(ask)
    else:
        assert part == "optimizer"
        zero = engine.deepspeed_engine.optimizer
        zero.step = _preceded_by(zero.step, ask)


def _note_mode(files: list[str], where: str) -> None:
    for file in files:
        with open(file, "a") as notes:
            notes.write(f"{where} {torch.are_deterministic_algorithms_enabled()}\n")


# -- in saves


def _resumed_and_saved(resume: Callable, directory: Path) -> Callable:
    from pipeline.runtime.checkpoint_writer import CheckpointWriter
    from pipeline.training.resume import checkpoint_state

    def resume_and_save(run: Any, *arguments: Any, **keywords: Any) -> Any:
        states = resume(run, *arguments, **keywords)
        if states[0].first_step:
            pairs = list(zip(run.members, states, strict=True))
            copy = CheckpointWriter(
                directory, {m.name: (m.engine, m.student.untrained) for m, _ in pairs}, run.launch.rank
            )
            copy.begin({m.name: checkpoint_state(m, state, state.first_step) for m, state in pairs})
            outcome = copy.wait()
            assert outcome is not None
            assert outcome.problem is None
        return states

    return resume_and_save


def _around_saves(faults: list[InjectedFault]) -> None:
    from pipeline.runtime.checkpoint_writer import CheckpointWriter

    begin = CheckpointWriter.begin
    armed: list[Callable[[], None]] = []

    def begin_armed(self: Any, states: Any) -> None:
        (step,) = {state["step"] for state in states.values()}
        for fault in faults:
            if fault["save"] == step:
                armed.append(_limit(fault["bytes"]) if fault["kind"] == "file size" else _trap(fault))
        begin(self, states)

    def disarmed_after(method: Callable) -> Any:
        def call(self: Any) -> Any:
            outcome = method(self)
            while outcome is not None and armed:
                armed.pop()()
            return outcome

        return call

    CheckpointWriter.begin = begin_armed  # type: ignore[method-assign]
    CheckpointWriter.poll = disarmed_after(CheckpointWriter.poll)  # type: ignore[method-assign]
    CheckpointWriter.wait = disarmed_after(CheckpointWriter.wait)  # type: ignore[method-assign]


def _limit(size_bytes: int) -> Callable[[], None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, before[1]))
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, before)


def _trap(fault: InjectedFault) -> Callable[[], None]:
    """From now on the `call`-th call of an operation kills this process, or raises. Returns what ends that."""
    name = fault["operation"]
    owner: Any = Path if name in ("rename", "mkdir") else os
    original, calls = getattr(owner, name), [0]

    def trapped(*arguments: Any, **keywords: Any) -> Any:
        calls[0] += 1
        if calls[0] == fault["call"]:
            if isinstance(fault.get("error"), str):
                raise getattr(builtins, fault["error"])
            if "error" in fault:
                raise OSError(fault["error"], os.strerror(fault["error"]), str(arguments[0]))
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments, **keywords)

    setattr(owner, name, trapped)
    return lambda: setattr(owner, name, original)
