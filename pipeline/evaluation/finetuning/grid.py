"""Runs a fine-tuning grid for one encoder, selects a learning rate, and keeps the finished grid points.

In: a task, settings, a directory. Out: the test scores of the learning rate whose best epoch has the highest mean over
ALL development languages. A finished grid point leaves `grid_point.json` and is not run again while encoder, data and
settings are the same; one that was killed resumes from its last epoch.
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
from pipeline.errors import UserError
from pipeline.evaluation.encoder import Encoder
from pipeline.evaluation.finetuning.loop import FinetuneConfig, FinetuneTask, GridPoint, Scores, finetune, mean_of
from pipeline.evaluation.finetuning.precision import forward_precision
from pipeline.evaluation.finetuning.split_data import SplitData
from pipeline.evaluation.languages import choose_languages, languages_option
from pipeline.evaluation.task import Results
from pipeline.provenance import fingerprint
from pipeline.runtime.dist import Launch
from pipeline.runtime.json_files import read_json

# Settings that do not change the result of one grid point. micro_batch does: dropout draws a mask per micro-batch.
NO_EFFECT = ("learning_rates", "seeds")
RESULT_FILE, OLD_RESULT_FILE = "grid_point.json", "cell.json"  # the second one is read, never written


def run_grids(
    encoders: list[Encoder],
    data: SplitData,
    make_task: Callable[[Encoder, Any, Any, Launch], FinetuneTask],
    config: FinetuneConfig,
    directory: Path,
    ranks: Launch,
) -> Results:
    """Run one grid per encoder, in the languages that all encoders were trained on or that the settings name.

    Args:
        make_task: called with encoder, data, settings and ranks

    Returns:
        the results by the encoder's name

    Raises:
        UserError: no language is left, or `max_length` is too long for one of the encoders
    """
    setting = f"{config.name}.languages"
    languages = choose_languages(list(data.test), config.languages, encoders, setting, data.unit)
    have_dev = list(data.dev)
    data = data.only(languages.chosen)
    if not data.dev:
        more = f": {languages_option(setting, [*languages.chosen, have_dev[0]])}" if have_dev else f" to {setting}"
        raise UserError(
            f"none of the languages {', '.join(languages.chosen)} has development examples, which choose the epoch. Add one that "
            f"has{more}"
        )
    for encoder in encoders:
        encoder.check_max_length(config.max_length, f"{config.name}.max_length")
    results = {}
    for encoder in encoders:
        make = functools.partial(make_task, encoder, data, config, ranks)
        grid = run_grid(make, encoder, data.fingerprint(), config, directory, ranks)
        results[encoder.name] = {**grid, **data.about(), **languages.about()}
    return results


def run_grid(
    make_task: Callable[[], FinetuneTask],
    encoder: Encoder,
    data_fingerprint: str,
    config: FinetuneConfig,
    directory: Path,
    ranks: Launch,
) -> dict[str, Any]:
    """Run all grid points of one encoder. `make_task` tokenizes, so it is called only if a grid point is missing."""
    settings = {key: value for key, value in dataclasses.asdict(config).items() if key not in NO_EFFECT}
    identity = fingerprint([settings, data_fingerprint, encoder.content])
    grid_directory = directory / f"{re.sub(r'[^A-Za-z0-9.-]+', '_', encoder.name).strip('_')[-60:]}-{identity[:8]}"
    task: FinetuneTask | None = None
    results = []
    for point in [GridPoint(rate, seed) for rate in config.learning_rates for seed in config.seeds]:
        place = grid_directory / str(point)
        result = ranks.from_main(_finished(place) if ranks.is_main else None)
        if result is None:
            if task is None:
                task = make_task()
                precision = forward_precision(config.precision, config.name, encoder.device)
                if ranks.is_main:
                    print(f"{encoder.name}: fine-tuning computes in {precision}", flush=True)
            drawing = [encoder.device] if encoder.device.type == "cuda" else []  # torch warns if all GPUs' are forked
            with torch.random.fork_rng(drawing):  # a grid point seeds torch; later tasks must not depend on that
                result = finetune(task, config, point, place, ranks, encoder.name)
            if ranks.is_main:
                _keep(place, result)
        elif ranks.is_main:
            print(f"{encoder.name} {point}: finished before, kept ({place})", flush=True)
        ranks.barrier()
        results.append(result)
    return choose(results)


def choose(points: list[dict[str, Any]]) -> dict[str, Any]:
    """Select the learning rate with the best development mean over its seeds.

    Args:
        points: results of all grid points

    Returns:
        test scores as means over the seeds of that rate, how it was selected, and in `cells` the results of all grid
        points (the key is part of the format of evaluation.json)
    """
    rates = list(dict.fromkeys(point["learning_rate"] for point in points))
    of_rate = {rate: [point for point in points if point["learning_rate"] == rate] for rate in rates}
    best = max(rates, key=lambda rate: sum(point["dev_mean"] for point in of_rate[rate]) / len(of_rate[rate]))
    chosen = of_rate[best]
    test = _mean_scores([point["test"] for point in chosen])
    measures = list(next(iter(test.values())))
    return {
        "test": test,
        "mean": {name: sum(scores[name] for scores in test.values()) / len(test) for name in measures},
        "dev_mean": sum(point["dev_mean"] for point in chosen) / len(chosen),
        "learning_rate": best,
        "best_epochs": [point["best_epoch"] for point in chosen],
        "test_mean_of_each_seed": {str(point["seed"]): mean_of(point["test"]) for point in chosen},
        "cells": points,
        **points[0].get("about", {}),
    }


def _mean_scores(runs: list[Scores]) -> Scores:
    return {
        language: {name: sum(run[language][name] for run in runs) / len(runs) for name in measures}
        for language, measures in runs[0].items()
    }


def _finished(directory: Path) -> dict[str, Any] | None:
    for path in (directory / RESULT_FILE, directory / OLD_RESULT_FILE):
        if path.is_file():
            return read_json(path, advice="Delete it to train this grid point again")
    return None


def _keep(directory: Path, result: dict[str, Any]) -> None:
    """Write the result, then delete the checkpoints of the grid point."""
    replace_file(directory / RESULT_FILE, json.dumps(result, indent=1))
    for checkpoint in directory.glob("step-*"):
        shutil.rmtree(checkpoint)
