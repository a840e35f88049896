"""Data sets of the Hugging Face Hub, or of a local directory in the hub's layout: their revision, configs and data files.

In: `hf:NAME[@REVISION][:CONFIG[:SPLIT]]`. Out: a `Listing` of the files of the chosen configs, or an error that says what the hub
answered and what to do. The `datasets` library finds the files, by the README's `configs` or by their names, as `load_dataset`
does. No script of a data set runs and no file is unpickled.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from data_prep.command_line import module_command
from data_prep.hub_errors import explained
from data_prep.names import shown
from data_prep.records import check_reader, check_safe_reader
from data_prep.shards import DataError
from data_prep.sources import JSON_KINDS
from data_prep.unpack import PACKINGS

PREFIX = "hf:"
SYNTAX = "hf:NAME[@REVISION][:CONFIG[:SPLIT]]"
PATTERN_CHARACTERS = {*"*?["}  # of fsspec, which lists the files
READ_BY_FILE = ("parquet", "json")  # readers of the library whose files are sources of their own here
ENDINGS = {
    "parquet": (".parquet",),
    "json": tuple(f"{kind}{packing}" for kind in (*JSON_KINDS, ".json") for packing in PACKINGS),
}
DEFAULT_CONFIG, DEFAULT_SPLIT = "default", "train"
PATHS_PER_REQUEST = 500
MOST_NAMES = 12


@dataclass(frozen=True)
class Specification:
    """`hf:NAME[@REVISION][:CONFIG[:SPLIT]]`, where NAME is a data set of the hub or a local directory."""

    given: str
    name: str
    revision: str | None = None
    config: str | None = None
    split: str | None = None

    @classmethod
    def parse(cls, given: str) -> Specification:
        """Raises `DataError` if `given` is not of the form."""
        name, *rest = given.removeprefix(PREFIX).split(":")
        if not name or len(rest) > 2 or any(not part for part in rest):
            raise DataError(f"{given}: write {SYNTAX}.")
        config, split = [*rest, None, None][:2]
        if Path(name).is_dir():
            return cls(given, name, None, config, split)
        name, _, revision = name.partition("@")
        if name.count("/") != 1 or name.startswith((".", "/", "~")):
            raise DataError(
                f"{given}: there is no directory {name}, and a data set of the hub is named OWNER/NAME "
                "(hf:HuggingFaceFW/fineweb-2:deu_Latn)."
            )
        return cls(given, name, revision or None, config, split)

    @property
    def is_local(self) -> bool:
        return Path(self.name).is_dir()


@dataclass
class ConfigFiles:
    """The files of one config: of one split, in the order of the data set."""

    split: str
    reader: str  # of the `datasets` library
    files: list[tuple[str, int]]  # path or hf:// address, and bytes
    left_out: list[str] = field(default_factory=list)  # files of another kind than most files of the config


@dataclass
class Listing:
    """The data files of one specification."""

    revision: str  # commit of the data set; "" for a local directory
    newest: str  # commit that the hub names now for the revision asked for
    configs: list[str]  # all of the data set
    default: str | None  # the config that the data set's README names as default, or its only one
    chosen: dict[str, ConfigFiles] = field(default_factory=dict)

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> Listing:
        """From `dataclasses.asdict`, as JSON carries it between processes."""
        chosen = {config: ConfigFiles(**files) for config, files in record["chosen"].items()}
        return cls(**{**record, "chosen": chosen})


def list_files(
    given: Specification, pinned: str | None, choose: Callable[[list[str], str | None], list[str]]
) -> Listing:
    """The files of the configs that `choose` selects from all configs and the default one.

    Call this in a process of its own (`in_child`): the library starts threads.

    Args:
        pinned: the commit to use, whatever the hub names now

    Raises:
        DataError: the hub cannot be reached or denies access, or there is no such data set, revision, config or split
    """
    _library(given)
    with explained(given.given, given.name):
        if given.is_local and _is_saved(Path(given.name)):
            files = [(str(path), path.stat().st_size) for path in sorted(Path(given.name).resolve().rglob("*.arrow"))]
            chosen = choose([DEFAULT_CONFIG], DEFAULT_CONFIG)
            found = {config: ConfigFiles(given.split or "", "arrow", files) for config in chosen}
            return Listing("", "", [DEFAULT_CONFIG], DEFAULT_CONFIG, found)
        _check_no_pattern(given)
        newest = "" if given.is_local else _commit(given.name, given.revision)
        revision = pinned or newest
        configs, default = _configs(given, revision)
        names = list(configs) or [DEFAULT_CONFIG]
        listing = Listing(revision, newest, names, default)
        for config in choose(names, default):
            listing.chosen[config] = _config_files(given, revision, config, configs.get(config, {}))
        return listing


def _check_no_pattern(given: Specification) -> None:
    found = PATTERN_CHARACTERS & {*str(Path(given.name).resolve())} if given.is_local else set()
    if found:
        raise DataError(
            f"{given.given}: the path of the directory has {' and '.join(sorted(found))}, and the package datasets takes that for a "
            "pattern of file names. Rename the directory, or give its files without `hf:` (JSON lines, Parquet or text)."
        )


def _configs(given: Specification, revision: str) -> tuple[dict[str, dict[str, Any]], str | None]:
    """The configs that README.md describes, and the default one."""
    from datasets.utils.metadata import MetadataConfigs
    from huggingface_hub import DatasetCard

    readme = _readme(given, revision)
    found = MetadataConfigs.from_dataset_card_data(DatasetCard.load(readme).data) if readme else MetadataConfigs()
    if len(found) < 2:
        return dict(found), next(iter(found), DEFAULT_CONFIG)
    return dict(found), found.get_default_config_name()


def _readme(given: Specification, revision: str) -> Path | None:
    if given.is_local:
        local = Path(given.name) / "README.md"
        _check_no_script(given, (Path(given.name) / f"{Path(given.name).resolve().name}.py").is_file())
        return local if local.is_file() else None
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RemoteEntryNotFoundError

    script = f"{given.name.rsplit('/', 1)[-1]}.py"
    _check_no_script(given, HfApi().file_exists(given.name, script, repo_type="dataset", revision=revision))
    try:
        return Path(HfApi().hf_hub_download(given.name, "README.md", repo_type="dataset", revision=revision))
    except RemoteEntryNotFoundError:
        return None


def _check_no_script(given: Specification, has_script: bool) -> None:
    if has_script:
        raise DataError(
            f"{given.given}: the data set is a script, and no script is run. Use a data set that consists of data files; old ones "
            "often have a copy as files (for mc4: hf:allenai/c4:LANGUAGE)."
        )


def _config_files(given: Specification, revision: str, config: str, described: dict[str, Any]) -> ConfigFiles:
    from datasets import DownloadConfig
    from datasets.data_files import DataFilesDict, DataFilesList, get_data_patterns, sanitize_patterns
    from datasets.load import infer_module_for_data_files

    root = str(Path(given.name).resolve()) if given.is_local else f"hf://datasets/{given.name}@{revision}"
    base, how = "/".join(filter(None, (root, described.get("data_dir")))), DownloadConfig()
    patterns = sanitize_patterns(described["data_files"]) if "data_files" in described else get_data_patterns(base, how)
    split = _split(given, config, list(map(str, patterns)))
    paths = DataFilesList.from_patterns(patterns[split], base_path=base, download_config=how)
    if not paths or any(path.endswith(".zip") for path in paths):
        missing = f"there are no files {', '.join(map(str, patterns[split]))} in {shown(root)}"
        what = "its data files are .zip archives, which are not read" if paths else missing
        raise DataError(f"{given.given}: config {config!r}: {what}.")
    reader = str(infer_module_for_data_files(DataFilesDict({split: paths}), given.name, how)[0])
    check_reader(given.given, reader)
    kept = [path for path in paths if reader not in READ_BY_FILE or path.lower().endswith(ENDINGS[reader])]
    left_out = sorted({*paths} - {*kept})
    if not kept:
        raise DataError(
            f"{given.given}: config {config!r}: its data files are of kinds that are not read: "
            f"{', '.join(map(shown, left_out[:MOST_NAMES]))}. Unpack them, or pack them as {', '.join(PACKINGS[1:])}."
        )
    return ConfigFiles(split, reader, _with_sizes(given, revision, kept), left_out)


def _library(given: Specification) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            f"{given.given}: inputs `hf:` need the package datasets: {module_command('pip', 'install', 'datasets>=4.8.5,<6')}   "
            "(without it, download the files with `hf download` and give their directory)"
        ) from error
    datasets.disable_progress_bars()
    return datasets


@cache
def _commit(name: str, revision: str | None) -> str:
    from huggingface_hub import HfApi

    return str(HfApi().dataset_info(name, revision=revision, expand=["sha"]).sha)


def _is_saved(directory: Path) -> bool:
    """Whether `save_to_disk` wrote the directory."""
    return (directory / "state.json").is_file() or (directory / "dataset_dict.json").is_file()


def check_config(given: Specification, config: str, names: list[str]) -> None:
    """Raise `DataError` if the data set has no such config."""
    if config not in names:
        close = difflib.get_close_matches(config, names, MOST_NAMES) or names[:MOST_NAMES]
        raise DataError(
            f"{given.given}: there is no config {config!r} among its {len(names)}. Some of them: {', '.join(close)}."
        )


def _split(given: Specification, config: str, splits: list[str]) -> str:
    """The split asked for, else `train`, else the only one."""
    if given.split in splits:
        return str(given.split)
    if given.split is None and (DEFAULT_SPLIT in splits or len(splits) == 1):
        return DEFAULT_SPLIT if DEFAULT_SPLIT in splits else splits[0]
    asked = f"there is no split {given.split!r}" if given.split else f"there is no split {DEFAULT_SPLIT!r} to use"
    raise DataError(
        f"{given.given}: {asked}; config {config!r} has {', '.join(splits)}. Name one: "
        f"hf:{given.name}:{config}:{splits[0]}"
    )


def _with_sizes(given: Specification, revision: str, paths: list[str]) -> list[tuple[str, int]]:
    """Each file in the order of the data set, once, with its size."""
    paths = list(dict.fromkeys(paths))
    if given.is_local:
        above = Path(given.name).resolve()  # a file in it may be a link, as in the cache of huggingface_hub
        if outside := [path for path in paths if not Path(os.path.normpath(path)).is_relative_to(above)]:
            raise DataError(f"{given.given}: its README.md names a file outside of the data set, {shown(outside[0])}.")
        return [(path, Path(path).stat().st_size) for path in paths]
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    root = f"hf://datasets/{given.name}@{revision}/"
    if foreign := [path for path in paths if not path.startswith(root)]:
        raise DataError(f"{given.given}: its data files are not in the data set itself but at {foreign[0]}.")
    names = [path.removeprefix(root) for path in paths]
    sizes: dict[str, int] = {}
    for start in range(0, len(names), PATHS_PER_REQUEST):
        some = names[start : start + PATHS_PER_REQUEST]
        found = HfApi().get_paths_info(given.name, some, revision=revision, repo_type="dataset")
        sizes |= {one.path: one.size for one in found if isinstance(one, RepoFile)}
    return [(path, sizes.get(name, 0)) for path, name in zip(paths, names, strict=True)]


def read_with_library(given: Specification, revision: str, config: str, split: str) -> Iterator[Any]:
    """The records of one config, streamed by the library: for CSV, text and Arrow, which are not read file by file here."""
    datasets = _library(given)
    with explained(given.given, given.name):
        if given.is_local and _is_saved(Path(given.name)):
            loaded = datasets.load_from_disk(given.name)
            is_one = not isinstance(loaded, datasets.DatasetDict)
            found = loaded if is_one else loaded[_split(given, config, list(loaded))]
        else:
            where = str(Path(given.name).resolve()) if given.is_local else given.name
            builder = datasets.load_dataset_builder(where, config, revision=revision or None)
            check_safe_reader(given.given, builder)
            found = builder.as_streaming_dataset(split=split)
        yield from found
