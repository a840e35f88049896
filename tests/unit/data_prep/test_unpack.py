"""Packed files: every stream is read, and truncation or foreign bytes are an error with the offset."""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pytest

from data_prep.shards import DataError
from data_prep.sources import CorruptSource, Source
from data_prep.unpack import rewriting


def zstd(data: bytes) -> bytes:
    return pyarrow.compress(data, codec="zstd", asbytes=True)


PACKERS: dict[str, Callable[[bytes], bytes]] = {
    ".xz": lzma.compress,
    ".gz": gzip.compress,
    ".zst": zstd,
    ".bz2": bz2.compress,
}
FIRST, SECOND = b"First part, a line of it.\n" * 40, b"Second part, another line.\n" * 90
SKIPPABLE_FRAME = (0x184D2A51).to_bytes(4, "little") + (6).to_bytes(4, "little") + b"hidden"


def read(path: Path, data: bytes) -> bytes:
    path.write_bytes(data)
    return b"".join(Source("en", path, path.name).chunks())


@pytest.mark.parametrize(
    ("packing", "between"),
    [
        (".xz", b""),
        (".xz", bytes(4)),
        (".xz", bytes(200_000)),
        (".gz", b""),
        (".gz", bytes(7)),
        (".zst", b""),
        (".zst", SKIPPABLE_FRAME),
        (".bz2", b""),
    ],
)
def test_everything_after_the_first_stream_is_read(tmp_path: Path, packing: str, between: bytes) -> None:
    pack, path = PACKERS[packing], tmp_path / f"en.txt{packing}"
    assert read(path, pack(FIRST) + between + pack(SECOND) + between) == FIRST + SECOND


@pytest.mark.parametrize("packing", PACKERS)
def test_truncation_at_any_byte_is_an_error_with_the_offset(tmp_path: Path, packing: str) -> None:
    pack, path = PACKERS[packing], tmp_path / f"en.txt{packing}"
    first = pack(FIRST)
    both = first + pack(SECOND)
    for cut in range(len(both)):
        if cut == len(first):
            assert read(path, both[:cut]) == FIRST
            continue
        with pytest.raises(CorruptSource, match=rf"en\.txt\{packing} is corrupt or truncated: .* byte {cut} of {cut} "):
            read(path, both[:cut])


@pytest.mark.parametrize("packing", PACKERS)
@pytest.mark.parametrize("garbage", [b"garbage", b"\0\0\0garbage", b"x"])
def test_garbage_after_a_stream_is_an_error(tmp_path: Path, packing: str, garbage: bytes) -> None:
    with pytest.raises(CorruptSource, match="corrupt or truncated: reading stopped at byte"):
        read(tmp_path / f"en.txt{packing}", PACKERS[packing](FIRST) + garbage)


@pytest.mark.parametrize(("packing", "garbage"), [(".xz", bytes(3)), (".bz2", bytes(4)), (".zst", bytes(4))])
def test_padding_that_the_format_does_not_allow_is_an_error(tmp_path: Path, packing: str, garbage: bytes) -> None:
    with pytest.raises(CorruptSource, match="corrupt or truncated"):
        read(tmp_path / f"en.txt{packing}", PACKERS[packing](FIRST) + garbage)


@pytest.mark.parametrize("packing", PACKERS)
def test_a_second_stream_with_a_corrupt_header_is_an_error(tmp_path: Path, packing: str) -> None:
    pack = PACKERS[packing]
    second = bytearray(pack(SECOND))
    second[0] ^= 1
    with pytest.raises(CorruptSource, match="corrupt or truncated"):
        read(tmp_path / f"en.txt{packing}", pack(FIRST) + bytes(second))


@pytest.mark.parametrize("packing", PACKERS)
def test_an_empty_packed_file_is_an_error(tmp_path: Path, packing: str) -> None:
    with pytest.raises(CorruptSource, match=r"byte 0 of 0 \(the file is empty"):
        read(tmp_path / f"en.txt{packing}", b"")


@pytest.mark.skipif(shutil.which("zstd") is None, reason="needs the zstd command")
def test_the_printed_command_unpacks_a_zstd_file_with_a_large_window(tmp_path: Path) -> None:
    path = tmp_path / "en's.txt.zst"
    packed = subprocess.run(["zstd", "-qc", "--long=28"], input=FIRST, capture_output=True, check=True).stdout
    with pytest.raises(CorruptSource, match=r"window of more than 128 MB.*--long=31") as failure:
        read(path, packed)
    command = str(failure.value).split("file away: ")[1].split(". Then run")[0]
    subprocess.run(["bash", "-c", command], check=True, capture_output=True)
    assert (tmp_path / "en's.txt").read_bytes() == FIRST
    assert sorted(file.name for file in tmp_path.iterdir()) == ["en's.txt", "en's.txt.zst.unpacked"]


@pytest.mark.parametrize("packing", ["", ".gz", ".xz"])
def test_a_printed_command_that_fails_leaves_the_file(tmp_path: Path, packing: str) -> None:
    """iconv fails at a byte that the named encoding does not have."""
    path = tmp_path / f"en.txt{packing}"
    content = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress}[packing](b"text \xff\n")
    path.write_bytes(content)
    done = subprocess.run(["bash", "-c", rewriting(path, "iconv -f ASCII -t UTF-8", packing)], capture_output=True)
    assert done.returncode != 0
    assert path.read_bytes() == content
    subprocess.run(["bash", "-c", rewriting(path, "iconv -f ISO-8859-1 -t UTF-8", packing)], check=True)
    assert b"".join(Source("en", path, path.name).chunks()) == "text ÿ\n".encode()


def test_a_file_that_changes_while_it_is_read_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "en.txt"
    path.write_bytes(FIRST * 1000)
    chunks = Source("en", path, path.name).chunks()
    next(chunks)
    with path.open("ab") as file:
        file.write(SECOND)
    with pytest.raises(DataError, match=r"en\.txt changed while it was read .*run the same command again"):
        list(chunks)


def test_a_new_date_with_the_same_bytes_is_no_change(tmp_path: Path) -> None:
    path = tmp_path / "en.txt"
    path.write_bytes(FIRST * 1000)
    chunks = Source("en", path, path.name).chunks()
    read_first = next(chunks)
    os.utime(path, (1, 1))
    assert read_first + b"".join(chunks) == FIRST * 1000


@pytest.mark.skipif(shutil.which("zstd") is None, reason="needs the zstd command")
def test_a_zstd_dictionary_is_named_and_not_reported_as_corruption(tmp_path: Path) -> None:
    for number in range(200):
        (tmp_path / f"{number}.sample").write_bytes(b"%d is a number of the sample %d\n" % (number, number**3) * 9)
    samples = [str(path) for path in tmp_path.glob("*.sample")]
    subprocess.run(
        ["zstd", "-q", "--train", *samples, "-o", "dict", "--maxdict=2000"],
        cwd=tmp_path,
        check=True,
        capture_output=True,
    )
    command = ["zstd", "-qc", "-D", "dict"]
    packed = subprocess.run(command, cwd=tmp_path, input=FIRST, capture_output=True, check=True).stdout
    with pytest.raises(CorruptSource, match=r"en\.txt\.zst was packed with a zstd dictionary.*zstd -d -D DICTIONARY"):
        read(tmp_path / "en.txt.zst", packed)


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (gzip.compress(FIRST, mtime=0), "It starts like a .gz file: rename it"),
        (FIRST, "It looks like plain text: rename it without .xz"),
    ],
    ids=["gzip", "text"],  # names made of the bytes hold the time of packing and would differ between test workers
)
def test_a_wrong_file_name_extension_is_reported(tmp_path: Path, data: bytes, told: str) -> None:
    with pytest.raises(CorruptSource, match=told):
        read(tmp_path / "en.txt.xz", data)


def test_a_file_that_disappears_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"Cannot read .*gone\.txt: No such file"):
        list(Source("en", tmp_path / "gone.txt", "gone.txt").chunks())
