"""A damaged checkpoint is never taken: flips, cuts, missing and swapped files, files of other steps, hostile names."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pipeline.errors import UserError
from pipeline.runtime import checkpoint
from pipeline.runtime.checkpoint import (
    KINDS,
    CheckpointConfig,
    CheckpointReader,
    committed_steps,
    damage,
    newest_valid,
    prune,
)

NUMEL = 40


def write(directory: Path, step: int) -> Path:
    """A checkpoint of one 5 x 8 parameter as two ranks would write it, committed by the product's own code."""
    partial = directory / f"step-{step:08d}.tmp"
    partial.mkdir(parents=True)
    generator = torch.Generator().manual_seed(step)
    for kind in KINDS:
        values = torch.rand(NUMEL, generator=generator)
        for rank, (start, stop) in enumerate(((0, 17), (17, NUMEL))):
            name = f"{kind}-{rank:05d}-of-00002.safetensors"
            save_file({f"encoder.weight:{start}": values[start:stop].clone()}, partial / name)
    save_file({"tail": torch.full((3,), float(step))}, partial / checkpoint.UNTRAINED_FILE)
    (partial / "state.json").write_text(json.dumps({"step": step, "parameters": {"encoder.weight": [5, 8]}}))
    files = {path.name: checkpoint.fsync_and_hash(path) for path in partial.iterdir()}
    checkpoint.commit(partial, directory / f"step-{step:08d}", files)
    return directory / f"step-{step:08d}"


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    return write(tmp_path, 100), write(tmp_path, 200)


def test_whole_checkpoint_reads_back_across_ranks(pair: tuple[Path, Path]) -> None:
    newest, problems = newest_valid(pair[0].parent)
    assert (newest, problems) == (pair[1], [])
    reader = CheckpointReader(pair[1])
    generator = torch.Generator().manual_seed(200)
    for kind in KINDS:
        values = torch.rand(NUMEL, generator=generator)
        for start, numel in ((0, NUMEL), (10, 20), (16, 1), (17, 23), (39, 1)):
            assert torch.equal(reader.read(kind, "encoder.weight", start, numel), values[start : start + numel])
    with pytest.raises(UserError, match="other frozen parts"):
        reader.read("weight", "encoder.weight", 30, 20)
    with pytest.raises(UserError, match=r"encoder\.bias"):
        reader.check_shapes({"encoder.weight": [5, 8], "encoder.bias": [8]})
    for trained, tail in (([8, 5], 3), ([5, 4], 3), ([5, 8], 4)):  # 20 of 40 numbers would be there to be read
        with pytest.raises(UserError, match=r"encoder\.weight, 5 x 8 there|tail, 3 there and 4 here"):
            reader.check_shapes({"encoder.weight": trained}, {"tail": torch.zeros(tail)})
    reader.check_shapes({"encoder.weight": [5, 8]}, {"tail": torch.zeros(3)})


def damage_somehow(choice: random.Random, newer: Path, older: Path) -> str:
    files = sorted(path for path in newer.iterdir())
    victim = choice.choice(files)
    kind = choice.choice(["flip", "cut", "missing", "swap", "other step", "grow", "link", "add"])
    if kind == "flip":
        content = bytearray(victim.read_bytes())
        content[choice.randrange(len(content))] ^= 1 << choice.randrange(8)
        victim.write_bytes(content)
    elif kind == "cut":
        content = victim.read_bytes()
        victim.write_bytes(content[: choice.randrange(len(content))])
    elif kind == "grow":
        victim.write_bytes(victim.read_bytes() + b"\x00")
    elif kind == "missing":
        victim.unlink()
    elif kind == "swap":
        one, two = choice.sample([path for path in files if path.suffix == ".safetensors"], 2)
        content = one.read_bytes()
        one.write_bytes(two.read_bytes())
        two.write_bytes(content)
    elif kind == "add":  # sorted before the real ones, it would be read in their place
        added = newer / f"{choice.choice(KINDS)}-00000-of-00000.safetensors"
        shutil.copy(older / "weight-00000-of-00002.safetensors", added)
    elif kind == "other step":
        shutil.copy(older / victim.name, victim)
    else:
        victim.unlink()
        victim.symlink_to(older / victim.name)
    return f"{kind} {victim.name}"


def test_400_of_400_damaged_checkpoints_are_refused(tmp_path: Path) -> None:
    choice = random.Random(7)
    original, directory = tmp_path / "original", tmp_path / "copy"
    write(original, 100)
    write(original, 200)
    for _ in range(400):
        shutil.copytree(original, directory)
        older, newer = directory / "step-00000100", directory / "step-00000200"
        how = damage_somehow(choice, newer, older)
        taken, problems = newest_valid(directory)
        assert taken == older, how
        assert len(problems) == 1, how
        assert "step-00000200" in problems[0]
        shutil.rmtree(directory)


def test_no_whole_checkpoint_stops_the_run(pair: tuple[Path, Path]) -> None:
    for path in pair:
        (path / "manifest.json").unlink()
    with pytest.raises(UserError, match="no checkpoint here is whole"):
        newest_valid(pair[0].parent)


def test_no_checkpoint_at_all_is_a_beginning(tmp_path: Path) -> None:
    (tmp_path / "step-00000100.tmp").mkdir()
    assert newest_valid(tmp_path) == (None, [])


def test_the_last_whole_checkpoint_is_never_passed_over(pair: tuple[Path, Path]) -> None:
    """A crash loop takes the one before the newest; where only one is whole, that one; where none is, the run stops."""
    older, newer = pair
    taken, problems = newest_valid(older.parent, skip=1)
    assert taken == older
    assert problems == [f"{newer}: passed over after three crashes in a row"]
    (older / "manifest.json").unlink()
    taken, problems = newest_valid(older.parent, skip=1)
    assert taken == newer
    assert len(problems) == 1
    (newer / "manifest.json").unlink()
    with pytest.raises(UserError, match="no checkpoint here is whole"):
        newest_valid(older.parent, skip=1)


@pytest.mark.parametrize(
    "lost", [["state.json"], ["exp_avg-00001-of-00002.safetensors"], [f"{k}-00001" for k in KINDS]]
)
def test_a_manifest_must_list_every_file_of_every_rank(pair: tuple[Path, Path], lost: list[str]) -> None:
    """Whole by its own account, with all hashes right, and still not a checkpoint."""
    for path in pair[1].iterdir():
        if path.name == "manifest.json" or any(path.name.startswith(name) for name in lost):
            path.unlink()
    files = {path.name: checkpoint.fsync_and_hash(path) for path in pair[1].iterdir()}
    with pytest.raises(AssertionError):
        checkpoint.commit(pair[1], pair[1].with_name("step-00000300"), files)
    (pair[1] / "manifest.json").write_text(checkpoint._manifest_text(files))
    assert "does not list just the files of" in str(damage(pair[1]))
    assert newest_valid(pair[0].parent)[0] == pair[0]


def test_only_listed_files_are_read(pair: tuple[Path, Path]) -> None:
    """A file that no checkpoint has is left alone, whatever it begins with: file systems and editors leave some."""
    numel = torch.zeros(NUMEL)
    save_file({"encoder.weight:0": numel}, pair[1] / "weight-0.safetensors")
    assert damage(pair[1]) is None
    assert CheckpointReader(pair[1]).read("weight", "encoder.weight", 0, NUMEL).any()


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "weights.bin", "state.json/../x", "a\x00b"])
def test_hostile_names_in_a_manifest(pair: tuple[Path, Path], name: str) -> None:
    manifest = pair[1] / "manifest.json"
    content = json.loads(manifest.read_text())
    content["files"][name] = {"size_bytes": 1, "sha256": "0" * 64}
    manifest.write_text(json.dumps(content))
    assert "which no checkpoint has" in str(damage(pair[1]))


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"format": 1, "files": 3}', '{"format": 9, "files": {}}', "\xff", "[" * 100_000]
)
def test_hostile_manifests(pair: tuple[Path, Path], content: str) -> None:
    (pair[1] / "manifest.json").write_bytes(content.encode("latin-1"))
    assert damage(pair[1]) is not None
    assert newest_valid(pair[0].parent)[0] == pair[0]


def test_pruning_keeps_the_newest_and_every_nth(tmp_path: Path) -> None:
    for step in (100, 200, 300, 400, 500):
        write(tmp_path, step)
    (tmp_path / "step-00000600.tmp").mkdir()
    prune(tmp_path, CheckpointConfig(keep=2, keep_every=200), newest=500)
    assert committed_steps(tmp_path) == [200, 400, 500]
    assert not list(tmp_path.glob("*.tmp"))
