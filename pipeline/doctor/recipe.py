"""Check one run: its start-up checks (training/checks.py), files of shards and teacher, memory and disk.

In: a recipe and a DeepSpeed JSON. Out: a list of `Finding`. Models are built without weights from their configs, and only
the headers of weight files are read, so that this takes seconds for a model of any size.
"""

from __future__ import annotations

import contextlib
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import PreTrainedModel
from transformers.utils import cached_file

from data_prep.command_line import program_command
from data_prep.shards import DataError, ShardSet
from pipeline.config import Recipe, load_recipe
from pipeline.distillation.models.loading import check_weights, load_config
from pipeline.distillation.models.model_files import looks_like_path, read_model
from pipeline.distillation.models.student_init import START_ENCODER
from pipeline.doctor.machine import Finding, guarded
from pipeline.errors import UserError, about_student
from pipeline.planning.meta_models import ADAM_BYTES, Sizes, blank_models, build_encoders
from pipeline.runtime import gpus, preflight
from pipeline.runtime.host_memory import available_memory_bytes
from pipeline.training.checks import Check, Inputs, checks_of_run, inputs_of
from pipeline.training.student_start import read_start

FILES_OPEN_ANYWAY = 256  # by Python, torch and TensorBoard


def recipe_findings(
    recipe_path: Path, overrides: list[str], ds_path: Path, run_dir: Path, ranks: int | None, check_hashes: bool
) -> list[Finding]:
    """All findings in the order of a run's start. A check is skipped where one that it needs has failed."""
    try:
        recipe = load_recipe(recipe_path, overrides)
    except UserError as error:
        return [Finding("fail", "recipe", str(error))]
    num_ranks = ranks or gpus.count() or 1
    device = torch.device("cuda", 0) if gpus.available() else torch.device("cpu")
    inputs = Inputs(recipe, recipe_path, ds_path, num_ranks, device, _blank_teacher)
    found: list[Finding] = []
    failed: set[str] = set()
    for check in checks_of_run(inputs_of(recipe, inputs)):
        if check.model is not None:
            weights = model_finding(check.subject, check.model)
            found += _not_said_before([weights], found)
            failed |= {check.subject} if weights.status != "ok" else set()
        if failed.isdisjoint({check.subject, *check.needs}):
            results = check_findings(check)
            found += _not_said_before(results, found)
            failed |= {finding.subject for finding in results if finding.status == "fail"}
            if check.subject == "shards" and "shards" not in failed:
                found += shard_file_findings(recipe, check_hashes)
    models = {"teacher", "tokenizer"}
    are_built = models.isdisjoint(subject.partition(" of ")[0] for subject in failed)
    return found + (size_findings(recipe, num_ranks, run_dir) if are_built else [])


def _not_said_before(results: list[Finding], found: list[Finding]) -> list[Finding]:
    """Without what an earlier finding says: students of a run often differ in little."""
    said = {(finding.status, finding.what) for finding in found}
    return [finding for finding in results if (finding.status, finding.what) not in said]


def _blank_teacher(recipe: Recipe) -> PreTrainedModel:
    return blank_models(recipe, load_config(recipe.teacher))[1]


def check_findings(check: Check) -> list[Finding]:
    """The findings of one start-up check of a run. An error becomes a failure."""
    try:
        found = check.look()
    except (UserError, DataError) as error:
        return [Finding("fail", check.subject, str(error))]
    # The warnings of this check name what the DeepSpeed JSON falls back to on this device.
    if check.subject.partition(" of ")[0] == "batch":
        return [Finding("ok", check.subject, "; ".join([found.what, *found.warnings]))]
    ok = [Finding("ok", check.subject, found.what)] if found.what else []
    return [*ok, *(Finding("warn", check.subject, warning, check.fix) for warning in found.warnings)]


def shard_file_findings(recipe: Recipe, check_hashes: bool) -> Iterator[Finding]:
    """The limit of open files, and with `check_hashes` the hash of every shard."""
    num_shards = len(ShardSet(recipe.data).all_shards())
    limit, needed = resource.getrlimit(resource.RLIMIT_NOFILE)[0], num_shards + FILES_OPEN_ANYWAY
    if limit != resource.RLIM_INFINITY and limit < needed:
        what = f"{num_shards} shards, but only {limit} files may be open"
        yield Finding("warn", "shards", what, f"ulimit -n {needed}")
    if check_hashes:
        command = [sys.executable, "-m", "data_prep", "verify", recipe.data]
        done = subprocess.run(command, capture_output=True, text=True)
        problems = [line.removeprefix("error: ") for line in done.stderr.splitlines() if line.startswith("error: ")]
        fix = (done.stderr.strip().splitlines() or [""])[-1]  # names the languages to prepare again
        yield from (Finding("fail", "shards", problem, fix) for problem in problems)
        if not problems:
            yield Finding("ok", "shards", "every hash as in the manifest")


def model_finding(subject: str, name: str) -> Finding:
    """The weights of the teacher, or of the encoder that the student starts from, are on this machine, complete, and not a
    pickle."""
    if not looks_like_path(name) and not Path(name).is_dir() and not is_cached(name):
        fix = f"on a node with network: {program_command('hf')} download {name} (compute nodes then read the cache, HF_HOME)"
        return Finding("warn", subject, f"{name} is a hub name and not in the cache yet", fix)
    return guarded(subject, lambda: weights_finding(subject, name))


def is_cached(name: str) -> bool:
    """Whether config and weights of a hub model are on this machine."""
    try:
        cached_file(name, "config.json", local_files_only=True, trust_remote_code=False)
    except OSError:
        return False
    for weights in ("model.safetensors", "model.safetensors.index.json"):
        with contextlib.suppress(OSError):
            cached_file(name, weights, local_files_only=True, trust_remote_code=False)
            return True
    return False


def weights_finding(subject: str, name: str) -> Finding:
    """The headers of the weight files can be read, and name every tensor of the config's model."""
    role = "teacher" if subject == "teacher" else START_ENCODER
    files = read_model(name, role) if subject == "teacher" else read_start(name)
    check_weights(files, load_config(name, role))
    size = sum(file.stat().st_size for file in {tensor.file for tensor in files.tensors.values()})
    return Finding("ok", subject, f"{name}: {len(files.tensors)} tensors, {size / 2**30:.2f} GiB of safetensors")


def size_findings(recipe: Recipe, num_ranks: int, run_dir: Path) -> list[Finding]:
    """Memory and disk for the sizes of teacher and students."""
    try:
        sizes = _sizes_of_run(recipe)
    except UserError as error:  # for example a student without such a layer
        return [Finding("fail", "student", str(error))]
    students = "student" if recipe.students is None else f"{len(recipe.students)} students"
    return [memory_finding(sizes, num_ranks, students), guarded("disk", lambda: disk_finding(recipe, sizes, run_dir))]


def _sizes_of_run(recipe: Recipe) -> Sizes:
    """One teacher, and all students together."""
    sizes = []
    for name, member in recipe.members().items():
        with about_student(name):
            sizes.append(build_encoders(member, load_config(member.teacher)).sizes)
    return Sizes(sizes[0].teacher, sum(each.trained for each in sizes), sum(each.untrained for each in sizes))


def memory_finding(sizes: Sizes, num_ranks: int, students: str) -> Finding:
    """Host memory at the start, when every rank of a node loads the complete teacher in fp32 and then cuts it."""
    needed = 4 * sizes.teacher + 16 * sizes.trained + 4 * sizes.untrained
    available = available_memory_bytes()
    what = (
        f"teacher {sizes.teacher / 1e6:.0f} M parameters; {students} {sizes.trained / 1e6:.1f} M trained, "
        f"{sizes.untrained / 1e6:.1f} M untrained: a rank needs {needed / 2**30:.1f} GiB of host memory when it starts"
    )
    if needed * num_ranks > available:
        fix = "start fewer ranks on this node, or use a node with more memory"
        return Finding("warn", "memory", f"{what}; {available / 2**30:.1f} GiB are free for {num_ranks} of them", fix)
    return Finding("ok", "memory", what)


def disk_finding(recipe: Recipe, sizes: Sizes, run_dir: Path) -> Finding:
    """Space for the newest checkpoints, and for the milestones of the complete run."""
    keeping, where = recipe.checkpoint, preflight.nearest_directory(run_dir)
    kept = keeping.num_newest_and_best(len(recipe.members()))
    preflight.check_disk(where, sizes.checkpoint_bytes, kept, 0)
    what = f"{kept} checkpoints of {sizes.checkpoint_bytes / 2**30:.2f} GiB"
    num_milestones = keeping.num_milestones(recipe.steps)
    if num_milestones == 0:
        return Finding("ok", "disk", f"{what} fit")
    # Where files can be linked, a milestone shares the untrained weights of the newest one (checkpoint_writer.py).
    milestone_bytes = ADAM_BYTES * sizes.trained if files_can_be_linked(where) else sizes.checkpoint_bytes
    needed = sizes.checkpoint_bytes * (kept + 1) + milestone_bytes * num_milestones
    what += f" and {num_milestones} milestones (checkpoint.keep_every) of {milestone_bytes / 2**30:.2f} GiB"
    free = shutil.disk_usage(where).free
    if free < needed:
        what += f" need {needed / 2**30:.1f} GiB with the one being written, {where} has {free / 2**30:.1f} GiB free"
        return Finding("warn", "disk", what, "raise checkpoint.keep_every, or move milestones away during the run")
    return Finding("ok", "disk", f"{what} fit")


def files_can_be_linked(directory: Path) -> bool:
    """Whether the file system has hard links."""
    try:
        with tempfile.TemporaryDirectory(dir=directory, prefix=".doctor-") as probe:
            (Path(probe) / "one").touch()
            (Path(probe) / "two").hardlink_to(Path(probe) / "one")
    except OSError:
        return False
    return True
