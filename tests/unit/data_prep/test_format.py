"""The format on disk, read by a reader that shares no code with the project, and manifests that are not valid."""

from __future__ import annotations

import itertools
import json
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import xxhash

from data_prep.shards import DataError, ShardSet, manifest_digest


class IndependentReader:
    """A reader written from docs/shard_format.md with struct, json, numpy and xxhash only."""

    HEADER = struct.Struct("<8sIIQQQQQQII32s16s64s")

    def __init__(self, root: Path) -> None:
        self.root = root
        self.manifest = json.loads((root / "manifest.json").read_text(encoding="utf-8"))
        assert (self.manifest["format"], self.manifest["version"]) == ("minilmv2-shards", 1)

    def tokens_and_documents(self, language: str) -> tuple[np.ndarray, list[np.ndarray]]:
        """The language's stream, and its documents."""
        streams, documents = [], []
        for number, record in enumerate(self.manifest["languages"][language]["shards"]):
            data = (self.root / record["file"]).read_bytes()
            assert len(data) == record["bytes"]
            assert xxhash.xxh3_128_hexdigest(data) == record["xxh3_128"]
            (magic, version, header_bytes, num_tokens, num_documents, tokens_at, documents_at, hashes_at, size, vocab,
             shard_number, tokenizer, options, name) = self.HEADER.unpack_from(data)  # fmt: skip
            assert (magic, version, header_bytes, size) == (b"MLV2TOK\n", 1, 4096, len(data))
            assert (shard_number, name.rstrip(b"\0").decode()) == (number, language)
            assert tokenizer.hex() == self.manifest["tokenizer"]["sha256"]
            assert options.hex() == self.manifest["options_xxh3_128"]
            assert vocab == self.manifest["tokenizer"]["vocab_size"]
            assert struct.unpack_from("<Q", data, 4088)[0] == xxhash.xxh3_64_intdigest(data[:4088])
            stream = np.frombuffer(data, "<u4", num_tokens, tokens_at)
            offsets = np.frombuffer(data, "<u8", num_documents + 1, documents_at).astype(np.int64)
            hashes = np.frombuffer(data, "<u8", (size - hashes_at) // 8, hashes_at)
            for block, expected in enumerate(hashes):
                start = 4096 + (block << 20)
                assert xxhash.xxh3_64_intdigest(data[start : min(start + (1 << 20), hashes_at)]) == expected
            streams.append(stream)
            documents += [stream[first:last] for first, last in itertools.pairwise(offsets)]
        return np.concatenate(streams), documents


def test_an_independent_reader_finds_the_same_tokens(tiny_shards: Path) -> None:
    reader, shards = IndependentReader(tiny_shards), ShardSet(tiny_shards)
    for language in shards.languages:
        stream, documents = reader.tokens_and_documents(language)
        assert len(stream) == shards.num_tokens(language)
        assert len(documents) == shards.num_documents(language)
        assert np.array_equal(np.concatenate(documents), stream)
        assert all(document[-1] == 2 for document in documents)  # every line ends with </s>, so every document does
        rows = shards.rows(language, np.arange(shards.num_rows(language, 34)), 34)
        assert np.array_equal(rows[:, 1:-1].reshape(-1), stream[: rows.shape[0] * 32])
        assert (rows[:, 0] == 0).all()
        assert (rows[:, -1] == 2).all()


@pytest.fixture
def shards_copy(tiny_shards: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_shards, tmp_path / "shards")


def edit_manifest(root: Path, change: object) -> None:
    """Change the manifest as an attacker would, with a matching hash."""
    manifest = json.loads((root / "manifest.json").read_text())
    change(manifest)  # type: ignore[operator]
    manifest["manifest_xxh3_128"] = manifest_digest(manifest)
    (root / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    "name", ["../he/00000.tok", "/etc/passwd", "he/../he/00000.tok", "he/00000.tok/..", "he\\00000.tok", "hi/00000.tok"]
)
def test_file_names_outside_of_the_directory_are_rejected(shards_copy: Path, name: str) -> None:
    edit_manifest(shards_copy, lambda manifest: manifest["languages"]["he"]["shards"][0].update(file=name))
    with pytest.raises(DataError, match=r"expected he/00000\.tok"):
        ShardSet(shards_copy)


@pytest.mark.parametrize("name", ["..", "a/b", "", ".", "he\n"])
def test_language_names_that_are_paths_are_rejected(shards_copy: Path, name: str) -> None:
    edit_manifest(shards_copy, lambda manifest: manifest["languages"].update({name: manifest["languages"]["he"]}))
    with pytest.raises(DataError, match="not a plain name"):
        ShardSet(shards_copy)


def test_a_symbolic_link_out_of_the_directory_is_rejected(shards_copy: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside.tok"
    (shards_copy / "he" / "00000.tok").rename(outside)
    (shards_copy / "he" / "00000.tok").symlink_to(outside)
    with pytest.raises(DataError, match="symbolic link"):
        ShardSet(shards_copy)


def test_the_directory_itself_may_be_a_link(shards_copy: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(shards_copy)
    assert ShardSet(tmp_path / "link").languages == ["he", "hi", "sw", "tr"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda manifest: manifest.update(version=2), "version 2"),
        (lambda manifest: manifest.update(format="other"), "format 'other'"),
        (lambda manifest: manifest.pop("tokenizer"), "corrupt"),
        (lambda manifest: manifest["languages"]["he"]["shards"][0].update(tokens=-1), "impossible counts"),
        (lambda manifest: manifest["languages"]["he"]["shards"][0].update(tokens=1), "does not follow"),
        (lambda manifest: manifest["languages"]["he"].update(shards=3), "corrupt"),
    ],
)
def test_an_invalid_manifest_is_rejected(shards_copy: Path, change: object, message: str) -> None:
    edit_manifest(shards_copy, change)
    with pytest.raises(DataError, match=message):
        ShardSet(shards_copy)


def test_an_edited_manifest_is_rejected(shards_copy: Path) -> None:
    file = shards_copy / "manifest.json"
    file.write_text(file.read_text().replace('"text_bytes": 9412', '"text_bytes": 9413'))
    with pytest.raises(DataError, match="was edited"):
        ShardSet(shards_copy)


def test_missing_shards_name_the_command_that_makes_them(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"python -m data_prep prepare .* --output"):
        ShardSet(tmp_path / "nothing")


def test_the_fingerprint_depends_on_the_content_only(tiny_shards: Path, shards_copy: Path) -> None:
    assert ShardSet(shards_copy).fingerprint == ShardSet(tiny_shards).fingerprint
    edit_manifest(shards_copy, lambda manifest: manifest["languages"].pop("he"))
    assert ShardSet(shards_copy).fingerprint != ShardSet(tiny_shards).fingerprint
