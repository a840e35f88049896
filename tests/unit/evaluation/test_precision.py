"""The precision in which fine-tuning computes, and its loss scale in fp16. The loop itself runs here, on the CPU."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from pipeline.errors import DivergedRunError, UserError
from pipeline.evaluation.encoder import Encoder, load_encoder
from pipeline.evaluation.finetuning import precision
from pipeline.evaluation.finetuning.loop import GridPoint, finetune
from pipeline.evaluation.finetuning.pair_classification import make_task
from pipeline.evaluation.finetuning.precision import forward_precision
from pipeline.evaluation.finetuning.xnli import TASK, XnliConfig, read
from pipeline.evaluation.ranks import alone
from pipeline.runtime import gpus
from tests.unit.evaluation.labelled_pairs import interrupted_in_epoch_3, write_xnli

POINT = GridPoint(3e-3, 0)
GPU = torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("capability", "asked", "expected"),
    [
        ((7, 0), "auto", "fp16"),  # V100
        ((7, 5), "auto", "fp16"),  # T4
        ((8, 0), "auto", "bf16"),
        ((9, 0), "auto", "bf16"),
        ((7, 0), "fp32", "fp32"),
        ((8, 0), "fp16", "fp16"),
    ],
)
def test_the_precision_on_a_gpu(
    capability: tuple[int, int], asked: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert forward_precision(asked, "xnli", GPU).name == expected


def test_emulated_bf16_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpus, "has_bf16", lambda device: False)
    monkeypatch.setattr("pipeline.evaluation.finetuning.precision.device_name", lambda device: "Tesla V100-SXM2-32GB")
    with pytest.raises(
        UserError, match=r"bf16, which Tesla V100-SXM2-32GB does not have: use --set mlqa\.precision=fp16"
    ):
        forward_precision("bf16", "mlqa", GPU)


def test_a_cpu_computes_in_fp32() -> None:
    assert str(forward_precision("auto", "xnli", torch.device("cpu"))).startswith("fp32 on CPU")


# -- the loop in fp16


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> XnliConfig:
    pairs = write_xnli(tmp_path_factory.mktemp("xnli"))
    sizes = {"epochs": 4, "batch": 16, "micro_batch": 6, "max_length": 48}
    return XnliConfig(data=str(pairs), learning_rates=[POINT.learning_rate], precision="fp16", **sizes)


@pytest.fixture
def encoder(tiny_teacher: Path) -> Encoder:
    return load_encoder(str(tiny_teacher))


def test_fp16_learns_and_says_that_it_is_fp16(
    encoder: Encoder, settings: XnliConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = dataclasses.replace(settings, epochs=6)  # after 4, another tokenizer's pieces give 87.5 % in fp32 too
    result = TASK.evaluate([encoder], settings, alone(), tmp_path)[encoder.name]
    assert "fine-tuning computes in fp16 with a loss scale on CPU" in capsys.readouterr().out
    assert result["test"]["en"]["accuracy"] >= 90
    in_fp32 = TASK.evaluate([encoder], dataclasses.replace(settings, precision="fp32"), alone(), tmp_path)[encoder.name]
    losses = [[epoch["loss"] for epoch in found["cells"][0]["epochs"]] for found in (result, in_fp32)]
    assert losses[0][0] == pytest.approx(losses[1][0], rel=0.05)
    assert losses[0] != losses[1], "it is another precision"


def test_an_overflow_skips_the_step_and_a_resume_continues_with_the_scale(
    encoder: Encoder, settings: XnliConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "FIRST_SCALE", 2.0**26)
    task = make_task(encoder, read(settings), settings, alone())
    expected = finetune(task, settings, POINT, tmp_path / "once", alone(), "tiny")
    left = interrupted_in_epoch_3(task, settings, POINT, tmp_path / "cut")
    state = json.loads((left / "state.json").read_text())
    assert state["skipped"] > 0
    assert state["scaler"]["scale"] == 2.0**26 / 2 ** state["skipped"]
    assert finetune(task, settings, POINT, tmp_path / "cut", alone(), "tiny") == expected


def test_a_loss_that_is_not_a_number_ends_it(encoder: Encoder, settings: XnliConfig, tmp_path: Path) -> None:
    task = make_task(encoder, read(settings), settings, alone())
    bad = dataclasses.replace(task, loss=lambda *arguments: task.loss(*arguments) * torch.nan)
    with pytest.raises(DivergedRunError, match="not finite at step 17 of 24"):
        finetune(bad, settings, POINT, tmp_path, alone(), "tiny")
