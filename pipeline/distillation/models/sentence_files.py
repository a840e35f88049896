"""How a teacher makes sentence vectors, from its sentence-transformers files: modules.json and the files that it names.

In: a directory or hub name, and `relations.pooling`. Out: `SentenceSettings`: pooling, normalisation, prefixes. A teacher
without these files has mean pooling and unit length. No code that the files name is loaded.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Literal, cast

from huggingface_hub import _CACHED_NO_EXIST, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

from pipeline.distillation.models.model_config import MOST_CONFIG_BYTES, ModelName, one_line
from pipeline.distillation.models.model_files import find_directory
from pipeline.errors import UserError

MODULES_FILE, PROMPTS_FILE = "modules.json", "config_sentence_transformers.json"
DENSE = "2_Dense"  # directory of an export's learned projection
Pooling = Literal["mean", "cls", "last"]
# Names of sentence-transformers for what is known here: in `pooling_mode`, and as earlier versions' keys.
MODES: dict[str, Pooling] = {"mean": "mean", "cls": "cls", "lasttoken": "last"}
EARLIER_KEYS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
SIMILARITIES = ("cosine", "dot", "euclidean", "manhattan")


@dataclass(frozen=True)
class SentenceSettings:
    """How sentence vectors are made from hidden states, as the run pools them and the export is used."""

    pooling: Pooling = "mean"
    normalize: bool = True  # to unit length
    prompts: dict[str, str] = field(default_factory=dict)  # name -> text that users put before theirs
    default_prompt: str | None = None  # the name of the one that is used where none is named
    include_prompt: bool = True  # whether the prompt's tokens are pooled too
    similarity: str = "cosine"  # with which vectors are compared

    def recorded(self) -> dict[str, Any]:
        """Pooling and normalisation, and what else is not the default: `SentenceSettings(**recorded)` is equal."""
        always = ("pooling", "normalize")
        values, plain = asdict(self), asdict(SentenceSettings())
        return {key: value for key, value in values.items() if key in always or value != plain[key]}


class UnknownSettingsError(UserError):
    """The files of a teacher do not say how it makes sentence vectors. `cause` is the message without the fix for a run."""

    def __init__(self, teacher: str, cause: str, fix: str) -> None:
        self.cause = f"the sentence vectors of the teacher {teacher!r} are not known: {cause}"
        super().__init__(f"{self.cause}. {fix}")


@dataclass(frozen=True)
class FoundSettings:
    """The settings, where they come from, and what the teacher does to its vectors that is not distilled.

    `modules`: the kinds that its modules.json lists, in their order; empty without that file.
    """

    settings: SentenceSettings
    origin: str
    warnings: Sequence[str] = ()
    modules: Sequence[str] = ()


def sentence_settings(teacher: str, pooling: str) -> FoundSettings:
    """The settings of a teacher.

    Args:
        pooling: `relations.pooling`; "auto": as the files say, and mean without files

    Raises:
        UserError: the files cannot be read, or name a pooling that is not known here and `pooling` is "auto"
    """
    files = _Files(teacher)
    asked = None if pooling == "auto" else cast(Pooling, pooling)
    modules = files.read(MODULES_FILE, list, is_needed=asked is None)
    if modules is None:
        origin = (
            f"`relations.pooling`; {teacher} has no {MODULES_FILE}" if asked else f"{teacher} has no {MODULES_FILE}"
        )
        return FoundSettings(SentenceSettings(asked or "mean"), origin)
    kinds, found, include_prompt = [], [], True
    for module in modules:
        kind, path = files.kind_and_path(module)
        kinds.append(kind)
        if kind == "Pooling":
            name = str(PurePosixPath(path) / "config.json")
            config = files.read(name, dict, is_needed=True)
            if config is None:
                raise files.error(f"its {MODULES_FILE} names {name}, which is missing", "Fetch the complete model")
            found += _modes(config)
            include_prompt = config.get("include_prompt") is not False
    own = MODES.get(found[0]) if len(found) == 1 else None
    if own is None and asked is None:
        raise files.error(
            f"its {MODULES_FILE} pools by {', '.join(map(str, found)) or 'no module of the kind Pooling'}, and sentence vectors are "
            "compared by mean, cls or last-token pooling",
            "Choose one: --set relations.pooling=mean (or cls, last)",
        )
    more = files.read(PROMPTS_FILE, dict) or {}
    prompts = more.get("prompts") or {}
    if not (isinstance(prompts, dict) and all(isinstance(text, str) for text in prompts.values())):
        raise files.error(f"`prompts` in {PROMPTS_FILE} is no object of texts", "Correct it, or remove the key")
    prompts = {name: text for name, text in prompts.items() if text}
    default, similarity = more.get("default_prompt_name"), more.get("similarity_fn_name")
    settings = SentenceSettings(
        asked or cast(Pooling, own),
        "Normalize" in kinds,
        prompts,
        default if default in prompts else None,
        include_prompt,
        similarity if similarity in SIMILARITIES else "cosine",
    )
    origin = "`relations.pooling`" if asked else f"the {MODULES_FILE} of {teacher}"
    return FoundSettings(settings, origin, _differences(kinds, found, own, asked), kinds)


def _differences(kinds: list[str], found: list[Any], own: str | None, asked: str | None) -> list[str]:
    """What the run does otherwise than the teacher's files say."""
    lines = []
    if asked is not None and asked != own:
        lines.append(
            f"relations.pooling is {asked}, and the teacher's own pooling is {', '.join(map(str, found)) or 'unknown'}"
        )
    if other := [kind for kind in kinds if kind not in ("Transformer", "Pooling", "Normalize")]:
        lines.append(
            f"the teacher's {MODULES_FILE} has {', '.join(other)} too: a run compares what comes before, and an export has no such "
            "module"
        )
    return lines


def _modes(config: dict[str, Any]) -> list[Any]:
    """The pooling modes of a Pooling module, in the words of sentence-transformers."""
    modes = config.get("pooling_mode")
    if modes is not None:
        return modes if isinstance(modes, list) else [modes]
    return [mode for key, mode in EARLIER_KEYS.items() if config.get(key) is True] or ["mean"]


class _Files:
    """The JSON files next to a model's config.json, in a directory or on the hub."""

    def __init__(self, teacher: str) -> None:
        self._model = ModelName(teacher)
        self._directory = find_directory(teacher)
        self._is_hub = not Path(teacher).expanduser().is_dir()

    def error(self, cause: str, fix: str) -> UserError:
        return UnknownSettingsError(self._model.name, cause, fix)

    def read(self, name: str, kind: type, is_needed: bool = False) -> Any:
        """The content of a file, a `kind`; None where the model has no such file.

        `is_needed`: raise a `UserError` where it cannot be known whether a hub model has it, because there is no network.
        """
        path = self._find(name, is_needed)
        if path is None:
            return None
        fix = f"Correct it, or remove {MODULES_FILE} to do without the teacher's settings"
        try:
            too_large = path.stat().st_size > MOST_CONFIG_BYTES
            content = None if too_large else json.loads(path.read_text(encoding="utf-8-sig"))
        except (OSError, ValueError, RecursionError) as error:
            raise self.error(f"{path} is not readable JSON ({one_line(error)})", fix) from None
        if not isinstance(content, kind):
            raise self.error(f"{path} holds no {'list' if kind is list else 'object with keys'}", fix)
        return content

    def _find(self, name: str, is_needed: bool) -> Path | None:
        if not self._is_hub:
            path = self._directory / name
            return path if path.is_file() else None
        repository, revision = self._model.name, self._directory.name  # the commit that the weights are of
        try:
            return Path(hf_hub_download(repository, name, revision=revision))
        except LocalEntryNotFoundError as error:  # not in the cache, and the hub cannot be asked
            if not is_needed or try_to_load_from_cache(repository, name, revision=revision) is _CACHED_NO_EXIST:
                return None
            raise self.error(
                f"{name} is not in the cache, and the hub cannot be asked for it ({one_line(error)})",
                f"Fetch the complete model where there is a network (hf download {repository}), or, where it has no such "
                "file, choose the pooling: --set relations.pooling=mean (or cls, last)",
            ) from None
        except EntryNotFoundError:
            return None

    def kind_and_path(self, module: Any) -> tuple[str, str]:
        """The class of a module without its package, and its directory, which is below the model's."""
        kind, path = (module.get(key) if isinstance(module, dict) else None for key in ("type", "path"))
        if not (isinstance(kind, str) and isinstance(path, str)) or ".." in path or path.startswith("/"):
            raise self.error(
                f"{MODULES_FILE} has the entry {one_line(repr(module)[:80])}, which has no `type` and `path` of a module",
                f"Correct it, or remove {MODULES_FILE} to do without the teacher's settings",
            )
        return kind.rpartition(".")[2], path
