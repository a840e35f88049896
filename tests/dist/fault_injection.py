"""What is arranged to go wrong inside a real rank, at a place that a signal from outside could hit only by luck.

A fault is a dictionary: `kind`, `rank` (absent: every rank), and when. Steps count from 0, the n-th call from 1.

    signal     sends `signal` to the rank itself in step `step`, before its micro-batch `micro`
    at call    in the save of step `save`, at the `call`-th of `operation` (fsync, rename, mkdir, link): SIGKILL, or with
               `error` an OSError of that number, as from a full disk, or that exception (MemoryError, say)
    file size  in the save of step `save` no file may grow past `bytes`: the kernel refuses the write
    nan        the loss of `steps` is multiplied by not-a-number, so that every gradient of this rank is
    spike      the loss of `steps` is multiplied by a hundred
    broken weights  after step `step` one master weight of this rank is not a number
    pause      every step takes `seconds` longer
    witness    nothing goes wrong: every micro-batch that the student is fed is appended to `file`
    kernels    nothing goes wrong: whether torch's strict mode was on in the student's forward and in backward goes to `file`
    resave     nothing goes wrong: what was loaded is saved again to the directory `to`
    no memory  a save finds none left for a snapshot
    stop file  STOP is made while the run starts, after it has begun to listen for it
    elsewhere  the rank starts in the directory `directory` and with `environment` in its environment, as on another node
    bug        the student cannot be built, or with `after load` a run cannot continue, for a reason that nobody foresaw
    other text a projected student is measured on `tokens` tokens
    stock      checkpoints are DeepSpeed's own (benchmarks/faults/stock.py)
"""

from __future__ import annotations

import builtins
import json
import os
import resource
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

InjectedFault = dict[str, Any]


def arrange(faults: list[InjectedFault], rank: int) -> None:
    """Called in the rank before its program starts."""
    mine = [fault for fault in faults if fault.get("rank", rank) == rank]
    if not mine:
        return
    for fault in mine:
        if fault["kind"] == "elsewhere":
            os.chdir(fault.get("directory", "."))
            os.environ |= fault.get("environment", {})
    from pipeline.runtime import checkpoint_writer
    from pipeline.runtime.checkpoint_writer import CheckpointWriter
    from pipeline.training import build as assembly
    from pipeline.training.trainer import Trainer

    kinds = {kind: [m for m in mine if m["kind"] == kind] for kind in {m["kind"] for m in mine}}
    _around_steps(
        Trainer,
        [m for m in mine if m["kind"] in ("signal", "nan", "spike", "broken weights", "pause", "witness", "kernels")],
    )
    _around_saves(CheckpointWriter, [m for m in mine if m["kind"] in ("at call", "file size")])
    if "no memory" in kinds:
        checkpoint_writer.available_memory_bytes = lambda: 0
    if "other text" in kinds:
        assembly.CALIBRATION_TOKENS = kinds["other text"][0]["tokens"]
    if "bug" in kinds:
        if kinds["bug"][0].get("after load"):
            Trainer._begin = lambda *unused: [][0]
        else:
            assembly.student_of = lambda *unused: [][0]
    if "stop file" in kinds:
        _make_stop_file_in_start_up(Trainer)
    if "resave" in kinds:
        _resave_what_was_loaded(Trainer, CheckpointWriter, Path(kinds["resave"][0]["to"]))
    if "stock" in kinds:
        from benchmarks.faults.stock import use_stock_checkpoints

        use_stock_checkpoints(Trainer, kinds["stock"][0])


def _around_steps(trainer: Any, faults: list[InjectedFault]) -> None:
    whole_step, now = trainer.train_step, {"step": -1, "micro": -1}

    def train_step(self: Any, step: int, batches: Any) -> Any:
        if now["step"] < 0:
            self.engine.__class__ = _unlucky(type(self.engine), faults, now)
        now.update(step=step, micro=0)
        time.sleep(sum(m["seconds"] for m in faults if m["kind"] == "pause"))
        report = whole_step(self, step, batches)
        if any(m["kind"] == "broken weights" and m["step"] == step for m in faults):
            fragment = next(self.engine.fragments())
            fragment.view(fragment.buffer)[0] = float("nan")
        return report

    trainer.train_step = train_step


def _unlucky(engine: type, faults: list[InjectedFault], now: dict[str, int]) -> type:
    """A subclass of the engine in which the faults of the present step and micro-batch happen."""

    def call(self: Any, *arguments: Any, **keywords: Any) -> Any:
        for fault in faults:
            if fault["kind"] == "signal" and (fault["step"], fault.get("micro", 0)) == (now["step"], now["micro"]):
                os.kill(os.getpid(), signal.Signals[fault["signal"]])
            if fault["kind"] == "witness":
                line = {**now, "rank": torch.distributed.get_rank(), "rows": arguments[0].tolist()}
                with open(fault["file"], "a") as file:
                    file.write(json.dumps(line) + "\n")
        now["micro"] += 1
        files = [fault["file"] for fault in faults if fault["kind"] == "kernels"]
        hook = self.module.student.register_forward_hook(lambda *unused: _note_mode(files, "forward"))
        loss, parts = engine.__call__(self, *arguments, **keywords)
        hook.remove()
        loss.register_hook(lambda unused: _note_mode(files, "backward"))
        for kind, factor in (("nan", float("nan")), ("spike", 100.0)):
            if any(now["step"] in fault["steps"] for fault in faults if fault["kind"] == kind):
                loss = loss * factor
        return loss, parts

    return type("Unlucky", (engine,), {"__call__": call})


def _note_mode(files: list[str], where: str) -> None:
    for file in files:
        with open(file, "a") as notes:
            notes.write(f"{where} {torch.are_deterministic_algorithms_enabled()}\n")


def _make_stop_file_in_start_up(trainer: Any) -> None:
    check = trainer._check_before

    def check_and_touch(self: Any) -> None:
        check(self)
        (self.run_dir / "STOP").touch()

    trainer._check_before = check_and_touch


def _resave_what_was_loaded(trainer: Any, writer: Any, directory: Path) -> None:
    resume = trainer._resume

    def resume_and_save(self: Any, *arguments: Any) -> int:
        first = resume(self, *arguments)
        if first:
            copy = writer(directory, self.engine, self.parts.student.untrained, self.launch.rank)
            copy.begin(self._state(first))
            assert copy.wait().problem is None
        return first

    trainer._resume = resume_and_save


def _around_saves(writer: Any, faults: list[InjectedFault]) -> None:
    begin, finish = writer.begin, writer._finish
    armed: list[Callable[[], None]] = []

    def begin_armed(self: Any, state: Any) -> None:
        for fault in faults:
            if fault["save"] == state["step"]:
                armed.append(_limit(fault["bytes"]) if fault["kind"] == "file size" else _trap(fault))
        begin(self, state)

    def finish_and_disarm(self: Any, *arguments: Any) -> Any:
        outcome = finish(self, *arguments)
        while armed:
            armed.pop()()
        return outcome

    writer.begin, writer._finish = begin_armed, finish_and_disarm


def _limit(size_bytes: int) -> Callable[[], None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, before[1]))
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, before)


def _trap(fault: InjectedFault) -> Callable[[], None]:
    """From now on the n-th call of an operation kills this process, or fails."""
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
