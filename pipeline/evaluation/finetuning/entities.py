"""Named entities in sequences of tags: seqeval's default rules, the scheme of a file, and F1.

In: tags such as `B-PER`, `I-PER`, `O`. Out: entities (type, first word, last word), IOB2 tags, and the counts behind
precision, recall and F1. seqeval 1.2.2 without `scheme` gives the same entities; so does conlleval.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

OUTSIDE = "O"
BILOU = {"L": "E", "U": "S"}  # last and unit are other letters for end and single
PREFIXES = ("B", "I", "E", "S", *BILOU)
SCHEMES = ("IOB2", "IOB1", "BIOES")
Entity = tuple[str, int, int]


def split_tag(tag: str) -> tuple[str, str] | None:
    """Prefix and type of a tag, `("O", "")` for `O`; None where it is no tag. BILOU's L and U become E and S."""
    if tag == OUTSIDE:
        return OUTSIDE, ""
    prefix, dash, kind = tag.partition("-")
    if not dash or not kind or prefix not in PREFIXES:
        return None
    return BILOU.get(prefix, prefix), kind


def entities(tags: Iterable[tuple[str, str]]) -> list[Entity]:
    """The entities of one sentence. An `I-` or `E-` that continues no entity of its type begins one.

    Args:
        tags: as `split_tag` returns them
    """
    found: list[Entity] = []
    before, kind_before, first = OUTSIDE, "", 0
    for number, (prefix, kind) in enumerate([*tags, (OUTSIDE, "")]):
        ends = before in ("E", "S") or prefix in ("B", "S", OUTSIDE) or kind != kind_before
        if before != OUTSIDE and ends:
            found.append((kind_before, first, number - 1))
        if prefix != OUTSIDE and (ends or before == OUTSIDE):
            first = number
        before, kind_before = prefix, kind
    return found


def iob2(found: Iterable[Entity], num_words: int) -> list[str]:
    """The tags of these entities in IOB2: the first word has `B-`, the others `I-`."""
    tags = [OUTSIDE] * num_words
    for kind, first, last in found:
        tags[first : last + 1] = [f"B-{kind}", *[f"I-{kind}"] * (last - first)]
    return tags


def contradictions(tags: Sequence[tuple[str, str]]) -> list[tuple[str, int]]:
    """Each scheme that these tags of one sentence do not follow, with the number of the first word that shows it."""
    found: dict[str, int] = {}
    before, kind_before = OUTSIDE, ""
    for number, (prefix, kind) in enumerate(tags):
        continues = before != OUTSIDE and kind == kind_before
        is_open = before in ("B", "I")  # in BIOES an entity must end with E
        follows = {
            "IOB2": prefix in (OUTSIDE, "B") or (prefix == "I" and continues),
            "IOB1": prefix in (OUTSIDE, "I") or (prefix == "B" and continues),
            "BIOES": (is_open and continues) if prefix in ("I", "E") else not is_open,
        }
        for scheme, fine in follows.items():
            if not fine:
                found.setdefault(scheme, number)
        before, kind_before = prefix, kind
    if before in ("B", "I"):
        found.setdefault("BIOES", len(tags) - 1)
    return list(found.items())


def entity_counts(truth: Sequence[str], guess: Sequence[str]) -> tuple[int, int, int]:
    """Of one sentence: entities that are correct in type and limits, entities of the truth, entities of the guess."""
    true, guessed = (set(entities(map(checked_tag, tags))) for tags in (truth, guess))
    return len(true & guessed), len(true), len(guessed)


def checked_tag(tag: str) -> tuple[str, str]:
    """As `split_tag`, for tags that were checked when they were read."""
    split = split_tag(tag)
    assert split is not None, tag
    return split


def f1_of(correct: float, true: float, guessed: float) -> dict[str, float]:
    """F1, precision and recall in per cent over all entities (seqeval's `micro`). A share of nothing is 0."""
    precision, recall = (correct / count if count else 0.0 for count in (guessed, true))
    f1 = 2 * precision * recall / (precision + recall) if correct else 0.0
    return {"f1": 100 * f1, "precision": 100 * precision, "recall": 100 * recall}
