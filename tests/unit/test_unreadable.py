"""A file that cannot be read now is not corrupt: it is read again, then named in an error. No older data is used instead."""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from data_prep.__main__ import main as data_prep
from data_prep.shards import ShardSet, UnreadableError, read_again
from pipeline.runtime.checkpoint import newest_valid
from pipeline.runtime.checkpoint_files import committed_steps
from pipeline.runtime.tensor_files import save_tensors
from tests.unit.runtime.test_checkpoint_corruption import write

NOBODY = 65534


@contextmanager
def no_descriptors_left() -> Iterator[list[int]]:
    """Every further open fails with EMFILE, from the kernel itself, until the list is closed."""
    held: list[int] = []
    with contextlib.suppress(OSError):
        while True:
            held.append(os.open(os.devnull, os.O_RDONLY))
    try:
        yield held
    finally:
        while held:
            os.close(held.pop())


@contextmanager
def another_user() -> Iterator[None]:
    """Run the block as a user without the permissions of root."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def shared_directory() -> Iterator[Path]:
    """A directory that other users can read, unlike pytest's own."""
    directory = Path(tempfile.mkdtemp())
    directory.chmod(0o755)
    yield directory
    shutil.rmtree(directory)


def test_a_checkpoint_that_cannot_be_opened_is_neither_passed_over_nor_corrupt(tmp_path: Path) -> None:
    older, newer = write(tmp_path, 100), write(tmp_path, 200)
    with no_descriptors_left(), pytest.raises(UnreadableError, match=r"EMFILE.*ulimit -n"):
        newest_valid(tmp_path)
    assert newest_valid(tmp_path) == (newer, [])
    (newer / "state.json").unlink()  # now it is corrupt
    assert newest_valid(tmp_path)[0] == older


def test_a_read_that_fails_for_a_moment_is_repeated(tmp_path: Path) -> None:
    write(tmp_path, 100)
    newer = write(tmp_path, 200)
    with no_descriptors_left() as held:
        release = threading.Timer(0.2, lambda: [os.close(held.pop()) for _ in range(len(held))])
        release.start()
        assert newest_valid(tmp_path) == (newer, [])
        release.join()


def test_an_unreadable_checkpoint_of_another_user_is_named(shared_directory: Path) -> None:
    write(shared_directory, 100)
    newer = write(shared_directory, 200)
    for path in newer.iterdir():
        path.chmod(0o644)
    weight = next(newer.glob("weight-*"))
    weight.chmod(0)
    with another_user(), pytest.raises(UnreadableError, match=rf"{weight.name} cannot be read now \(EACCES"):
        newest_valid(shared_directory)
    weight.chmod(0o644)
    newer.chmod(0)  # its files cannot be listed
    with another_user(), pytest.raises(UnreadableError, match="EACCES"):
        newest_valid(shared_directory)
    newer.chmod(0o755)
    shared_directory.chmod(0)  # and the run is not taken for one without checkpoints
    with another_user(), pytest.raises(UnreadableError):
        committed_steps(shared_directory)
    shared_directory.chmod(0o755)


def test_a_missing_file_or_a_directory_in_its_place_is_not_read_again(tmp_path: Path) -> None:
    for path, kind in ((tmp_path / "none", FileNotFoundError), (tmp_path, IsADirectoryError)):
        with pytest.raises(kind):
            read_again(path, path.read_bytes)
    assert committed_steps(tmp_path / "none") == []


def test_verify_continues_after_unreadable_shards(
    tiny_shards: Path, shared_directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = Path(shutil.copytree(tiny_shards, shared_directory / "shards"))
    first, *_, last = [shard.path for shard in ShardSet(shards).all_shards()]
    content = bytearray(last.read_bytes())
    content[5000] ^= 1
    last.write_bytes(content)
    first.chmod(0)
    with another_user():
        code = data_prep(["verify", str(shards)])
    said = capsys.readouterr().err
    assert code == 2
    assert f"{first} cannot be read now (EACCES" in said
    assert f"{last}: " in said
    assert f"--redo {last.parent.name}" in said
    assert f"--redo {first.parent.name}" not in said
    with another_user(), pytest.raises(UnreadableError, match=first.name):
        ShardSet(shards).rows(first.parent.name, [0], 16)


@pytest.mark.parametrize(("mask", "mode"), [(0o002, 0o664), (0o022, 0o644), (0o077, 0o600)])
def test_tensor_files_follow_the_umask(tmp_path: Path, mask: int, mode: int) -> None:
    before = os.umask(mask)
    try:
        save_tensors({"weight": torch.ones(3)}, tmp_path / "some.safetensors")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "some.safetensors").stat().st_mode) == mode
    assert [path.name for path in tmp_path.iterdir()] == ["some.safetensors"]
    assert torch.equal(load_file(tmp_path / "some.safetensors")["weight"], torch.ones(3))
