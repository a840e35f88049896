"""Files made to do harm: corrupt checkpoints with a matching manifest, recipes that expand to gigabytes, odd names."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import load_recipe
from pipeline.errors import UserError
from pipeline.runtime.checkpoint import CheckpointConfig, newest_valid, prune
from pipeline.runtime.checkpoint_files import committed_steps, fsync_and_hash, manifest_text
from tests.unit.runtime.test_checkpoint_corruption import write

VICTIM = "weight-00000-of-00002.safetensors"
FIRST = '"encoder.weight:0": {"dtype": "F32", "shape": [17], "data_offsets": [0, 68]}'


def safetensors(header: str, body: bytes = bytes(68), length: int | None = None) -> bytes:
    text = header.encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + body


HEADERS = {
    "header longer than the file": safetensors("{" + FIRST + "}", length=2**63),
    "header of a terabyte": safetensors("{" + FIRST + "}", length=2**40),
    "no header": b"\x00" * 4,
    "no JSON": safetensors("{" + FIRST),
    "offsets beyond the file": safetensors("{" + FIRST.replace("68]", "6800]") + "}"),
    "overlapping offsets": safetensors(
        "{" + FIRST + ', "b:0": {"dtype": "F32", "shape": [2], "data_offsets": [60, 68]}}'
    ),
    "a hole": safetensors("{" + FIRST.replace("[0, 68]", "[4, 72]") + "}", bytes(72)),
    "shape that is not the size": safetensors("{" + FIRST.replace("[17]", "[18]") + "}"),
    "shape that overflows": safetensors("{" + FIRST.replace("[17]", f"[{2**62}, 8]") + "}"),
    "another type": safetensors("{" + FIRST.replace("F32", "I32") + "}"),
    "two dimensions": safetensors("{" + FIRST.replace("[17]", "[17, 1]") + "}"),
    "a name without a start": safetensors("{" + FIRST.replace(":0", "") + "}"),
    "a path as a start": safetensors("{" + FIRST.replace(":0", ":../../0") + "}"),
    "a name twice": safetensors("{" + FIRST + "," + FIRST + "}"),
    "negative offset": safetensors("{" + FIRST.replace("[0, 68]", "[-4, 64]") + "}"),
}


@pytest.mark.parametrize("how", HEADERS)
def test_hostile_headers_are_rejected_although_the_manifest_matches(how: str, tmp_path: Path) -> None:
    older, newer = write(tmp_path, 100), write(tmp_path, 200)
    (newer / VICTIM).write_bytes(HEADERS[how])
    _write_matching_manifest(newer)
    taken, problems = newest_valid(tmp_path)
    assert taken == older, how
    assert VICTIM in problems[0]


def _write_matching_manifest(path: Path) -> None:
    files = {file.name: fsync_and_hash(file) for file in path.iterdir() if file.name != "manifest.json"}
    (path / "manifest.json").write_text(manifest_text(files))


@pytest.mark.parametrize(
    "name", ["step-00000300 ", "step-300", "step-000000300", "step-٠٠٠٠٠٣٠٠", "step-00000300.tmp", "step-"]
)
def test_odd_names_are_no_checkpoints(name: str, tmp_path: Path) -> None:
    valid = write(tmp_path, 100)
    (tmp_path / name).mkdir()
    assert committed_steps(tmp_path) == [100]
    assert newest_valid(tmp_path) == (valid, [])


def test_a_link_in_the_place_of_a_checkpoint_is_rejected(tmp_path: Path) -> None:
    valid = write(tmp_path / "run", 100)
    elsewhere = write(tmp_path / "other", 200)
    (tmp_path / "run" / "step-00000200").symlink_to(elsewhere)
    taken, problems = newest_valid(tmp_path / "run")
    assert taken == valid
    assert "symbolic link" in problems[0]


def test_pruning_after_a_fall_back_keeps_what_was_just_saved(tmp_path: Path) -> None:
    """200 and 300 were corrupt, the run resumed from 100 and was stopped at 120: only 120 and 100 are valid."""
    for step in (100, 120, 200, 300):
        write(tmp_path, step)
    for step in (200, 300):
        (tmp_path / f"step-{step:08d}" / VICTIM).write_bytes(b"")
    prune(tmp_path, CheckpointConfig(keep=2), newest=120)
    assert committed_steps(tmp_path) == [100, 120]


def test_pruning_keeps_what_this_attempt_neither_found_nor_wrote(tmp_path: Path) -> None:
    for step in (100, 120, 140, 900):
        write(tmp_path, step)
    prune(tmp_path, CheckpointConfig(keep=1), newest=140, known={100, 120, 140})
    assert committed_steps(tmp_path) == [140, 900]


BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 12)
)
RECIPES: dict[str, Any] = {
    "nested too deeply": "languages: " + "[" * 100_000,
    "a bomb of aliases": BOMB + "languages: *a11\n",
    "a bomb under a known key": "languages: " + BOMB.replace("\n", "\n  ").replace("a0:", "\n  a0:", 1),
    "a Python object": "teacher: !!python/object/apply:os.system [touch HACKED]\n",
    "a key twice": "steps: 10\nsteps: 20\n",
    "a file of zeros": "\x00" * 1000,
    "a number of 5000 digits": "steps: " + "9" * 5000 + "\n",
}


@pytest.mark.parametrize("how", RECIPES)
def test_hostile_recipes_are_rejected_with_a_short_message(how: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPES[how])
    with pytest.raises(UserError) as error:
        load_recipe(path, [])
    assert len(str(error.value)) < 2000
    assert not (tmp_path / "HACKED").exists()
