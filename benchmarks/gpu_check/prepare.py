"""Makes what the training parts share: a teacher of XLM-R-large's shape with random weights, a tokenizer, shards of samples/.

The tokenizer has 2000 pieces, so that nothing has to be downloaded; the teacher has all of its 250 002 rows.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoTokenizer, XLMRobertaConfig, XLMRobertaModel

from benchmarks.gpu_check.figures import Figures
from benchmarks.gpu_check.processes import Process, reason_in
from benchmarks.gpu_check.setting import LANGUAGES, Setting
from benchmarks.gpu_check.timing import device
from benchmarks.measure import REPO
from benchmarks.tiny_tokenizer import make_tiny_tokenizer

TABLE = "Made"
PREPARE_LIMIT_S = 60


def measure(setting: Setting, figures: Figures) -> None:
    """Make each of the three. What needs a missing one says so in its own part."""

    def seconds_of(make: Callable[[], object]) -> Callable[[], dict[str, float]]:
        def timed() -> dict[str, float]:
            began = time.monotonic()
            make()
            return {"seconds": time.monotonic() - began}

        return timed

    figures.attempt(TABLE, {"what": "tokenizer"}, seconds_of(lambda: make_tiny_tokenizer(setting.tokenizer)))
    figures.attempt(TABLE, {"what": "shards"}, seconds_of(lambda: _make_shards(setting)))
    figures.attempt(TABLE, {"what": "teacher"}, seconds_of(lambda: _make_teacher(setting)))


def _make_shards(setting: Setting) -> None:
    inputs = [str(REPO / "samples" / "cc100" / f"{language}.txt.xz") for language in LANGUAGES]
    command = [sys.executable, "-m", "data_prep", "prepare", "--input", *inputs]
    command += ["--tokenizer", str(setting.tokenizer), "--output", str(setting.shards)]
    ended = Process(command, setting.log("prepare-shards")).wait(PREPARE_LIMIT_S * setting.scale.patience)
    if ended.code != 0:
        raise RuntimeError(f"data_prep ended with {ended.code}: {reason_in(setting.log('prepare-shards'))}")


def _make_teacher(setting: Setting) -> None:
    """fp16 files: half as long to write and to read. Loading widens them to fp32."""
    shape: dict[str, Any] = setting.scale.teacher
    config = XLMRobertaConfig(
        **shape,
        type_vocab_size=1,
        layer_norm_eps=1e-5,
        initializer_range=0.02 if not setting.is_tiny else 0.2,  # wide enough for relations that differ from uniform
    )
    torch.manual_seed(0)
    with device():  # a GPU draws half a billion numbers in no time
        model = XLMRobertaModel(config, add_pooling_layer=False).half()
    model.save_pretrained(setting.teacher)
    for file in setting.tokenizer.iterdir():
        (setting.teacher / file.name).write_bytes(file.read_bytes())
    AutoTokenizer.from_pretrained(setting.teacher, trust_remote_code=False).save_pretrained(setting.teacher)
