"""Sources of data sets: a file of the hub, and a data set that the `datasets` library reads.

In: a `Listing`. Out: sources like those of local files. A file of the hub is identified by its commit and path, never by a date:
`hf://datasets/NAME@COMMIT/PATH`. It is read with range requests and not stored.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from data_prep.file_hashes import xxh3_128_of_file
from data_prep.hub import READ_BY_FILE, Listing, Specification, read_with_library
from data_prep.hub_errors import explained
from data_prep.names import quoted, shown
from data_prep.records import joined
from data_prep.sources import ReadOptions, Source
from data_prep.unpack import rewriting

ADDRESS = "hf://datasets/"
FETCHED_BYTES = 1 << 23  # in one request
DOWNLOADED = "downloaded"  # directory of a copy, in commands that messages name


@dataclass
class HubFile(Source):
    """One file of a data set of the hub."""

    size_bytes: int = 0

    @property
    def title(self) -> str:
        return shown(self.name)

    @property
    def can_be_read_again(self) -> bool:
        return True

    def stamp(self) -> dict[str, int]:
        return {"bytes": self.size_bytes, "mtime_ns": 0}

    def changed_since(self, record: dict[str, Any]) -> bool:
        return False  # its name holds the commit

    def _open(self) -> Any:
        return _RemoteFile(self.name, self.size_bytes)

    def _parquet_file(self) -> Any:
        return self._open()

    def _hash(self) -> str:
        return ""  # the commit identifies the file, of which only some columns were read

    def _rewriting(self, command: str) -> str:
        (name, _, commit), path = _name_and_path(self.name)[0].partition("@"), self.path
        folder = quoted(
            str(path.parent / "*") if path.parent.name else "*"
        )  # the other files of the config are there too
        download = f"hf download {name} --revision {commit} --repo-type dataset --include README.md --include {folder}"
        return f"{download} --local-dir {DOWNLOADED} && {rewriting(Path(DOWNLOADED) / path, command, self._kind()[1])}"

    @property
    def how_to_continue(self) -> str:
        name = _name_and_path(self.name)[0].partition("@")[0]
        return f"give the corrected copy (hf:{DOWNLOADED}) in place of hf:{name} and another --output"

    def _too_large_a_window(self) -> str:
        return f"{self.title} was packed with a window of more than 128 MB. Download it and unpack it with zstd -d --long=31."


@dataclass
class LibrarySource(Source):
    """One config of a data set in CSV, text or Arrow, read from its start by the `datasets` library."""

    given: Specification = field(default_factory=lambda: Specification("", ""))
    revision: str = ""
    config: str = ""
    split: str = ""
    paths: list[Path] = field(default_factory=list)  # of a local data set

    @property
    def title(self) -> str:
        return shown(self.name)

    @property
    def holds_records(self) -> bool:
        return True

    @property
    def can_be_read_again(self) -> bool:
        return True

    def stamp(self) -> dict[str, int]:
        """The newest date of a local file. The size is 0, as nothing tells how much of the files has been read."""
        dates = [Source(self.language, path, str(path)).stamp()["mtime_ns"] for path in self.paths]
        return {"bytes": 0, "mtime_ns": max(dates, default=0)}

    def changed_since(self, record: dict[str, Any]) -> bool:
        # the commit identifies files of the hub; records of earlier versions have no hash of local files
        return bool(record["xxh3_128"]) and super().changed_since(record)

    def chunks(self) -> Iterator[bytes]:
        self.counts.clear()
        with self._read_to_end():
            yield from joined(self._documents(), self._records())

    def _documents(self) -> Iterator[bytes]:
        records = self._records()
        rows = read_with_library(self.given, self.revision, self.config, self.split)
        for number, record in enumerate(rows, start=1):
            yield records.document(record, f"record {number}")

    def _hash(self) -> str:
        """XXH3-128 of the hashes of all local files; nothing for a data set of the hub."""
        hashes = "".join(map(xxh3_128_of_file, self.paths))
        return xxhash.xxh3_128_hexdigest(hashes.encode()) if hashes else ""

    def how_to_convert(self, lines: list[bytes]) -> str:
        return "Write the data set again with its text in UTF-8"


def sources_of(given: Specification, listing: Listing, languages: dict[str, str], options: ReadOptions) -> list[Source]:
    """The sources of the chosen configs. `languages` names the language of each."""
    found: list[Source] = []
    for config, chosen in listing.chosen.items():
        if chosen.reader in READ_BY_FILE:
            found += [_source_of_file(given, languages[config], path, size, options) for path, size in chosen.files]
            continue
        commit = f"@{listing.revision}" if listing.revision else ""
        one = LibrarySource(
            languages[config], Path(given.name), f"hf:{given.name}{commit}:{config}:{chosen.split}", options
        )
        one.given, one.revision, one.config, one.split = given, listing.revision, config, chosen.split
        one.paths = [Path(path) for path, _ in chosen.files] if given.is_local else []
        found.append(one)
    return found


def _source_of_file(given: Specification, language: str, address: str, size: int, options: ReadOptions) -> Source:
    """`address`: the path of a local file, or an hf:// address."""
    if not given.is_local:
        path = Path(_name_and_path(address)[1])
        return HubFile(language, path, address, options, in_parts=True, size_bytes=size)
    name = f"hf:{given.name}/{Path(address).relative_to(Path(given.name).resolve())}"
    return Source(language, Path(address), name, options, in_parts=True)


def _name_and_path(address: str) -> tuple[str, str]:
    """OWNER/NAME@COMMIT, and the path in the data set."""
    owner, name, path = address.removeprefix(ADDRESS).split("/", 2)
    return f"{owner}/{name}", path


class _RemoteFile(io.RawIOBase):
    """A file of the hub that is fetched in ranges. Its errors are `DataError`s."""

    def __init__(self, address: str, size_bytes: int) -> None:
        self._address, self._name = address, _name_and_path(address)[0].partition("@")[0]
        with self._explained():
            from huggingface_hub import HfFileSystem

            self._file = HfFileSystem().open(address, "rb", block_size=FETCHED_BYTES, size=size_bytes)

    def _explained(self) -> Any:
        return explained(shown(self._address), self._name)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return int(self._file.tell())

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return int(self._file.seek(offset, whence))

    def readinto(self, buffer: Any) -> int:
        with self._explained():
            data = self._file.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        if not self.closed and hasattr(self, "_file"):
            self._file.close()
        super().close()
