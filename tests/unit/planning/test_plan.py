"""`python -m pipeline plan`: its report, what it rejects and proposes instead, and the formulas of docs/planning.md."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.__main__ import main
from pipeline.config import load_recipe
from pipeline.distillation.flops import forward_flops
from pipeline.errors import EXIT_DONE, EXIT_USER, exit_code_of
from pipeline.planning.devices import DEVICES, Hardware
from pipeline.planning.memory import GIB
from pipeline.planning.meta_models import KNOWN_TEACHERS, build_encoders
from pipeline.planning.plan import Planner
from pipeline.planning.scaling import scale, scaling_knee
from pipeline.planning.trace import trace_student, trace_teacher
from tests.conftest import REPO
from tests.unit.printed import settings_in

RECIPE = REPO / "recipes" / "xlmr_large_l12_h384.yaml"
ZERO2 = REPO / "ds_configs" / "zero2.json"
SHALLOW = ["student.layers=2", "relations.teacher_layer=4"]  # cheaper to trace
Planned = Callable[..., tuple[int, str]]


@pytest.fixture
def planned(capsys: pytest.CaptureFixture) -> Planned:
    """Run the command; its exit code, and what it printed or its one error paragraph."""

    def run(*words: str, recipe: Path = RECIPE, ds: Path = ZERO2, gpu: str = "a100-80") -> tuple[int, str]:
        arguments = ["plan", "--recipe", str(recipe), "--deepspeed", str(ds), "--gpu", gpu, *words]
        code = exit_code_of(lambda: main(arguments))
        output = capsys.readouterr()
        assert "Traceback" not in output.err
        errors = [line for line in output.err.splitlines() if line.startswith("error: ")]
        assert len(errors) == (code != EXIT_DONE)
        return code, errors[0] if errors else output.out

    return run


def planner(*overrides: str, gpu: str = "a100-80", ds: Path = ZERO2) -> Planner:
    return Planner(load_recipe(RECIPE, list(overrides)), RECIPE, ds, Hardware(DEVICES[gpu]))


def test_report_figures_and_plot(planned: Planned, tmp_path: Path) -> None:
    small = [word for change in SHALLOW for word in ("--set", change)]
    code, text = planned(*small, "--json", str(tmp_path / "plan.json"), "--plot", str(tmp_path / "plan.png"))
    assert code == EXIT_DONE
    for words in ("Memory per GPU", "optimizer step", "GPU-hours", "checkpoint", "shards", "ZeRO-3", "Scaling knee"):
        assert words in text
    figures: dict[str, Any] = json.loads((tmp_path / "plan.json").read_text())
    plan = figures["plan"]
    assert sum(plan["memory"]["parts"].values()) == plan["memory"]["total"]
    assert sum(plan["step"]["parts"].values()) == pytest.approx(plan["step"]["total"])
    assert plan["gpu_hours"] == pytest.approx(8 * plan["run_s"] / 3600)
    encoders = build_encoders(load_recipe(RECIPE, []))
    assert (encoders.teacher_parameters, encoders.trained_parameters) == (486_412_288, 116_161_920)
    assert [point["gpus"] for point in figures["scaling"]["2"]] == [1, 2, 4, 8, 16, 32, 64, 128, 256, 512]
    assert figures["largest_micro_batch"] == 32
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")


def test_operations_equal_the_formulas() -> None:
    """docs/planning.md, equations (1) to (3), written out for XLM-R-large cut at 19 and a 12 x 384 student."""
    encoders = build_encoders(load_recipe(RECIPE, []))
    rows, length = 2, 512
    tokens = rows * length
    teacher = tokens * (18 * (24 * 1024**2 + 4 * length * 1024) + 6 * 1024**2)
    assert trace_teacher(encoders.teacher, rows, length, "fp16").flops == teacher
    assert rows * forward_flops(encoders.teacher, length) == teacher, "a run's TFLOP/s counts as the plan does"
    student = trace_student(encoders.student, rows, length, "fp16", 1, gradients_stay=False)
    products, attention, last = 24 * 384**2, 4 * length * 384, 6 * 384**2
    assert rows * forward_flops(encoders.student, length) == student.forward.flops
    assert student.forward.flops == tokens * (11 * (products + attention) + last)
    assert student.backward.flops == tokens * (11 * (2 * products + 2.5 * attention) + 2 * last)


def test_activations_are_36_bytes_per_channel() -> None:
    """One more post-norm layer keeps for backward, per token in half precision: 36 bytes per channel, 4 per head, 16 for norms."""
    rows, length, kept = 4, 128, []
    for layers in (4, 5):
        encoders = build_encoders(load_recipe(RECIPE, [f"student.layers={layers}"]))
        kept.append(trace_student(encoders.student, rows, length, "fp16", 1, True).forward.kept_bytes)
    assert kept[1] - kept[0] == rows * length * (36 * 384 + 4 * 12 + 16)


def test_every_known_teacher_can_be_planned() -> None:
    for name in KNOWN_TEACHERS:
        overrides = ["student.layers=2", "relations.heads=32", "student.hidden=96", "relations.teacher_layer=3"]
        encoders = build_encoders(load_recipe(RECIPE, [f"teacher={name}", *overrides]))
        assert encoders.teacher_parameters > encoders.student_parameters


def test_scaling_knee_is_where_communication_outweighs_a_small_share() -> None:
    points = scale(planner(*SHALLOW), 8)
    assert points[-1].plan is None
    efficiencies = [point.efficiency for point in points if point.plan]
    assert efficiencies == sorted(efficiencies, reverse=True)
    assert "communication" in scaling_knee(points)


def test_higher_stages_never_use_more_optimizer_memory() -> None:
    one = planner(*SHALLOW, gpu="v100-16")
    sizes = [one.plan(2, 8, stage).memory.total for stage in (1, 2)]
    assert sizes[1] <= sizes[0]
    assert one.plan(2, 8).memory.parts["optimizer"] * 2 <= one.plan(1, 8).memory.parts["optimizer"] + 2


def test_unknown_gpu(planned: Planned) -> None:
    code, error = planned(gpu="a100_80")
    assert code == EXIT_USER
    assert "did you mean `a100-80`?" in error


def test_impossible_numbers(planned: Planned) -> None:
    assert "--nodes is 0" in planned("--nodes", "0")[1]
    assert "--gpus-per-node is -1" in planned("--gpus-per-node", "-1")[1]
    assert "--efficiency is 2.0" in planned("--efficiency", "2")[1]
    assert "--text-gb is 0.0" in planned("--text-gb", "0")[1]
    assert "--launch-us is 0.0" in planned("--launch-us", "0")[1]


def test_batch_that_does_not_divide(planned: Planned) -> None:
    code, error = planned("--gpus-per-node", "6")
    assert code == EXIT_USER
    assert "global_batch 256 does not divide by 6 ranks" in error


def test_precision_that_the_gpu_lacks(planned: Planned) -> None:
    assert "bf16" in planned(ds=REPO / "ds_configs" / "zero2_bf16.json", gpu="v100-32")[1]


def test_unknown_teacher(planned: Planned) -> None:
    code, error = planned("--set", "teacher=FacebookAI/xlm-roberta-larg")
    assert code == EXIT_USER
    assert "did you mean `FacebookAI/xlm-roberta-large`?" in error
    assert "--teacher-config config.json" in error


def test_teacher_from_a_directory_or_a_config_file(planned: Planned, tiny_teacher: Path, tmp_path: Path) -> None:
    changes = ["relations.heads=12", "relations.teacher_layer=3", "seq_len=32", "student.layers=1", "global_batch=8"]
    small = [word for change in changes for word in ("--set", change)]
    assert planned("--set", f"teacher={tiny_teacher}", *small)[0] == EXIT_DONE
    config = str(tiny_teacher / "config.json")
    assert planned("--set", "teacher=some/body", "--teacher-config", config, *small)[0] == EXIT_DONE
    broken = tmp_path / "config.json"
    broken.write_text("[]")
    assert "model_type" in planned("--teacher-config", str(broken))[1]
    broken.write_text('{"model_type": "gpt2"}')
    assert "gpt2" in planned("--teacher-config", str(broken))[1]


def test_rows_longer_than_the_positions(planned: Planned) -> None:
    assert "positions for 512" in planned("--set", "seq_len=1024")[1]


def test_a_run_that_does_not_fit_is_rejected_with_changes_that_fit(planned: Planned) -> None:
    code, error = planned("--memory-gib", "4.5", "--set", SHALLOW[1])
    assert code == EXIT_USER
    assert "does not fit on a100-80" in error
    assert "--set micro_batch_per_gpu=16" in error
    assert "--set student.checkpointing=true" in error
    for change in settings_in(error):
        assert planner(SHALLOW[1], change).plan(1, 8).memory.total < 4.5 * GIB


def test_a_teacher_that_fits_only_partitioned(planned: Planned) -> None:
    xxl = [
        "--set",
        "teacher=facebook/xlm-roberta-xxl",
        "--set",
        "relations.teacher_layer=40",
        "--set",
        "global_batch=8",
    ]
    code, error = planned(*xxl, gpu="t4")
    assert code == EXIT_USER
    assert "teacher_options.placement=zero3" in error
    for option in re.split("; or ", error.partition("What would fit: ")[2]):
        if settings := settings_in(option):
            assert (
                planned(*xxl, *(word for setting in settings for word in ("--set", setting)), gpu="t4")[0] == EXIT_DONE
            )
