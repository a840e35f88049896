"""Which languages a task is measured in: by default those that every student was trained on and has the vocabulary for; and which ones are left out.

In: the languages that a task has data of, those that the user named, the encoders with their lineages. Out: the chosen
ones, and for every other one why it is not in the table. Used by all tasks that have languages, the card and the report.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.errors import UserError
from pipeline.evaluation.encoder import Encoder
from pipeline.evaluation.tatoeba import SHORT_CODES
from pipeline.evaluation.training_metadata import languages_of

OTHER_SCRIPTS = ("rom", "roman", "zaw")  # CC-100's hi_rom, ur_roman, my_zaw: not what hi, ur and my are tested in
NORWEGIAN = ("nb", "nn")  # CC-100's `no` holds both


@dataclass(frozen=True)
class Languages:
    """`left_out`: language -> reason."""

    chosen: list[str]
    left_out: dict[str, str]


def choose_languages(
    available: Sequence[str], named: Sequence[str] | None, encoders: Sequence[Encoder], setting: str, data: str
) -> Languages:
    """`named` as they are; else those of `available` that every encoder with a lineage was trained on.

    `setting` is the key that names others, `data` what there is none of in languages that are left out ("pairs").
    """
    trained = {encoder.name: found for encoder in encoders if (found := languages_of(encoder.path))}
    left_out: dict[str, str] = {}
    for language in available:
        if named:
            if language not in named:
                left_out[language] = f"not in {setting}"
        elif strangers := [name for name, known in trained.items() if not covers(known, language)]:
            left_out[language] = f"not a language of {', '.join(strangers)}"
    chosen = list(named or [language for language in available if language not in left_out])
    if not chosen:
        raise UserError(
            f"none of the languages {', '.join(available)} is one that all of {', '.join(trained)} were trained on and have the vocabulary for. To measure one all "
            f"the same: --set '{setting}=[{available[0]}]'"
        )
    for language in dict.fromkeys(language for known in trained.values() for language in known):
        if not any(covers([language], other) for other in [*available, *chosen]):
            left_out[language] = f"trained, but no {data}"
    return Languages(chosen, left_out)


def covers(trained: Iterable[str], language: str) -> bool:
    """Whether one of the languages of a training is this one, whichever code names it (zh, zh-Hans, cmn)."""
    return bool({form for known in trained for form in _forms(known)} & _forms(language))


def _forms(language: str) -> set[str]:
    """A language's own name and its main code."""
    code = SHORT_CODES.get(language, language)
    main, _, rest = code.replace("_", "-").partition("-")
    if rest.lower() in OTHER_SCRIPTS:
        return {code}
    main = main.lower()
    return {code, "no" if main in NORWEGIAN else main}


def left_out_line(results: Mapping[str, Mapping[str, Any]]) -> str:
    """One line for below a table: the languages that no model was measured in, by reason; empty if there are none."""
    reasons: dict[str, list[str]] = {}
    for language, reason in {
        x: y for result in results.values() for x, y in result.get("left_out", {}).items()
    }.items():
        reasons.setdefault(reason, []).append(language)
    parts = [f"{', '.join(languages)} ({reason})" for reason, languages in reasons.items()]
    return f"languages left out: {'; '.join(parts)}" if parts else ""
