"""The recipe's `relations`: which layers and which relations of teacher and student are matched, and with which weights.

In: the values of the recipe. Out: a checked `RelationsConfig`, or a `UserError` that names the key and the value.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from pipeline.distillation.relations.loss import check_backend
from pipeline.errors import UserError
from pipeline.recipe.ranges import LARGEST_WEIGHT, check_ranges

LETTERS = "qkv"
SOFTMAX_TEMPERATURES = (1e-3, 1e3)  # below, a softmax over cosines is one-hot in fp32


@dataclass
class LayerPair:
    """One teacher layer matched by one student layer, both counted from 1."""

    teacher: int  # the teacher's layer
    student: int  # the student's layer
    weight: float = 1.0  # of this pair's losses in the sum


@dataclass
class RelationsConfig:
    """Which relations of which layers are matched."""

    teacher_layer: int | None = None  # counted from 1; None: the last
    student_layer: int | None = None  # counted from 1; None: the last
    layers: list[LayerPair] | None = None  # several pairs instead of the two keys above
    heads: int = 48  # relation heads; must divide both widths
    pairs: dict[str, float] = field(default_factory=lambda: {"q-q": 1.0, "k-k": 1.0, "v-v": 1.0})  # pair: weight
    after_rotary: bool = False  # ModernBERT: read Q and K behind their rotary embedding
    tail: Literal["none", "relation", "mse", "pooled", "mse+pooled"] = "none"  # terms for the student's output
    tail_weight: float = 1.0  # of that term in the sum
    pooled_weight: float | None = None  # of the term `pooled`; None: tail_weight
    pooling: Literal["auto", "mean", "cls", "last"] = "auto"  # of sentence vectors; auto: the teacher's, else mean
    pooled_distance: Literal["cosine", "mse", "similarity"] = "cosine"  # similarity: KL of the sentences' similarities
    pooled_temperature: float = 0.05  # of the softmax over these similarities
    backend: str = "auto"  # auto: checked and timed at the first batch; or a name of relations.BACKENDS

    def __post_init__(self) -> None:
        known = [f"{a}-{b}" for a in LETTERS for b in LETTERS]
        for pair in self.pairs:
            if pair not in known:
                raise UserError(f"`relations.pairs` names {pair!r}; a relation is one of {', '.join(known)}")
        weight = (0, LARGEST_WEIGHT)
        limits = {"heads": (1, 2**16), "pairs": weight, "tail_weight": weight, "pooled_weight": weight}
        check_ranges(self, "relations", {**limits, "pooled_temperature": SOFTMAX_TEMPERATURES})
        for number, both in enumerate(self.layers or []):
            check_ranges(both, f"relations.layers[{number}]", {"weight": weight})
        _check_weights("relations.pairs", list(self.pairs.values()))
        if self.layers:
            _check_weights("relations.layers", [pair.weight for pair in self.layers])
        check_backend(self.backend)
        if self.layers is not None and (not self.layers or self.teacher_layer or self.student_layer):
            raise UserError(
                "`relations.layers` needs at least one pair, and excludes `relations.teacher_layer` and "
                "`relations.student_layer`"
            )
        matched = [(pair.teacher, pair.student) for pair in self.layers or []]
        if len(set(matched)) < len(matched):
            raise UserError("`relations.layers` names the same two layers twice; give them one weight")

    @property
    def teacher_taps(self) -> int | list[int] | None:
        """The teacher's layer or layers, as `load_teacher` expects them."""
        return self.teacher_layer if self.layers is None else [pair.teacher for pair in self.layers]

    @property
    def student_taps(self) -> int | list[int] | None:
        """The student's layer or layers, as `tap` expects them."""
        return self.student_layer if self.layers is None else [pair.student for pair in self.layers]

    @property
    def tail_terms(self) -> list[str]:
        """The terms for the output: of "relation", "mse", "pooled"."""
        return [] if self.tail == "none" else self.tail.split("+")

    @property
    def compares_sentences(self) -> bool:
        """Whether sentence vectors are compared one by one, so that both models' must have one width."""
        return "pooled" in self.tail_terms and self.pooled_distance != "similarity"

    @property
    def tap_options(self) -> dict[str, bool]:
        """The other options of `tap`, the same for teacher and student."""
        return {"with_output": self.tail != "none", "after_rotary": self.after_rotary}


def _check_weights(key: str, weights: list[float]) -> None:
    """Raise a `UserError` if no weight is above zero: the loss would be constant."""
    if not any(weights):
        raise UserError(f"`{key}` has the weights {weights}; at least one must be above zero")
