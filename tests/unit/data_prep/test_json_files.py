"""Reading JSON objects, and hashes of files."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import xxhash

from data_prep.file_hashes import READ_BYTES, sha256_of_file, xxh3_128_of_file
from data_prep.json_files import read_json_object, read_optional_json_object


@pytest.mark.parametrize("content", [b'{"a": [1]}', b'\xef\xbb\xbf{"a": [1]}'], ids=["plain", "byte order mark"])
def test_an_object_is_read(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "file.json").write_bytes(content)
    assert read_json_object(tmp_path / "file.json") == {"a": [1]}
    assert read_optional_json_object(tmp_path / "file.json") == {"a": [1]}


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b'{"a": "\xff"}', b'{"a": ' + b"[" * 100_000],
    ids=["empty", "truncated", "list", "null", "not UTF-8", "nested too deeply"],
)
def test_any_other_content_is_a_value_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "file.json").write_bytes(content)
    with pytest.raises(ValueError):
        read_json_object(tmp_path / "file.json")
    assert read_optional_json_object(tmp_path / "file.json") == {}


def test_a_missing_file_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_json_object(tmp_path / "file.json")
    assert read_optional_json_object(tmp_path) == {}


@pytest.mark.parametrize("size", [0, 10, READ_BYTES, 2 * READ_BYTES + 1])
def test_hashes_are_those_of_the_content(tmp_path: Path, size: int) -> None:
    content = bytes(range(256)) * (size // 256 + 1)
    (tmp_path / "file").write_bytes(content[:size])
    assert sha256_of_file(tmp_path / "file") == hashlib.sha256(content[:size]).hexdigest()
    assert xxh3_128_of_file(tmp_path / "file") == xxhash.xxh3_128_hexdigest(content[:size])
