"""A corrupt checkpoint is never resumed from: flipped bits, cut, missing and swapped files, files of other steps, hostile names."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pipeline.errors import UserError
from pipeline.runtime.checkpoint import CheckpointConfig, CheckpointReader, newest_valid, prune
from pipeline.runtime.checkpoint_files import (
    FORMER_UNTRAINED_FILE,
    KINDS,
    UNTRAINED_FILE,
    commit,
    committed_steps,
    corruption,
    fsync_and_hash,
    manifest_text,
    untrained_file,
)
from pipeline.runtime.checkpoint_writer import write_untrained

NUMEL = 40


def write(directory: Path, step: int, untrained: str = UNTRAINED_FILE) -> Path:
    """A checkpoint of one 5 x 8 parameter as two ranks would write it, committed by the product's own code."""
    partial = directory / f"step-{step:08d}.tmp"
    partial.mkdir(parents=True)
    generator = torch.Generator().manual_seed(step)
    for kind in KINDS:
        values = torch.rand(NUMEL, generator=generator)
        for rank, (start, stop) in enumerate(((0, 17), (17, NUMEL))):
            name = f"{kind}-{rank:05d}-of-00002.safetensors"
            save_file({f"encoder.weight:{start}": values[start:stop].clone()}, partial / name)
    save_file({"tail": torch.full((3,), float(step))}, partial / untrained)
    (partial / "state.json").write_text(json.dumps({"step": step, "parameters": {"encoder.weight": [5, 8]}}))
    files = {path.name: fsync_and_hash(path) for path in partial.iterdir()}
    commit(partial, directory / f"step-{step:08d}", files)
    return directory / f"step-{step:08d}"


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    return write(tmp_path, 100), write(tmp_path, 200)


def test_a_valid_checkpoint_reads_back_across_ranks(pair: tuple[Path, Path]) -> None:
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
    for trained, tail in (([8, 5], 3), ([5, 4], 3), ([5, 8], 4)):  # the first 20 of 40 numbers could be read
        with pytest.raises(UserError, match=r"encoder\.weight, 5 x 8 there|tail, 3 there and 4 here"):
            reader.check_shapes({"encoder.weight": trained}, {"tail": torch.zeros(tail)})
    reader.check_shapes({"encoder.weight": [5, 8]}, {"tail": torch.zeros(3)})


def corrupt_randomly(choice: random.Random, newer: Path, older: Path) -> str:
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
    elif kind == "add":  # sorted before the right ones, it would be read instead of them
        added = newer / f"{choice.choice(KINDS)}-00000-of-00000.safetensors"
        shutil.copy(older / "weight-00000-of-00002.safetensors", added)
    elif kind == "other step":
        shutil.copy(older / victim.name, victim)
    else:
        victim.unlink()
        victim.symlink_to(older / victim.name)
    return f"{kind} {victim.name}"


def test_400_of_400_corrupt_checkpoints_are_rejected(tmp_path: Path) -> None:
    choice = random.Random(7)
    original, directory = tmp_path / "original", tmp_path / "copy"
    write(original, 100)
    write(original, 200)
    for _ in range(400):
        shutil.copytree(original, directory)
        older, newer = directory / "step-00000100", directory / "step-00000200"
        how = corrupt_randomly(choice, newer, older)
        taken, problems = newest_valid(directory)
        assert taken == older, how
        assert len(problems) == 1, how
        assert "step-00000200" in problems[0]
        shutil.rmtree(directory)


def test_without_a_valid_checkpoint_the_run_stops(pair: tuple[Path, Path]) -> None:
    for path in pair:
        (path / "manifest.json").unlink()
    with pytest.raises(UserError, match="no checkpoint here is valid"):
        newest_valid(pair[0].parent)


def test_without_any_checkpoint_the_run_begins(tmp_path: Path) -> None:
    (tmp_path / "step-00000100.tmp").mkdir()
    assert newest_valid(tmp_path) == (None, [])


def test_the_last_valid_checkpoint_is_never_passed_over(pair: tuple[Path, Path]) -> None:
    """A crash loop resumes from the one before the newest. A single valid one is used; without a valid one the run stops."""
    older, newer = pair
    taken, problems = newest_valid(older.parent, skip=1)
    assert taken == older
    assert problems == [f"{newer}: passed over after three crashes in a row"]
    (older / "manifest.json").unlink()
    taken, problems = newest_valid(older.parent, skip=1)
    assert taken == newer
    assert len(problems) == 1
    (newer / "manifest.json").unlink()
    with pytest.raises(UserError, match="no checkpoint here is valid"):
        newest_valid(older.parent, skip=1)


@pytest.mark.parametrize(
    "lost", [["state.json"], ["exp_avg-00001-of-00002.safetensors"], [f"{k}-00001" for k in KINDS]]
)
def test_a_manifest_must_list_every_file_of_every_rank(pair: tuple[Path, Path], lost: list[str]) -> None:
    """All hashes are right, and it is still not a complete checkpoint."""
    for path in pair[1].iterdir():
        if path.name == "manifest.json" or any(path.name.startswith(name) for name in lost):
            path.unlink()
    files = {path.name: fsync_and_hash(path) for path in pair[1].iterdir()}
    with pytest.raises(AssertionError):
        commit(pair[1], pair[1].with_name("step-00000300"), files)
    (pair[1] / "manifest.json").write_text(manifest_text(files))
    assert "does not list just the files of" in str(corruption(pair[1]))
    assert newest_valid(pair[0].parent)[0] == pair[0]


def test_only_listed_files_are_read(pair: tuple[Path, Path]) -> None:
    """A file with another name is ignored: file systems and editors create some."""
    numel = torch.zeros(NUMEL)
    save_file({"encoder.weight:0": numel}, pair[1] / "weight-0.safetensors")
    assert corruption(pair[1]) is None
    assert CheckpointReader(pair[1]).read("weight", "encoder.weight", 0, NUMEL).any()


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "weights.bin", "state.json/../x", "a\x00b"])
def test_hostile_names_in_a_manifest(pair: tuple[Path, Path], name: str) -> None:
    manifest = pair[1] / "manifest.json"
    content = json.loads(manifest.read_text())
    content["files"][name] = {"size_bytes": 1, "sha256": "0" * 64}
    manifest.write_text(json.dumps(content))
    assert "which no checkpoint has" in str(corruption(pair[1]))


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"format": 1, "files": 3}', '{"format": 9, "files": {}}', "\xff", "[" * 100_000]
)
def test_hostile_manifests(pair: tuple[Path, Path], content: str) -> None:
    (pair[1] / "manifest.json").write_bytes(content.encode("latin-1"))
    assert corruption(pair[1]) is not None
    assert newest_valid(pair[0].parent)[0] == pair[0]


def test_pruning_keeps_the_newest_and_every_nth(tmp_path: Path) -> None:
    for step in (100, 200, 300, 400, 500):
        write(tmp_path, step)
    (tmp_path / "step-00000600.tmp").mkdir()
    prune(tmp_path, CheckpointConfig(keep=2, keep_every=200), newest=500)
    assert committed_steps(tmp_path) == [200, 400, 500]
    assert not list(tmp_path.glob("*.tmp"))


def test_the_former_name_of_the_untrained_weights_is_read(tmp_path: Path) -> None:
    write(tmp_path, 100, FORMER_UNTRAINED_FILE)
    newest, problems = newest_valid(tmp_path)
    assert newest is not None
    assert problems == []
    assert torch.equal(CheckpointReader(newest).untrained()["tail"], torch.full((3,), 100.0))
    assert untrained_file(newest).name == FORMER_UNTRAINED_FILE
    untrained_file(newest).unlink()
    assert f"{FORMER_UNTRAINED_FILE} is missing" in str(corruption(newest))


def test_a_new_checkpoint_links_an_old_one_under_the_present_name(tmp_path: Path) -> None:
    """An old run is continued: its untrained weights are linked, and the new checkpoint has the present name."""
    for step in (100, 200):
        write(tmp_path, step, FORMER_UNTRAINED_FILE)
    partial = tmp_path / "step-00000300.tmp"
    partial.mkdir()
    entry = write_untrained(partial, 300, {"tail": torch.zeros(3)}, CheckpointConfig(keep=2))
    assert [path.name for path in partial.iterdir()] == [UNTRAINED_FILE]
    source = (
        tmp_path / "step-00000100" / FORMER_UNTRAINED_FILE
    )  # the checkpoint of step 200 is kept next to the new one
    assert (partial / UNTRAINED_FILE).samefile(source)
    assert entry == fsync_and_hash(source)


def test_a_checkpoint_with_both_names_is_rejected(pair: tuple[Path, Path]) -> None:
    shutil.copy(pair[1] / UNTRAINED_FILE, pair[1] / FORMER_UNTRAINED_FILE)
    assert f"{FORMER_UNTRAINED_FILE} is not in the manifest" in str(corruption(pair[1]))
    files = {path.name: fsync_and_hash(path) for path in pair[1].iterdir() if path.name != "manifest.json"}
    (pair[1] / "manifest.json").write_text(manifest_text(files))
    assert "does not list just the files of" in str(corruption(pair[1]))
