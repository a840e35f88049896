"""Predict memory, time and disk of a run, before it starts and without the teacher's weights, a GPU or the network.

python -m pipeline plan --recipe recipes/xlmr_large_l12_h384.yaml --deepspeed ds_configs/zero2.json \\
    --gpu a100-80 --nodes 1 --gpus-per-node 8 [--json FILE] [--plot FILE.png]

The report gives memory per GPU and step time by part, days, GPU-hours, tokens, checkpoints, preparation and disk. It compares
ZeRO stages and node counts, and the run of several students with one run for each of them. Method and sources:
docs/planning.md. A run that does not fit is an error that names the changes with which it fits (exit code 2).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

from data_prep.command_line import end_lines
from data_prep.progress import progress
from pipeline.config import load_recipe
from pipeline.errors import UserError
from pipeline.installed import shipped_file
from pipeline.planning import report
from pipeline.planning.assumptions import Assumptions
from pipeline.planning.devices import DEVICES, Hardware, device_of
from pipeline.planning.family import FamilyPlanner
from pipeline.planning.plan import Planner
from pipeline.planning.preparation import CC100_TEXT_GB, preparation_of
from pipeline.planning.scaling import STAGES, compare_stages, draw, scale

MOST_NODES, MOST_GPUS_PER_NODE = 4096, 72
MOST_TEXT_GB, MOST_MEMORY_GIB = 1e9, 1e6


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--recipe", type=shipped_file, required=True, help="as for training")
    parser.add_argument("--deepspeed", type=shipped_file, required=True, metavar="JSON", help="as for training")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a recipe key")
    parser.add_argument("--gpu", required=True, help=f"one of {', '.join(DEVICES)}")
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--gpus-per-node", type=int, default=8)
    parser.add_argument(
        "--teacher-config", type=Path, metavar="FILE", help="config.json of a teacher that is not in the table"
    )
    parser.add_argument("--memory-gib", type=float, help="usable memory of a GPU, instead of the table's")
    parser.add_argument("--network-gbit", type=float, help="network rate per GPU, instead of the table's")
    parser.add_argument("--efficiency", type=float, help="share of the peak that matrix products reach (default: 0.55)")
    parser.add_argument(
        "--launch-us", type=float, help="host time per kernel in microseconds (default: 12, a slow host)"
    )
    parser.add_argument("--text-gb", type=float, default=CC100_TEXT_GB, help="text to prepare (default: all of CC-100)")
    parser.add_argument("--prepare-cores", type=int, default=64, help="cores that prepare the text (default: 64)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure to FILE")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="plot how the run scales")


def run(arguments: argparse.Namespace) -> None:
    """Plan and print. Raises `UserError` where the run does not fit."""
    _check_numbers(arguments)
    recipe = load_recipe(arguments.recipe, arguments.set)
    hardware = _hardware(arguments)
    kind = FamilyPlanner if recipe.students else Planner
    planner = kind(recipe, arguments.recipe, arguments.deepspeed, hardware, arguments.teacher_config)
    plan = planner.plan(arguments.nodes, arguments.gpus_per_node)
    planner.check_fits(plan)
    found = report.PlanReport(
        planner,
        plan,
        largest_micro_batch=planner.largest_micro_batch(arguments.nodes, arguments.gpus_per_node),
        preparation=preparation_of(recipe, arguments.text_gb, arguments.prepare_cores, hardware.assumptions),
        stages=compare_stages(planner, arguments.nodes, arguments.gpus_per_node),
        points_of={
            stage: scale(planner, arguments.gpus_per_node, stage) for stage in progress(STAGES, "scaling", "ZeRO stage")
        },
        alone=planner.plans_alone(arguments.nodes, arguments.gpus_per_node),
    )
    print(report.text(found), flush=True)
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(report.figures(found), indent=1) + "\n", encoding="utf-8")
    if arguments.plot:
        title = f"{arguments.recipe.stem} on {hardware.device.name}, global batch {recipe.global_batch}"
        draw(found.points_of, plan.setting.stage, title, arguments.plot)
    if files := [file for file in (arguments.json, arguments.plot) if file]:
        print(end_lines(*files))


def _check_numbers(arguments: argparse.Namespace) -> None:
    limits = {"nodes": MOST_NODES, "gpus_per_node": MOST_GPUS_PER_NODE, "prepare_cores": 10**6}
    for name, most in limits.items():
        if not 1 <= getattr(arguments, name) <= most:
            option = name.replace("_", "-")
            raise UserError(f"--{option} is {getattr(arguments, name)}; it must be between 1 and {most}")
    for name in ("memory_gib", "network_gbit", "efficiency", "launch_us", "text_gb"):
        value = getattr(arguments, name)
        if value is not None and not value > 0:
            raise UserError(f"--{name.replace('_', '-')} is {value}; it must be above 0")
    if arguments.text_gb > MOST_TEXT_GB or (arguments.memory_gib or 0) > MOST_MEMORY_GIB:
        raise UserError(f"--text-gb must be at most {MOST_TEXT_GB:g}, and --memory-gib at most {MOST_MEMORY_GIB:g}")
    if arguments.efficiency is not None and arguments.efficiency > 1:
        raise UserError(f"--efficiency is {arguments.efficiency}; it is a share of the peak, so it must be at most 1")


def _hardware(arguments: argparse.Namespace) -> Hardware:
    """The row of the device table, with the values that the command line overrides."""
    device, assumptions = device_of(arguments.gpu), Assumptions()
    given = {"memory_gib": arguments.memory_gib, "network_gbit_s": arguments.network_gbit}
    device = dataclasses.replace(device, **{name: value for name, value in given.items() if value is not None})
    if arguments.efficiency is not None:
        assumptions = dataclasses.replace(assumptions, product_efficiency=arguments.efficiency)
    if arguments.launch_us is not None:
        assumptions = dataclasses.replace(assumptions, launch_s=arguments.launch_us * 1e-6)
    return Hardware(device, assumptions)
