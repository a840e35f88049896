"""Size and speed: parameters, megabytes, and sentences per second compared with the other models of the same command.

In: encoders. Out: per model its size, its speed at every (batch, length), and that speed divided by the first model's.
The models are timed in turns, so a machine that slows down for a while slows all of them.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from data_prep.progress import Progress
from pipeline.distillation.models.loading import count_parameters
from pipeline.errors import UserError
from pipeline.evaluation.encoder import Encoder
from pipeline.evaluation.tables import markdown_table
from pipeline.evaluation.task import NAME_LENGTH, Panel, Results, Task
from pipeline.recipe.ranges import LARGEST_BATCH, LONGEST_ROW, check_ranges
from pipeline.runtime.text_tables import text_table


@dataclass
class SpeedConfig:
    """Which shapes are timed, and for how long."""

    batches: list[int] = field(default_factory=lambda: [1, 32])  # sentences per forward
    lengths: list[int] = field(default_factory=lambda: [16, 128, 512])  # tokens per sentence
    rounds: int = 3  # turns per model and shape; the median is the result
    seconds_per_turn: float = 0.5  # a turn runs as many forwards as start within this time

    def __post_init__(self) -> None:
        if not self.batches or not self.lengths:
            raise UserError("speed.batches and speed.lengths need at least one entry")
        limits = {"batches": (1, LARGEST_BATCH), "lengths": (3, LONGEST_ROW), "rounds": (1, 10**6)}
        check_ranges(self, "speed", {**limits, "seconds_per_turn": (0, 86400)})


def evaluate_speed(encoders: list[Encoder], config: SpeedConfig) -> dict[str, dict[str, Any]]:
    """Size and speed per model, by the models' names."""
    for encoder in encoders:
        check_lengths(encoder, config.lengths)
    shapes = [(batch, length) for length in config.lengths for batch in config.batches]
    speeds: dict[str, dict[str, float]] = {encoder.name: {} for encoder in encoders}
    bar = Progress("timing", len(shapes) * config.rounds * len(encoders), "turn")
    for batch, length in shapes:
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


def check_lengths(encoder: Encoder, lengths: Sequence[int]) -> None:
    """Raise a `UserError` where the model has fewer positions than one of the lengths."""
    longest = encoder.max_positions
    if max(lengths, default=0) > longest:
        fit = [length for length in lengths if length <= longest] or [longest]
        raise UserError(
            f"{encoder.name} accepts at most {longest} tokens, speed.lengths has {max(lengths)}. "
            f"Leave it out: --set 'speed.lengths={fit}'"
        )


def size_of(encoder: Encoder) -> dict[str, Any]:
    """Number of parameters with and without word embeddings, and megabytes of the weights as loaded."""
    parameters = list(encoder.model.parameters())
    total = count_parameters(encoder.model)
    return {
        "parameters": total,
        "parameters_without_word_embeddings": total - encoder.model.get_input_embeddings().weight.numel(),
        "megabytes": round(sum(p.numel() * p.element_size() for p in parameters) / 1e6, 1),
    }


def forward_of(encoder: Encoder, batch: int, length: int) -> Callable[[], None]:
    """A function that runs one forward over random token ids without padding and returns when the device has finished."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(4, len(encoder.tokenizer), (batch, length), generator=generator).to(encoder.device)

    def forward() -> None:
        with torch.inference_mode():
            encoder.model(input_ids=ids)
        if ids.is_cuda:
            torch.cuda.synchronize(ids.device)

    forward()  # the first call allocates memory, so it is not timed
    return forward


def seconds_per_call(forward: Callable[[], None], seconds: float) -> float:
    """Mean duration of the calls that start within `seconds`, at least one."""
    calls, started = 0, time.perf_counter()
    while calls == 0 or time.perf_counter() - started < seconds:
        forward()
        calls += 1
    return (time.perf_counter() - started) / calls


def speed_table(results: Results) -> str:
    """One row per model: size, then sentences/s at every batch x length, with the ratio to the first model."""
    shapes, rows = _rows(results, lambda speed, ratio: f"{speed:.1f} ({ratio:.2f}x)")
    title = "speed: sentences per second at batch x tokens (and times the first model)"
    return text_table(title, ["model", "M param", "MB", *shapes], rows, [">10", ">8", *[">17"] * len(shapes)])


def _card(results: Results) -> str:
    shapes, rows = _rows(results, lambda speed, ratio: f"{ratio:.2f}x")
    return markdown_table(["model; speed as times the first at batch x tokens", "M parameters", "MB", *shapes], rows)


def _rows(results: Results, text_of: Callable[[float, float], str]) -> tuple[list[str], list[list[str]]]:
    """The shapes; and rows of model, size and, for each shape, the text of its speed and of the ratio to the first model."""
    shapes = list(next(iter(results.values()))["sentences_per_second"])
    rows = [
        [name, f"{result['parameters'] / 1e6:.1f}", f"{result['megabytes']:.0f}"]
        + [text_of(result["sentences_per_second"][x], result["times_first"][x]) for x in shapes]
        for name, result in results.items()
    ]
    return shapes, rows


def _panels(results: Results) -> list[Panel]:
    first = next(iter(results))
    return [
        Panel(f"sentences per second, times {first[-NAME_LENGTH:]}", {m: r["times_first"] for m, r in results.items()}),
        Panel("megabytes of weights", {model: {"": result["megabytes"]} for model, result in results.items()}),
    ]


TASK = Task(
    name="speed",
    settings=SpeedConfig,
    evaluate=lambda encoders, settings, ranks, directory: evaluate_speed(encoders, settings),
    table=speed_table,
    panels=_panels,
    card=_card,
    place=60,
)
