"""Run a fine-tuning grid for one encoder, choose on the development languages, and keep what is finished.

In: a task, settings, a directory. Out: the test scores of the learning rate whose best epoch is best on the mean of ALL
development languages. A finished cell leaves `cell.json` and is not run again while encoder, data and settings are the
same; a cell in flight goes on from its last epoch. Used by xnli.py and mlqa.py.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from data_prep.durable_files import replace_file
from pipeline.evaluation.encoder import VOCABULARY_FILES, Encoder
from pipeline.evaluation.finetuning.loop import FinetuneConfig, FinetuneTask, GridPoint, Scores, finetune, mean_of
from pipeline.evaluation.ranks import Ranks
from pipeline.provenance import fingerprint
from pipeline.runtime.file_hash import xxh3_128_of
from pipeline.runtime.json_files import read_json

# Settings that change nothing within one cell. micro_batch is none of them: dropout draws a mask per micro-batch.
NO_EFFECT = ("learning_rates", "seeds")


def run_grids(
    name: str,
    encoders: list[Encoder],
    make_task: Callable[[Encoder], FinetuneTask],
    data_fingerprint: str,
    config: FinetuneConfig,
    directory: Path,
    ranks: Ranks,
) -> dict[str, dict[str, Any]]:
    """One grid per encoder, by its name; rows too long for any of them are refused before the first is tuned."""
    for encoder in encoders:
        encoder.check_max_length(config.max_length, f"{name}.max_length")
    return {
        encoder.name: run_grid(
            functools.partial(make_task, encoder), encoder, data_fingerprint, config, directory, ranks
        )
        for encoder in encoders
    }


def run_grid(
    make_task: Callable[[], FinetuneTask],
    encoder: Encoder,
    data_fingerprint: str,
    config: FinetuneConfig,
    directory: Path,
    ranks: Ranks,
) -> dict[str, Any]:
    """All cells of one encoder. `make_task` tokenises, so it is called only if a cell is missing."""
    settings = {key: value for key, value in dataclasses.asdict(config).items() if key not in NO_EFFECT}
    identity = fingerprint([settings, data_fingerprint, encoder_fingerprint(encoder)])
    home = directory / f"{re.sub(r'[^A-Za-z0-9.-]+', '_', encoder.name).strip('_')[-60:]}-{identity[:8]}"
    task: FinetuneTask | None = None
    cells = []
    for cell in [GridPoint(rate, seed) for rate in config.learning_rates for seed in config.seeds]:
        result = ranks.from_main(_finished(home / str(cell)) if ranks.is_main else None)
        if result is None:
            task = task or make_task()
            with torch.random.fork_rng():  # a cell seeds torch; what comes after it should not see that
                result = finetune(task, config, cell, home / str(cell), ranks, encoder.name)
            if ranks.is_main:
                _keep(home / str(cell), result)
        elif ranks.is_main:
            print(f"{encoder.name} {cell}: finished before, kept ({home / str(cell)})", flush=True)
        ranks.barrier()
        cells.append(result)
    return choose(cells)


def choose(cells: list[dict[str, Any]]) -> dict[str, Any]:
    """The learning rate with the best development mean over its seeds; its test scores are means over its seeds."""
    rates = list(dict.fromkeys(cell["learning_rate"] for cell in cells))
    of_rate = {rate: [cell for cell in cells if cell["learning_rate"] == rate] for rate in rates}
    best = max(rates, key=lambda rate: sum(cell["dev_mean"] for cell in of_rate[rate]) / len(of_rate[rate]))
    chosen = of_rate[best]
    test = _mean_scores([cell["test"] for cell in chosen])
    measures = list(next(iter(test.values())))
    return {
        "test": test,
        "mean": {name: sum(scores[name] for scores in test.values()) / len(test) for name in measures},
        "dev_mean": sum(cell["dev_mean"] for cell in chosen) / len(chosen),
        "learning_rate": best,
        "best_epochs": [cell["best_epoch"] for cell in chosen],
        "test_mean_of_each_seed": {str(cell["seed"]): mean_of(cell["test"]) for cell in chosen},
        "cells": cells,
    }


def _mean_scores(runs: list[Scores]) -> Scores:
    return {
        language: {name: sum(run[language][name] for run in runs) / len(runs) for name in measures}
        for language, measures in runs[0].items()
    }


def encoder_fingerprint(encoder: Encoder) -> list[str]:
    """Content of a directory's weights, config and vocabulary; name and commit of a hub model."""
    directory = Path(encoder.path)
    if not directory.is_dir():
        return [encoder.path, str(getattr(encoder.model.config, "_commit_hash", None))]
    patterns = ("config.json", "*.safetensors", *VOCABULARY_FILES)
    files = sorted({path for pattern in patterns for path in directory.glob(pattern)})
    return [f"{path.name} {xxh3_128_of(path)}" for path in files]


def _finished(directory: Path) -> dict[str, Any] | None:
    path = directory / "cell.json"
    return read_json(path, advice="Delete it, and this grid point is trained again") if path.is_file() else None


def _keep(directory: Path, result: dict[str, Any]) -> None:
    """The result first, whole or not at all; then its checkpoints may go."""
    replace_file(directory / "cell.json", json.dumps(result, indent=1))
    for checkpoint in directory.glob("step-*"):
        shutil.rmtree(checkpoint)
