"""Fuzz: shard manifest and journal, checkpoint manifest and state, and the files that a resumed run reads.

In half of the trials the hashes are corrected: a program that edits such a file may do so as well.
"""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from data_prep.journal import Journal
from data_prep.manifest import write_manifest
from data_prep.shards import RUN_NAME, ShardSet, manifest_digest
from data_prep.verify import verify
from pipeline.errors import UserError
from pipeline.evaluation import results
from pipeline.evaluation.training_metadata import training_metadata
from pipeline.report.timeline import events_of
from pipeline.runtime.checkpoint import newest_valid, read_model_weights
from pipeline.runtime.checkpoint_files import corruption, fsync_and_hash
from pipeline.runtime.json_files import read_points
from pipeline.runtime.metrics import Metrics
from pipeline.runtime.restarts import Restarts
from pipeline.runtime.run_paths import RunPaths
from tests.fuzz.mutations import mutated_bytes, mutated_json, mutated_tree
from tests.fuzz.trials import fuzz, rejected_or_done
from tests.unit.made_up_run import make_run
from tests.unit.runtime.test_checkpoint_corruption import write


def listed(tree: Any) -> list[Any]:
    return tree if isinstance(tree, list) else [tree]


def dumped(tree: Any) -> bytes:
    return json.dumps(tree, indent=1).encode("utf-8", "surrogatepass")


def test_shard_manifest(tmp_path: Path, tiny_shards: Path) -> None:
    shards = shutil.copytree(tiny_shards, tmp_path / "shards")
    manifest = json.loads((shards / "manifest.json").read_text())

    def trial(seed: int, times: int) -> None:
        content = mutated_json(manifest, seed, times)
        if seed % 8 >= 4:
            tree = mutated_tree(manifest, seed, times)
            if isinstance(tree, dict):
                tree["manifest_xxh3_128"] = manifest_digest(tree)
            content = dumped(tree)
        (shards / "manifest.json").write_bytes(content)

        def read() -> None:
            opened = ShardSet(shards)
            for language in opened.languages:
                if num := opened.num_rows(language, 16):
                    opened.rows(language, np.array([0, num - 1]), 16)
            verify(shards)

        rejected_or_done(read)

    fuzz("shard manifest", trial, kept=[(30375621, 1), (4424479, 2)])


def test_shard_journal(tmp_path: Path, tiny_shards: Path) -> None:
    shards = shutil.copytree(tiny_shards, tmp_path / "shards")
    path, run_path = shards / "sw" / "journal.jsonl", shards / RUN_NAME
    journal, run = path.read_bytes(), run_path.read_bytes()

    def trial(seed: int, times: int) -> None:
        content = mutated_bytes(journal, seed, times)
        if seed % 2:
            lines = [json.loads(line.partition(b" ")[2]) for line in journal.splitlines()]
            content = b""
            for entry in listed(mutated_tree(lines, seed, times)):
                text = json.dumps(entry, ensure_ascii=False).encode("utf-8", "surrogatepass")
                content += xxhash.xxh3_64_hexdigest(text).encode() + b" " + text + b"\n"
        path.write_bytes(content)
        run_path.write_bytes(mutated_json(json.loads(run), seed, 1) if seed % 5 == 0 else run)
        rejected_or_done(lambda: Journal.read(shards / "sw"))
        rejected_or_done(lambda: write_manifest(shards))

    fuzz("shard journal", trial, kept=[(3179, 1), (39, 3), (91550, 1), (118420075, 1)])


def test_checkpoint(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    good = write(tmp_path / "good", 8)
    checkpoint = run_dir / "checkpoints" / good.name
    manifest, state = json.loads((good / "manifest.json").read_text()), json.loads((good / "state.json").read_text())

    def trial(seed: int, times: int) -> None:
        shutil.rmtree(run_dir, ignore_errors=True)
        shutil.copytree(good, checkpoint)
        kind = seed % 4
        if kind == 0:
            (checkpoint / "manifest.json").write_bytes(mutated_json(manifest, seed, times))
        elif kind == 1:
            tree = mutated_tree({key: manifest[key] for key in ("format", "files")}, seed, times)
            if isinstance(tree, dict):
                tree["sha256"] = hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()
            (checkpoint / "manifest.json").write_bytes(dumped(tree))
        else:
            victim = random.Random(seed).choice(sorted(checkpoint.glob("*.safetensors"))) if kind == 2 else None
            if victim is None:
                (checkpoint / "state.json").write_bytes(mutated_json(state, seed, times))
            else:
                victim.write_bytes(mutated_bytes(victim.read_bytes(), seed, times))
            content = {
                "format": manifest["format"],
                "files": {x.name: fsync_and_hash(x) for x in checkpoint.glob("*[!t].*")},
            }
            content["files"].pop("manifest.json", None)
            digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
            text = json.dumps({**content, "sha256": digest}, indent=1, sort_keys=True)
            (checkpoint / "manifest.json").write_text(text)
        rejected_or_done(lambda: corruption(checkpoint))
        rejected_or_done(lambda: newest_valid(run_dir / "checkpoints"))
        rejected_or_done(lambda: read_model_weights(run_dir))

    fuzz("checkpoint manifest and state", trial, kept=[(1482899, 4), (104013, 4), (17445171, 1)])


def test_run_directory_before_a_resume(tmp_path: Path) -> None:
    good = make_run(tmp_path / "good")
    names = ("restarts.json", "metrics.jsonl", "run.json", "retrieval/after.json")
    originals = {name: (good / name).read_bytes() for name in names}
    lineage = {"recipe": {"relations": {"layers": None, "heads": 12}, "seq_len": 128, "languages": ["de"]}, "steps": 8,
               "identity": {"teacher": "x"}, "languages": ["de", "th"]}  # fmt: skip
    evaluation = {"models": {"a": {"steps": 8}}, "tasks": {"retrieval": {"a": {"mean": 1.0}}}, "settings": {}}

    def trial(seed: int, times: int) -> None:
        for number, (name, content) in enumerate(originals.items()):
            changed = mutated_bytes(content, seed + number, times)
            if name.endswith(".json") and seed % 2:
                changed = mutated_json(json.loads(content), seed + number, times)
            elif seed % 2:
                rows = mutated_tree([json.loads(line) for line in content.splitlines()], seed, times)
                changed = b"\n".join(json.dumps(row).encode() for row in listed(rows)) + b"\n"
            (good / name).write_bytes(changed)
        (good / "lineage.json").write_bytes(mutated_json(lineage, seed, times))
        (good / "evaluation.json").write_bytes(mutated_json(evaluation, seed, times))
        rejected_or_done(lambda: events_of(good, read_points(good / "metrics.jsonl"), [4, 8]))
        rejected_or_done(lambda: training_metadata(good))
        rejected_or_done(lambda: results.read(good / "evaluation.json"))
        rejected_or_done(lambda: resume(good))

    fuzz("run directory", trial, kept=[(18335178, 1), (3261165, 2), (119429, 2), (158, 1), (79579, 1)])


def resume(run_dir: Path) -> None:
    """Read and rewrite the files next to the checkpoints as a new attempt does."""
    restarts = Restarts(run_dir)
    assert restarts.crashes_in_a_row >= 0
    assert restarts.slowest_save_s >= 0
    restarts.begin(4, 1)
    restarts.saved(5, 1.0)
    restarts.end("DONE")
    shutil.rmtree(run_dir / "tensorboard", ignore_errors=True)
    metrics = Metrics(RunPaths(run_dir), True, 4, 8)
    metrics.close()
    if not (run_dir / "metrics.jsonl").is_file():
        raise UserError("metrics.jsonl does not exist")
