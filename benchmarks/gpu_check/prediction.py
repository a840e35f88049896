"""The plan of `python -m pipeline plan` compared with the measured step: milliseconds by part, memory, and the share of the peak.

In: the figures of the part `step`, and the row of this device in pipeline/planning/devices.py. Out: predicted, measured, ratio.
"""

from __future__ import annotations

import re

import torch

from benchmarks.gpu_check.figures import Figures, NotHere, Row, read_figures
from benchmarks.gpu_check.setting import RECIPE, Setting
from benchmarks.gpu_check.step import TABLE as STEPS
from benchmarks.gpu_check.timing import on_gpu
from pipeline.config import load_recipe
from pipeline.planning.devices import DEVICES, Device, Hardware
from pipeline.planning.memory import GIB
from pipeline.planning.plan import Plan, Planner

TABLE = "Plan and measurement"
# Part of the plan -> phases of the measured step.
PARTS = {
    "teacher": ("teacher ms",),
    "student": ("student forward ms", "backward ms"),
    "loss": ("loss ms",),
    "optimizer": ("optimizer ms",),
    "data": ("batch ms",),
}


def measure(setting: Setting, figures: Figures) -> None:
    step, plan = _measured_step(setting), _plan(setting)
    rows = [
        (f"{part}, ms", 1e3 * plan.step.parts[part], sum(step[phase] for phase in phases))
        for part, phases in PARTS.items()
    ]
    rows.append(("complete step, ms", 1e3 * plan.step.total, step["step ms"]))
    for name, predicted, measured in rows:
        figures.add(TABLE, _row(name, predicted, measured))
    if step["peak GiB"] is not None:
        figures.add(TABLE, _row("peak memory, GiB (measured: of tensors)", plan.memory.total / GIB, step["peak GiB"]))
    peak = _device().flops_per_s(plan.setting.precision)
    shares = (plan.step.flops / seconds / peak for seconds in (plan.step.total, 1e-3 * step["step ms"]))
    figures.add(TABLE, _row("share of the peak TFLOP/s (MFU)", *shares))


def _row(name: str, predicted: float, measured: float) -> Row:
    return {"figure": name, "predicted": predicted, "measured": measured, "predicted / measured": predicted / measured}


def _measured_step(setting: Setting) -> Row:
    """The first row of the part `step`: the job as it is."""
    for line in read_figures(setting.figures("step")):
        if line["table"] == STEPS and "step ms" in line["row"]:
            return line["row"]
    raise NotHere("the part `step` has measured no step")


def _plan(setting: Setting) -> Plan:
    recipe = load_recipe(RECIPE, setting.overrides())
    config = setting.teacher / "config.json"
    return Planner(recipe, RECIPE, setting.ds_json(2), Hardware(_device()), config).plan(1, 1)


def _device() -> Device:
    """The row of the planner's table whose name and memory are this GPU's."""
    if not on_gpu():
        return DEVICES["cpu"]
    about = torch.cuda.get_device_properties(0)
    words = re.findall(r"[a-z0-9]+", about.name.lower().replace("geforce rtx ", "rtx"))
    rows = [device for device in DEVICES.values() if device.name.split("-")[0] in words]
    if not rows:
        raise NotHere(f"{about.name} is not in pipeline/planning/devices.py: add its row, and the plan is compared too")
    return min(rows, key=lambda device: abs(device.memory_gib - about.total_memory / GIB))
