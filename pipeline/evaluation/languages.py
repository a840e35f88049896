"""Chooses the languages that a task is measured in: by default those that every student was trained on and has the vocabulary for.

In: the languages that a task has data of, those that the user named, the encoders with their lineages. Out: the chosen
languages, those of them that are new to a student, and for every other language the reason why it is not in the table.
"""

from __future__ import annotations

import shlex
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.errors import UserError
from pipeline.evaluation.encoder import Encoder
from pipeline.evaluation.tatoeba import SHORT_CODES
from pipeline.evaluation.training_metadata import languages_of

OTHER_SCRIPTS = (
    "rom",
    "roman",
    "zaw",
)  # CC-100's hi_rom, ur_roman, my_zaw: tests of hi, ur and my are in other scripts
NORWEGIAN = ("nb", "nn")  # CC-100's `no` contains both


@dataclass(frozen=True)
class Languages:
    """The languages of a task. `left_out`: language -> reason. `untrained`: the chosen ones that a student was not trained on."""

    chosen: list[str]
    left_out: dict[str, str]
    untrained: list[str]

    def about(self) -> dict[str, Any]:
        """What the results keep, for `marked` and `language_notes`."""
        return {"left_out": self.left_out, "untrained": self.untrained}


def choose_languages(
    available: Sequence[str], named: Sequence[str] | None, encoders: Sequence[Encoder], setting: str, data: str
) -> Languages:
    """The named languages; without names, those of `available` that every encoder with a lineage was trained on.

    Args:
        available: languages that the task has data of
        setting: the key with which a user names languages, for messages
        data: what the task has no data of in the languages that are left out, for messages ("pairs")

    Raises:
        UserError: no language is left
    """
    trained = {encoder.name: found for encoder in encoders if (found := languages_of(encoder.path))}
    left_out: dict[str, str] = {}
    for language in available:
        if named:
            if language not in named:
                left_out[language] = f"not in {setting}"
        elif untrained_in := [name for name, known in trained.items() if not covers(known, language)]:
            left_out[language] = f"not a language of {', '.join(untrained_in)}"
    chosen = list(named or [language for language in available if language not in left_out])
    if not chosen:
        raise UserError(
            f"none of the languages {', '.join(available)} is one that all of {', '.join(trained)} were trained on and have "
            f"the vocabulary for. To measure one anyway: {languages_option(setting, available[:1])}"
        )
    for language in dict.fromkeys(language for known in trained.values() for language in known):
        if not any(covers([language], other) for other in [*available, *chosen]):
            left_out[language] = f"trained, but no {data}"
    untrained = [x for x in chosen if not all(covers(known, x) for known in trained.values())]
    return Languages(chosen, left_out, untrained)


def languages_option(setting: str, chosen: Iterable[str]) -> str:
    """The option that chooses languages, as it is pasted into a shell."""
    value = f"{setting}=[{', '.join(chosen)}]"
    return f"--set {shlex.quote(value)}"


def among(setting: str, asked: Iterable[str] | None, available: Collection[str]) -> str:
    """The end of a message about languages that a task does not have: the option with those asked for that it has.

    Without any of them, the option names all that it has; with none at all, it says to name other data.
    """
    chosen = [language for language in asked or () if language in available] or list(available)
    if not chosen:
        return "Name other data"
    return f"Choose among these: {languages_option(setting, chosen)}"


def covers(trained: Iterable[str], language: str) -> bool:
    """Whether the languages of a training include this one under any of its codes (zh, zh-Hans, cmn)."""
    return bool({form for known in trained for form in _forms(known)} & _forms(language))


def _forms(language: str) -> set[str]:
    """A language's full code and its main code."""
    code = SHORT_CODES.get(language, language)
    main, _, rest = code.replace("_", "-").partition("-")
    if rest.lower() in OTHER_SCRIPTS:
        return {code}
    main = main.lower()
    return {code, "no" if main in NORWEGIAN else main}


def marked(languages: Iterable[str], results: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The names of languages in the header of a table: with a star where a student was not trained on the language."""
    untrained = {language for result in results.values() for language in result.get("untrained", [])}
    return [f"{language}*" if language in untrained else language for language in languages]


def language_notes(results: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The lines below a table: what a star means, and the languages that were not measured, by reason."""
    star = "* a student was not trained on this language"
    notes = [star] if any(result.get("untrained") for result in results.values()) else []
    reasons: dict[str, list[str]] = {}
    for language, reason in {
        x: y for result in results.values() for x, y in result.get("left_out", {}).items()
    }.items():
        reasons.setdefault(reason, []).append(language)
    parts = [f"{', '.join(languages)} ({reason})" for reason, languages in reasons.items()]
    return [*notes, f"languages left out: {'; '.join(parts)}"] if parts else notes
