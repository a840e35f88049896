"""Compiled layers against a compiled encoder: CPU seconds to compile, graphs, and the speed of a training batch afterwards.

    OMP_NUM_THREADS=1 python benchmarks/bench_compile.py [--quick] [--json FILE]

Both forms compile the same tapped encoders (12 x 384 as teacher, 6 x 384 as student with its backward) from an empty cache.
Seconds are of this process and the compilers that it starts. Speeds are the fastest of the repeats, taken in turns.
"""

from __future__ import annotations

import os
import resource
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # so that each compiler is a child of this process, whose time counts

import torch
from torch._dynamo.utils import counters
from transformers import XLMRobertaConfig, XLMRobertaModel

from benchmarks.measure import arguments, publish
from pipeline.distillation.compiled_layers import compile_layers
from pipeline.distillation.tap import TappedEncoder, tap

ROWS, TOKENS, REPEATS = 4, 128, 5
WRITTEN, LAYERS, COMPLETE = "as written", "layer by layer", "complete encoder"
HEADER = ["model", "form", "graphs", "CPU s to compile", "CPU ms per batch", "speed", "largest difference"]


def cpu_s() -> float:
    """CPU seconds of this process and of its finished children, which are the C++ compilers."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def encoder(layers: int, is_trained: bool, width: int = 384) -> TappedEncoder:
    config = XLMRobertaConfig(
        vocab_size=1000,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=12,
        intermediate_size=4 * width,
        max_position_embeddings=TOKENS + 2,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    torch.manual_seed(0)
    model = XLMRobertaModel(config, add_pooling_layer=False)
    return tap(model.train(is_trained), layers).requires_grad_(is_trained)


def batch(model: TappedEncoder, is_trained: bool) -> torch.Tensor:
    """One forward, of a trained model with its backward; Q."""
    ids_BL = torch.arange(ROWS * TOKENS).view(ROWS, TOKENS) % 997 + 3
    with torch.set_grad_enabled(is_trained):
        query_BLD, key_BLD, value_BLD = model(ids_BL)
        if is_trained:
            (query_BLD.square().mean() + key_BLD.square().mean() + value_BLD.square().mean()).backward()
            model.zero_grad()
    return query_BLD.detach()


def compiled_form(form: str, layers: int, is_trained: bool) -> tuple[TappedEncoder, int, float]:
    """The model after its first batch, its graphs, and the CPU seconds of that batch."""
    model = encoder(layers, is_trained)
    if form == LAYERS:
        compile_layers(model, "compile")
    elif form == COMPLETE:
        model.compile(dynamic=False)
    graphs, began = counters["stats"]["unique_graphs"], cpu_s()
    batch(model, is_trained)
    return model, counters["stats"]["unique_graphs"] - graphs, cpu_s() - began


def measure(name: str, layers: int, is_trained: bool) -> list[list[Any]]:
    """The three forms of one model."""
    made = {form: compiled_form(form, layers, is_trained) for form in (WRITTEN, LAYERS, COMPLETE)}
    seconds = dict.fromkeys(made, float("inf"))
    for _ in range(REPEATS):
        for form, (model, _, _) in made.items():
            seconds[form] = min(seconds[form], timed(lambda model=model: batch(model, is_trained)))
    expected = batch(made[WRITTEN][0], is_trained)
    rows: list[list[Any]] = []
    for form, (model, graphs, compiling_s) in made.items():
        difference = (batch(model, is_trained) - expected).abs().max().item()
        costs = [graphs, compiling_s if graphs else 0.0, seconds[form] * 1e3, seconds[WRITTEN] / seconds[form]]
        rows.append([name, form, *costs, difference])
    return rows


def timed(run: Callable[[], Any]) -> float:
    began = cpu_s()
    run()
    return cpu_s() - began


def main() -> None:
    options = arguments(__doc__).parse_args()
    torch.set_num_threads(1)
    divide = 4 if options.quick else 1
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
        narrow = encoder(2, True, 96)  # imports, and the compiler's precompiled header; no graph that is measured
        compile_layers(narrow, "compile")
        batch(narrow, True)
        torch._dynamo.reset()
        rows = measure("teacher", 12 // divide + 1, False) + measure("student", 6 // divide + 1, True)
    publish(
        f"Compiled layers, {ROWS} x {TOKENS} tokens, fp32, one thread",
        HEADER,
        rows,
        {"rows": [dict(zip(HEADER, row, strict=True)) for row in rows]},
        options.json,
    )


if __name__ == "__main__":
    main()
