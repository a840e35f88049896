"""How big and how fast: parameters, megabytes, and sentences per second beside the other models of the same command.

In: encoders. Out: per model its size, its speed at every (batch, length), and that speed divided by the first model's.
The models take turns, so that a machine which slows down for a while slows all of them. Used by `pipeline evaluate`.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from tqdm import tqdm

from pipeline.errors import UserError
from pipeline.evaluation.encoder import Encoder
from pipeline.recipe.ranges import LARGEST_BATCH, LONGEST_ROW, check_ranges


@dataclass
class SpeedConfig:
    """Which shapes are timed, and for how long."""

    batches: list[int] = field(default_factory=lambda: [1, 32])
    lengths: list[int] = field(default_factory=lambda: [16, 128, 512])  # tokens per sentence
    rounds: int = 3  # the median of so many turns counts
    seconds_per_turn: float = 0.5  # a turn is as many forwards as begin within this time

    def __post_init__(self) -> None:
        if not self.batches or not self.lengths or min(self.batches) < 1 or min(self.lengths) < 3 or self.rounds < 1:
            raise UserError("speed needs batches of at least 1, lengths of at least 3 tokens and at least 1 round")
        limits = {"batches": (1, LARGEST_BATCH), "lengths": (3, LONGEST_ROW), "rounds": (1, 10**6)}
        check_ranges(self, "speed", {**limits, "seconds_per_turn": (0, 86400)})


def evaluate_speed(encoders: list[Encoder], config: SpeedConfig) -> dict[str, dict[str, Any]]:
    """Size and speed per model, by the models' names."""
    shapes = [(batch, length) for length in config.lengths for batch in config.batches]
    speeds: dict[str, dict[str, float]] = {encoder.name: {} for encoder in encoders}
    bar = tqdm(total=len(shapes) * config.rounds * len(encoders), desc="timing", unit="turn", disable=None)
    for batch, length in shapes:
        for encoder in encoders:
            check_length(encoder, length)
        forwards = [forward_of(encoder, batch, length) for encoder in encoders]
        turns: list[list[float]] = [[] for _ in encoders]
        for _ in range(config.rounds):
            for number, forward in enumerate(forwards):
                turns[number].append(batch / seconds_per_call(forward, config.seconds_per_turn))
                bar.update()
        for encoder, measured in zip(encoders, turns, strict=True):
            speeds[encoder.name][f"{batch}x{length}"] = statistics.median(measured)
    bar.close()
    first = speeds[encoders[0].name]
    return {
        encoder.name: {
            **size_of(encoder),
            "sentences_per_second": {shape: round(value, 2) for shape, value in speeds[encoder.name].items()},
            "times_first": {shape: round(value / first[shape], 3) for shape, value in speeds[encoder.name].items()},
            "device": str(encoder.device),
            "threads": torch.get_num_threads(),
        }
        for encoder in encoders
    }


def check_length(encoder: Encoder, length: int) -> None:
    """A `UserError` where the model has too few positions for a length."""
    longest = encoder.max_positions
    if length > longest:
        raise UserError(
            f"{encoder.name} takes at most {longest} tokens, speed.lengths asks for {length}. "
            f"Leave it out: --set speed.lengths=[...]"
        )


def size_of(encoder: Encoder) -> dict[str, Any]:
    """Parameters in all and without word embeddings, and megabytes of the weights as they are loaded."""
    parameters = list(encoder.model.parameters())
    total = sum(parameter.numel() for parameter in parameters)
    return {
        "parameters": total,
        "parameters_without_word_embeddings": total - encoder.model.get_input_embeddings().weight.numel(),
        "megabytes": round(sum(p.numel() * p.element_size() for p in parameters) / 1e6, 1),
    }


def forward_of(encoder: Encoder, batch: int, length: int) -> Callable[[], None]:
    """One forward over random token ids without padding; returns when the device has finished."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(4, len(encoder.tokenizer), (batch, length), generator=generator).to(encoder.device)

    def forward() -> None:
        with torch.inference_mode():
            encoder.model(input_ids=ids)
        if ids.is_cuda:
            torch.cuda.synchronize(ids.device)

    forward()  # the first call pays for allocations
    return forward


def seconds_per_call(forward: Callable[[], None], seconds: float) -> float:
    """Mean duration over as many calls as begin within `seconds`, at least one."""
    calls, started = 0, time.perf_counter()
    while calls == 0 or time.perf_counter() - started < seconds:
        forward()
        calls += 1
    return (time.perf_counter() - started) / calls


def speed_table(results: dict[str, dict[str, Any]]) -> str:
    """One row per model: size, then sentences/s at every batch x length, with the ratio to the first model."""
    shapes = list(next(iter(results.values()))["sentences_per_second"])
    width = max(len("model"), *map(len, results))
    lines = ["speed: sentences per second at batch x tokens (and times the first model)"]
    lines.append(f"{'model':<{width}}  {'M param':>8}{'MB':>8}" + "".join(f"{shape:>17}" for shape in shapes))
    for name, result in results.items():
        cells = "".join(
            f"{result['sentences_per_second'][shape]:>9.1f} ({result['times_first'][shape]:.2f}x)" for shape in shapes
        )
        lines.append(f"{name:<{width}}  {result['parameters'] / 1e6:>8.1f}{result['megabytes']:>8.0f}{cells}")
    return "\n".join(lines)
