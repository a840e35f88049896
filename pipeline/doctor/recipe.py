"""What `python -m pipeline doctor --recipe R` finds out about one run: recipe, batch, shards, teacher, memory, disk.

In: a recipe and a DeepSpeed JSON. Out: a list of `Finding`. Models are built without storage from their configs, so that
this takes seconds whatever their size; weights are looked at by their files' headers. Used by doctor.py.
"""

from __future__ import annotations

import contextlib
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModel, PretrainedConfig, PreTrainedModel
from transformers.utils import cached_file

from data_prep.shards import DataError, ShardSet
from pipeline.config import Recipe, load_recipe
from pipeline.distillation.models.loading import blank_model, check_weights, load_config
from pipeline.distillation.models.model_files import looks_like_path, read_model
from pipeline.distillation.models.student import student_hf_config
from pipeline.distillation.models.student_init import copied_layers
from pipeline.distillation.models.vocabulary import read_vocabulary
from pipeline.distillation.tap import tap
from pipeline.doctor.machine import Finding, guarded
from pipeline.errors import UserError
from pipeline.runtime import preflight
from pipeline.runtime.host_memory import available_memory_bytes
from pipeline.runtime.preflight import nearest_directory
from pipeline.training.checks import Check, Inputs, start_up_checks

FILES_OPEN_ANYWAY = 256  # by Python, torch and TensorBoard


@dataclass(frozen=True)
class Sizes:
    """Parameters of a run's models, counted without building them."""

    teacher: int
    trained: int
    untrained: int

    @property
    def checkpoint_bytes(self) -> int:
        return 12 * self.trained + 4 * self.untrained


def recipe_findings(
    recipe_path: Path, overrides: list[str], ds_path: Path, run_dir: Path, ranks: int | None, check_hashes: bool
) -> list[Finding]:
    """In the order in which a run would meet them; what rests on a failed part is left out."""
    try:
        recipe = load_recipe(recipe_path, overrides)
    except UserError as error:
        return [Finding("fail", "recipe", str(error))]
    num_ranks = ranks or torch.cuda.device_count() or 1
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    inputs = Inputs(recipe, recipe_path, ds_path, num_ranks, device, lambda recipe: blank_models(recipe)[1])
    found: list[Finding] = []
    failed: set[str] = set()
    for check in start_up_checks(inputs):
        if check.subject == "teacher":
            weights = teacher_finding(recipe)
            found.append(weights)
            failed |= {"teacher"} if weights.status != "ok" else set()
        if failed.isdisjoint({check.subject, *check.needs}):
            looked = findings_of(check)
            found += looked
            failed |= {finding.subject for finding in looked if finding.status == "fail"}
            if check.subject == "shards" and "shards" not in failed:
                found += more_about_shards(recipe, check_hashes)
    if failed.isdisjoint({"teacher", "tokenizer"}):
        try:
            sizes = count_parameters(recipe)
        except UserError as error:  # the student has no such layer
            return [*found, Finding("fail", "student", str(error))]
        found += [memory_finding(sizes, num_ranks), guarded("disk", lambda: disk_finding(recipe, sizes, run_dir))]
    return found


def findings_of(check: Check) -> list[Finding]:
    """What a run's own start-up check finds, without stopping at an error."""
    try:
        found = check.look()
    except (UserError, DataError) as error:
        return [Finding("fail", check.subject, str(error))]
    if check.subject == "batch":  # what the DeepSpeed JSON falls back to on this device
        return [Finding("ok", check.subject, "; ".join([found.what, *found.warnings]))]
    ok = [Finding("ok", check.subject, found.what)] if found.what else []
    return [*ok, *(Finding("warn", check.subject, warning, check.fix) for warning in found.warnings)]


def more_about_shards(recipe: Recipe, check_hashes: bool) -> Iterator[Finding]:
    """Open files, and the hash of every shard where that was asked for."""
    shards = ShardSet(recipe.data)
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    needed = len(shards.all_shards()) + FILES_OPEN_ANYWAY
    if limit != resource.RLIM_INFINITY and limit < needed:
        what = f"{len(shards.all_shards())} shards, but only {limit} files may be open"
        yield Finding("warn", "shards", what, f"ulimit -n {needed}")
    if check_hashes:
        command = [sys.executable, "-m", "data_prep", "verify", recipe.data]
        done = subprocess.run(command, capture_output=True, text=True)
        problems = [line.removeprefix("error: ") for line in done.stderr.splitlines() if line.startswith("error: ")]
        fix = (done.stderr.strip().splitlines() or [""])[-1]  # names the languages to make again
        yield from (Finding("fail", "shards", problem, fix) for problem in problems)
        if not problems:
            yield Finding("ok", "shards", "every hash as in the manifest")


def teacher_finding(recipe: Recipe) -> Finding:
    """The weights are on this machine, without pickle."""
    path = Path(recipe.teacher).expanduser()
    if not path.is_dir() and not looks_like_path(recipe.teacher) and not is_cached(recipe.teacher):
        fix = f"on a node with network: hf download {recipe.teacher} (compute nodes then read the cache, HF_HOME)"
        return Finding("warn", "teacher", f"{recipe.teacher} is a hub name and not in the cache yet", fix)
    return guarded("teacher", lambda: weights_finding(recipe.teacher))


def is_cached(name: str) -> bool:
    """Config and weights of a hub model are on this machine."""
    try:
        cached_file(name, "config.json", local_files_only=True, trust_remote_code=False)
    except OSError:
        return False
    for weights in ("model.safetensors", "model.safetensors.index.json"):
        with contextlib.suppress(OSError):
            cached_file(name, weights, local_files_only=True, trust_remote_code=False)
            return True
    return False


def weights_finding(name: str) -> Finding:
    """The files are there, their headers can be read, and they hold what a model of its config has."""
    files = read_model(name)
    check_weights(files, load_config(name))
    tensors = files.tensors
    size = sum(file.stat().st_size for file in {tensor.file for tensor in tensors.values()})
    return Finding("ok", "teacher", f"{name}: {len(tensors)} tensors, {size / 2**30:.2f} GiB of safetensors")


def blank_models(recipe: Recipe) -> tuple[PretrainedConfig, PreTrainedModel, PreTrainedModel]:
    """The teacher's config, and teacher and student without storage."""
    config = load_config(recipe.teacher)
    if recipe.vocabulary is not None:
        config.vocab_size = len(read_vocabulary(recipe.vocabulary))
    num_layers = config.num_hidden_layers
    taps = recipe.relations.teacher_taps or num_layers
    highest = taps if isinstance(taps, int) else max(taps)
    chosen = copied_layers(num_layers, recipe.student.layers, recipe.student.init_layers, highest)
    with torch.device("meta"):
        teacher = blank_model(config, recipe.teacher)
        student = AutoModel.from_config(student_hf_config(config, recipe.student, chosen))
    return config, teacher, student


def count_parameters(recipe: Recipe) -> Sizes:
    """As a run would split them: what the tap reaches is trained, less what is frozen."""
    _, teacher, student = blank_models(recipe)
    tapped = tap(
        student, recipe.relations.student_taps or recipe.student.layers, **recipe.relations.tap_options, role="student"
    )
    reached = {id(parameter): parameter.numel() for parameter in tapped.parameters()}
    if recipe.student.freeze:
        reached.pop(id(student.get_input_embeddings().weight))
    trained = sum(reached.values())
    return Sizes(teacher.num_parameters(), trained, student.num_parameters() - trained)


def memory_finding(sizes: Sizes, num_ranks: int) -> Finding:
    """Every rank of a node loads the whole teacher in fp32 before it is cut and halved."""
    needed = 4 * sizes.teacher + 16 * sizes.trained + 4 * sizes.untrained
    available = available_memory_bytes()
    what = (
        f"teacher {sizes.teacher / 1e6:.0f} M parameters; student {sizes.trained / 1e6:.1f} M trained, "
        f"{sizes.untrained / 1e6:.1f} M carried along: a rank holds {needed / 2**30:.1f} GiB of host memory while it starts"
    )
    if needed * num_ranks > available:
        fix = "start fewer ranks on this node, or take one with more memory"
        return Finding("warn", "memory", f"{what}; {available / 2**30:.1f} GiB are free for {num_ranks} of them", fix)
    return Finding("ok", "memory", what)


def disk_finding(recipe: Recipe, sizes: Sizes, run_dir: Path) -> Finding:
    """Room for the newest checkpoints, and for the milestones that a run leaves over its whole length."""
    keeping, where = recipe.checkpoint, nearest_directory(run_dir)
    preflight.check_disk(where, sizes.checkpoint_bytes, keeping.keep, 0)
    what = f"{keeping.keep} checkpoints of {sizes.checkpoint_bytes / 2**30:.2f} GiB"
    num_milestones = recipe.steps // keeping.keep_every if keeping.keep_every else 0
    if num_milestones == 0:
        return Finding("ok", "disk", f"{what} fit")
    # A milestone shares what is carried along with the newest ones (checkpoint_writer.py), wherever files can be linked.
    milestone_bytes = 12 * sizes.trained if files_can_be_linked(where) else sizes.checkpoint_bytes
    needed = sizes.checkpoint_bytes * (keeping.keep + 1) + milestone_bytes * num_milestones
    what += f" and {num_milestones} milestones (checkpoint.keep_every) of {milestone_bytes / 2**30:.2f} GiB"
    free = shutil.disk_usage(where).free
    if free < needed:
        what += f" take {needed / 2**30:.1f} GiB with the one being written, {where} has {free / 2**30:.1f} GiB free"
        return Finding("warn", "disk", what, "raise checkpoint.keep_every, or move milestones away in time")
    return Finding("ok", "disk", f"{what} fit")


def files_can_be_linked(directory: Path) -> bool:
    """Two names for one file: what a checkpoint's unchanging weights are kept with."""
    try:
        with tempfile.TemporaryDirectory(dir=directory, prefix=".doctor-") as probe:
            (Path(probe) / "one").touch()
            (Path(probe) / "two").hardlink_to(Path(probe) / "one")
    except OSError:
        return False
    return True
