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

from data_prep.shards import ShardSet
from pipeline.config import Recipe, load_recipe
from pipeline.data.tokenizer_hash import compare_ids
from pipeline.distillation.models.loading import blank_model, check_weights, load_config
from pipeline.distillation.models.model_files import looks_like_path, read_model
from pipeline.distillation.models.student import student_hf_config
from pipeline.distillation.models.student_init import copied_layers
from pipeline.distillation.models.vocabulary import read_vocabulary
from pipeline.distillation.relations.loss import check_heads
from pipeline.distillation.tap import tap
from pipeline.doctor.machine import Finding, guarded
from pipeline.errors import UserError
from pipeline.runtime import ds_config, preflight
from pipeline.runtime.engine import device_precisions
from pipeline.runtime.host_memory import available_memory_bytes
from pipeline.training.build import check_fit, open_data
from pipeline.training.recipe_warnings import recipe_warnings

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
    found = [guarded("batch", lambda: batch_finding(recipe, recipe_path, ds_path, num_ranks))]
    shards = guarded("shards", lambda: shards_finding(recipe))
    found += [shards, *([] if shards.status == "fail" else more_about_shards(recipe, check_hashes))]
    teacher = teacher_findings(recipe, shards_are_there=shards.status != "fail")
    found += teacher
    if all(finding.status == "ok" for finding in teacher):
        if shards.status != "fail":
            found.append(guarded("ids", lambda: ids_finding(recipe)))
        sizes = count_parameters(recipe)
        found += [memory_finding(sizes, num_ranks), guarded("disk", lambda: disk_finding(recipe, sizes, run_dir))]
    return found


def batch_finding(recipe: Recipe, recipe_path: Path, ds_path: Path, num_ranks: int) -> Finding:
    """Recipe and DeepSpeed JSON agree, and the batch divides."""
    batch = ds_config.split_batch(recipe.global_batch, recipe.micro_batch_per_gpu, num_ranks)
    can = device_precisions(torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu"))
    _, warnings = ds_config.resolve(ds_path, str(recipe_path), recipe.optimizer, batch, num_ranks, can)
    what = f"{recipe.global_batch} rows = {batch.micro_batch} x {batch.accumulation} x {num_ranks} rank(s)"
    return Finding("ok", "batch", "; ".join([what, *warnings]))


def shards_finding(recipe: Recipe) -> Finding:
    """There, whole by size, and long enough for the recipe's rows."""
    source = open_data(recipe)
    shards = source.shards
    tokens = sum(shards.num_tokens(language) for language in source.languages)
    epochs = recipe.steps * recipe.global_batch * recipe.seq_len / max(tokens, 1)
    return Finding(
        "ok",
        "shards",
        f"{recipe.data}: {len(source.languages)} languages, {tokens / 1e6:,.1f} M tokens, sizes as in the manifest; the run "
        f"reads {epochs:.1f} times as many",
    )


def ids_finding(recipe: Recipe) -> Finding:
    """Ids in the shards are those that users of the teacher's tokenizer get."""
    what, warnings = compare_ids(recipe.tokenizer, ShardSet(recipe.data))
    if warnings:
        return Finding(
            "warn", "ids", "; ".join([what, *warnings]), "python -m data_prep prepare ... --output NEW_DIRECTORY"
        )
    return Finding("ok", "ids", what)


def more_about_shards(recipe: Recipe, check_hashes: bool) -> Iterator[Finding]:
    """What a run would warn of, open files, and every byte's hash where that was asked for."""
    shards = ShardSet(recipe.data)
    for text in recipe_warnings(recipe, open_data(recipe)):
        yield Finding("warn", "recipe", text)
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


def teacher_findings(recipe: Recipe, shards_are_there: bool) -> list[Finding]:
    """Weights without pickle, a family that can be read, layers, heads, tokenizer."""
    path = Path(recipe.teacher).expanduser()
    if not path.is_dir() and not looks_like_path(recipe.teacher) and not is_cached(recipe.teacher):
        fix = f"on a node with network: hf download {recipe.teacher} (compute nodes then read the cache, HF_HOME)"
        return [Finding("warn", "teacher", f"{recipe.teacher} is a hub name and not in the cache yet", fix)]
    weights = guarded("teacher", lambda: weights_finding(recipe.teacher))
    if weights.status == "fail":
        return [weights]
    return [weights, guarded("teacher", lambda: shape_finding(recipe, shards_are_there))]


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


def shape_finding(recipe: Recipe, shards_are_there: bool) -> Finding:
    """Known family, layers and heads that exist, and the shards' tokenizer."""
    config, teacher, student = blank_models(recipe)
    relations, num_layers = recipe.relations, config.num_hidden_layers
    tapped = tap(teacher, relations.teacher_taps or num_layers, **relations.tap_options, role="teacher")
    tapped_student = tap(student, relations.student_taps or recipe.student.layers, role="student")
    widths = {"teacher": tapped.widths[0], "student": tapped_student.widths[0]}
    check_heads(widths["teacher"], relations.heads, "teacher", widths["student"])
    check_heads(widths["student"], relations.heads, "student", widths["teacher"])
    if shards_are_there:
        check_fit(recipe, ShardSet(recipe.data), teacher)
    agrees = "; tokenizer as the shards'" if shards_are_there else ""
    shape = f"{config.num_hidden_layers} layers x {config.hidden_size}"
    return Finding("ok", "teacher", f"{config.model_type}, {shape}, read at layer {tapped.layers}{agrees}")


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
    keeping, where = recipe.checkpoint, preflight.nearest_directory(run_dir)
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
