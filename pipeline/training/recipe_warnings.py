"""Warnings about settings that are valid, but have an effect that most users do not expect.

In: a recipe, and the rows of its shards. Out: lines that training, dry run and doctor print once, before the first step.
Each line says what will happen, and names the setting that changes it.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator

from transformers import PretrainedConfig

from pipeline.config import Recipe
from pipeline.data.batches import BatchSource
from pipeline.distillation.config import RelationsConfig
from pipeline.distillation.models.architectures import ARCHITECTURES, window_of
from pipeline.distillation.models.student import student_hf_config
from pipeline.distillation.models.student_init import copied_layers
from pipeline.distillation.tail import POOLED
from pipeline.distillation.tap import layer_numbers
from pipeline.runtime.optimizer import OptimizerConfig, learning_rate

SMALLEST_USEFUL_RATE = (
    1e-9  # Adam changes a weight by about the rate; less is rounded away from a weight of 0.02 in fp32
)
LONG_RUN_STEPS = 1000  # a shorter run is cheap to repeat
MANY_EPOCHS = 100.0
NAMED = 6  # languages that are named in one line


def recipe_warnings(recipe: Recipe, source: BatchSource) -> list[str]:
    """All warnings about this recipe on these shards."""
    return [
        *_schedule(recipe),
        *_saving(recipe),
        *_unused(recipe),
        *_held_out(recipe, source),
        *_mixing(recipe, source),
    ]


def _schedule(recipe: Recipe) -> Iterator[str]:
    optimizer, steps = recipe.optimizer, recipe.steps
    if optimizer.warmup_steps >= steps > 1:
        yield (
            f"optimizer.warmup_steps is {optimizer.warmup_steps} and the run has {steps} steps: the learning rate is still "
            f"rising at the end, at {learning_rate(optimizer, steps - 1, steps):.2e} instead of {optimizer.lr:.2e}. For a "
            f"warm-up of a tenth of the run: --set optimizer.warmup_steps={steps // 10}"
        )
    if optimizer.lr < SMALLEST_USEFUL_RATE:
        yield f"optimizer.lr is {optimizer.lr:.2e}: the weights would hardly move. The papers use 1e-4 to 6e-4"


def _saving(recipe: Recipe) -> Iterator[str]:
    steps, every, milestone = recipe.steps, recipe.save_every, recipe.checkpoint.keep_every
    if every > steps > LONG_RUN_STEPS:
        yield (
            f"save_every is {every} and the run has {steps} steps: the only checkpoint is the last one, and a crash before "
            f"it loses everything. For ten checkpoints: --set save_every={steps // 10}"
        )
    if milestone is None:
        return
    really = math.lcm(every, milestone)
    if really > steps:
        yield (
            f"checkpoint.keep_every is {milestone}, and no checkpoint of this run is at a multiple of it (save_every is "
            f"{every}, steps {steps}): no milestone is kept but the last step"
        )
    elif really != milestone:
        yield (
            f"checkpoint.keep_every is {milestone}, which is not a multiple of save_every ({every}): milestones are kept "
            f"every {really} steps"
        )


def _unused(recipe: Recipe) -> Iterator[str]:
    if recipe.language_weights is not None:
        changed = [name for name in ("alpha", "sampling_unit") if getattr(recipe, name) != getattr(Recipe, name)]
        if changed:
            yield f"language_weights decides how languages are mixed: {' and '.join(changed)} of this recipe has no effect"
    relations, other = recipe.relations, RelationsConfig()
    if POOLED not in relations.tail_terms:
        keys = ("pooled_weight", "pooling", "pooled_distance", "pooled_temperature")
        if changed := [f"relations.{key}" for key in keys if getattr(relations, key) != getattr(other, key)]:
            yield f"relations.tail is {relations.tail}, without `pooled`: {' and '.join(changed)} of this recipe has no effect"
    elif relations.pooled_distance != "similarity" and relations.pooled_temperature != other.pooled_temperature:
        yield f"relations.pooled_distance is {relations.pooled_distance}: relations.pooled_temperature has no effect"
    optimizer = recipe.optimizer
    if optimizer.decay != "wsd" and optimizer.decay_share != OptimizerConfig().decay_share:
        yield f"optimizer.decay is {optimizer.decay}: optimizer.decay_share has no effect, it belongs to `decay: wsd`"


def _held_out(recipe: Recipe, source: BatchSource) -> Iterator[str]:
    kept = dict(zip(source.languages, source.heldout_counts, strict=True))
    fewer = {name: count for name, count in kept.items() if count < recipe.heldout_rows}
    if fewer:
        named = _named({name: f"{count} of {source.rows_per_language[name]} rows" for name, count in fewer.items()})
        yield (
            f"held out is at most a tenth of a language: {len(fewer)} of {len(kept)} languages have fewer than the "
            f"{recipe.heldout_rows} rows of heldout_rows ({named}), so their held-out losses are less certain"
        )


def _mixing(recipe: Recipe, source: BatchSource) -> Iterator[str]:
    samples = recipe.steps * recipe.global_batch
    shares, uncapped = source.shares, source.uncapped_shares
    lowered = {name: f"{uncapped[name]:.1%} to {shares[name]:.1%}" for name in shares if shares[name] < uncapped[name]}
    if lowered:
        yield f"max_epochs {recipe.max_epochs:g} lowers the share of {len(lowered)} languages ({_named(lowered)})"
    absent = {name: f"{share:.2e} of the rows" for name, share in shares.items() if share * samples < 1}
    if absent:
        kept = shlex.quote(f"languages=[{','.join(name for name in shares if name not in absent)}]")
        leave_out = f", or leave them out (--set {kept})" if len(absent) < len(shares) else ""
        yield (
            f"{len(absent)} languages may not occur in the {samples} rows of this run ({_named(absent)}). Raise steps, or lower "
            f"alpha{leave_out}"
        )
    epochs = {name: shares[name] * samples / (source.rows_per_language[name] - source.heldout_counts[i])
              for i, name in enumerate(source.languages)}  # fmt: skip
    often = sorted((name for name in epochs if epochs[name] > MANY_EPOCHS), key=lambda name: -epochs[name])
    if often:
        yield (
            f"{len(often)} languages are read more than {MANY_EPOCHS:.0f} times "
            f"({_named({name: f'{epochs[name]:.0f} times' for name in often})}). A cap: --set max_epochs={MANY_EPOCHS:.0f}"
        )


def _named(facts: dict[str, str]) -> str:
    """`sw 1.0 %, hi 2.0 % and 5 more`."""
    listed = [f"{name} {fact}" for name, fact in list(facts.items())[:NAMED]]
    more = f" and {len(facts) - NAMED} more" if len(facts) > NAMED else ""
    return ", ".join(listed) + more


def window_warnings(recipe: Recipe, teacher: PretrainedConfig) -> list[str]:
    """Warnings about distilled layers whose attention has a window: what such a layer sees, and which layers see all."""
    relations, shape = recipe.relations, recipe.student
    of_teacher = relations.teacher_taps or teacher.num_hidden_layers
    warnings = _windows_of("teacher", teacher, of_teacher, recipe)
    architecture = ARCHITECTURES.get(shape.family or teacher.model_type)
    if architecture and architecture.masks_by_layer_type and shape.start_encoder is None:
        highest = max(layer_numbers(of_teacher))
        chosen = copied_layers(teacher.num_hidden_layers, shape.layers, shape.init_layers, highest)
        student = student_hf_config(teacher, shape, chosen)
        warnings += _windows_of("student", student, relations.student_taps or shape.layers, recipe)
    return warnings


def _windows_of(role: str, config: PretrainedConfig, read: int | list[int], recipe: Recipe) -> list[str]:
    windows = {number: window_of(config, number) for number in range(1, config.num_hidden_layers + 1)}
    complete = ", ".join(str(number) for number, window in windows.items() if window is None) or "none"
    part = "document" if recipe.documents == "separate" else "row"
    return [
        f"layer {number} of the {role} is distilled, and its attention has a window: a token sees {windows[number]} tokens to "
        f"either side. The relations match all pairs of tokens of a {part}, also those farther apart, whose queries and keys "
        f"this layer never compares. Layers of the {role} that see all tokens: {complete} (`relations.{role}_layer`)"
        for number in layer_numbers(read)
        if windows.get(number) is not None
    ]
