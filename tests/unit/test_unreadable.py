"""A file that cannot be read now is not a corrupt one: tried again, then refused by name; nothing is passed over for it."""

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
    """Root may read everything; somebody else may not."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def open_place() -> Iterator[Path]:
    """A directory that other users may enter, unlike pytest's own."""
    place = Path(tempfile.mkdtemp())
    place.chmod(0o755)
    yield place
    shutil.rmtree(place)


def test_a_checkpoint_that_cannot_be_opened_is_neither_passed_over_nor_corrupt(tmp_path: Path) -> None:
    older, newer = write(tmp_path, 100), write(tmp_path, 200)
    with no_descriptors_left(), pytest.raises(UnreadableError, match=r"EMFILE.*ulimit -n"):
        newest_valid(tmp_path)
    assert newest_valid(tmp_path) == (newer, [])
    (newer / "state.json").unlink()  # read, and found wrong
    assert newest_valid(tmp_path)[0] == older


def test_what_fails_for_a_moment_is_read_all_the_same(tmp_path: Path) -> None:
    write(tmp_path, 100)
    newer = write(tmp_path, 200)
    with no_descriptors_left() as held:
        release = threading.Timer(0.2, lambda: [os.close(held.pop()) for _ in range(len(held))])
        release.start()
        assert newest_valid(tmp_path) == (newer, [])
        release.join()


def test_a_checkpoint_of_another_user_is_refused_by_name(open_place: Path) -> None:
    write(open_place, 100)
    newer = write(open_place, 200)
    for path in newer.iterdir():
        path.chmod(0o644)
    weight = next(newer.glob("weight-*"))
    weight.chmod(0)
    with another_user(), pytest.raises(UnreadableError, match=rf"{weight.name} cannot be read now \(EACCES"):
        newest_valid(open_place)
    weight.chmod(0o644)
    newer.chmod(0)  # its files cannot even be counted
    with another_user(), pytest.raises(UnreadableError, match="EACCES"):
        newest_valid(open_place)
    newer.chmod(0o755)
    open_place.chmod(0)  # and this one is not a run without checkpoints
    with another_user(), pytest.raises(UnreadableError):
        committed_steps(open_place)
    open_place.chmod(0o755)


def test_missing_files_and_directories_are_answers(tmp_path: Path) -> None:
    for path, kind in ((tmp_path / "none", FileNotFoundError), (tmp_path, IsADirectoryError)):
        with pytest.raises(kind):
            read_again(path, path.read_bytes)
    assert committed_steps(tmp_path / "none") == []


def test_verify_goes_on_past_unreadable_shards(
    tiny_shards: Path, open_place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = Path(shutil.copytree(tiny_shards, open_place / "shards"))
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
