"""The origin of a run: versions, commit, machine, data and recipe.

In: a recipe. Out: the content of `run.json`, which is written before step 1, and the list of changes that a resume rejects.
"""

from __future__ import annotations

import hashlib
import json
import platform
import socket
import subprocess
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from pipeline.config import Recipe, as_tree
from pipeline.distillation.models.student import STARTS
from pipeline.installed import IS_CHECKOUT, ROOT

CODE = ("pipeline", "data_prep")
PACKAGES = ("torch", "deepspeed", "transformers", "tokenizers", "sentencepiece", "safetensors", "numpy")
# Keys that may change between two attempts of one run: how long, how often and in which parts, not what is computed.
MAY_CHANGE = (
    "steps",
    "save_every",
    "eval_every",
    "micro_batch_per_gpu",
    "students",  # each student of a run is compared on its own
    "deterministic",
    "stop_when",
    "checkpoint",
    "guard",
    "metrics",
)
# A change of these is a warning: it changes last bits and perhaps dropout masks, not what is computed.
ROUNDING = ("teacher_options.compile", "student.compile")
# Entries of a run's identity that each student of a run has of its own: the encoder that it starts from, and how its sentence
# vectors are pooled. All others are about the teacher.
START_WEIGHTS, START_CONFIG = "student.init weights", "student.init config"
POOLING = "pooling of sentence vectors"
OF_STUDENT = (START_WEIGHTS, START_CONFIG, POOLING)
# Keys that name files, and their values that do not. training/identity.py compares the content.
COMPARED_BY_CONTENT: dict[str, tuple[str | None, ...]] = {
    "teacher": (None,),
    "vocabulary": (None,),
    "student.init": STARTS,
}


def resume_critical_config(recipe: Recipe) -> dict[str, Any]:
    """The part of a recipe that must not change within one run, flattened to dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in as_tree(recipe).items():
        if key not in MAY_CHANGE:
            is_section = isinstance(value, dict)
            flat |= {f"{key}.{inner}": item for inner, item in value.items()} if is_section else {key: value}
    return flat


def changed_keys(begun: Mapping[str, Any], recipe: Recipe, by_path: bool) -> list[str]:
    """The changes of a run's resume-critical config that a resume rejects, as `key: before -> now`.

    Args:
        begun: the config with which the run began
        recipe: of this attempt
        by_path: compare teacher, vocabulary and the encoder that a student starts from by path. False: another path is
            not a change; their content is compared elsewhere.
    """
    return [
        f"{key}: {then} -> {now}"
        for key, (then, now) in _differences(begun, recipe).items()
        if key not in ROUNDING and (by_path or not _is_another_path(key, then, now))
    ]


def _is_another_path(key: str, then: Any, now: Any) -> bool:
    no_path = COMPARED_BY_CONTENT.get(key)
    return no_path is not None and then not in no_path and now not in no_path


def rounding_changes(begun: Mapping[str, Any], recipe: Recipe) -> list[str]:
    """The changes of `ROUNDING` keys, as `key: before -> now`. `begun`: the config with which the run began."""
    return [f"{key}: {then} -> {now}" for key, (then, now) in _differences(begun, recipe).items() if key in ROUNDING]


def _differences(begun: Mapping[str, Any], recipe: Recipe) -> dict[str, tuple[Any, Any]]:
    """Key -> (before, now). A key that `begun` lacks, of a newer version, has its default."""
    now, then = resume_critical_config(recipe), {**resume_critical_config(Recipe()), **begun}
    return {key: (then.get(key), now[key]) for key in now if now[key] != then.get(key)}


def code_fingerprint(repo: Path = ROOT) -> str:
    """Short hash of the source files, uncommitted changes included. Works outside a git checkout too."""
    digest = hashlib.sha256()
    for path in sorted(path for package in CODE for path in (repo / package).rglob("*.py")):
        digest.update(path.relative_to(repo).as_posix().encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:16]


def fingerprint(value: Any) -> str:
    """Short hash of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def library_versions() -> dict[str, Any]:
    """The versions of Python and of the packages that take part in the computation."""
    return {"python": platform.python_version(), "packages": {name: metadata.version(name) for name in PACKAGES}}


def describe_run(recipe: Recipe, **facts: Any) -> dict[str, Any]:
    """The content of `run.json`, with `facts` added as given. Environment variables are not recorded."""
    return {
        "git_commit": git_commit(),
        "code_fingerprint": code_fingerprint(),
        **library_versions(),
        "host": socket.gethostname(),
        "machine": platform.machine(),
        "recipe_fingerprint": fingerprint(resume_critical_config(recipe)),
        **facts,
    }


def git_commit() -> str:
    """Commit of the code, with `+changes` where tracked files differ from it; "unknown" outside a checkout."""
    if not IS_CHECKOUT:  # of an installed wheel; a repository around it is another one
        return "unknown"
    describe = ["git", "-C", str(ROOT), "describe", "--always", "--exclude=*", "--abbrev=12", "--dirty=+changes"]
    try:
        return subprocess.run(describe, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.CalledProcessError, subprocess.TimeoutExpired):
        return "unknown"
