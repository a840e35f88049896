"""Every recipe that ships, dry-run at reduced size: a random teacher of its family and depth, an eighth as wide.

The reduction: teacher width, student width, FFN and relation heads are divided by EIGHTH, so that every head keeps its size and
whatever does not divide in the real recipe does not divide here; layers stay as they are, so that the distilled layer is
the real one; rows are an eighth as long, a batch is two micro-batches of one row, the vocabulary has 2002 pieces.
Everything else (layer, relations, tail, initialisation, placement, optimizer, schedule) is the recipe's own.
"""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from transformers import XLMRobertaTokenizer

from pipeline.config import load_recipe
from tests.conftest import REPO, TINY_VOCAB
from tests.dist.training_process import TrainingProcess
from tests.tiny_encoders import tiny_encoder

EIGHTH = 8
RECIPES = sorted((REPO / "recipes").glob("*.yaml"))


@dataclass(frozen=True)
class Teacher:
    """Facts about a teacher: its architecture and shape, and the layer that the paper (or else this project) reads."""

    family: str
    layers: int
    width: int
    attention_heads: int
    distilled_layer: int
    relation_heads: int
    ffn_ratio: float = 4.0


TEACHERS = {
    "artifacts/teacher": Teacher("bert", 12, 384, 12, 12, 48),  # the quickstart's: XLM-R's vocabulary in BERT's layout
    "FacebookAI/xlm-roberta-base": Teacher("xlm-roberta", 12, 768, 12, 12, 48),
    "FacebookAI/xlm-roberta-large": Teacher("xlm-roberta", 24, 1024, 16, 19, 64),
    "facebook/xlm-roberta-xl": Teacher("xlm-roberta-xl", 36, 2560, 32, 28, 64),
    "jhu-clsp/mmBERT-base": Teacher("modernbert", 22, 768, 12, 22, 48, ffn_ratio=1.5),
    "intfloat/multilingual-e5-base": Teacher("xlm-roberta", 12, 768, 12, 12, 48),
    "intfloat/multilingual-e5-large": Teacher("xlm-roberta", 24, 1024, 16, 19, 64),
    "BAAI/bge-m3": Teacher("xlm-roberta", 24, 1024, 16, 19, 64),
    "google-bert/bert-base-uncased": Teacher("bert", 12, 768, 12, 12, 48),
    "FacebookAI/roberta-large": Teacher("roberta", 24, 1024, 16, 19, 64),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Path) -> dict[Teacher, Path]:
    """Teacher directories, made on first use."""

    class Made(dict):
        def __missing__(self, teacher: Teacher) -> Path:
            self[teacher] = make_teacher(teacher, tmp_path_factory.mktemp(teacher.family), tiny_tokenizer)
            return self[teacher]

    return Made()


def make_teacher(teacher: Teacher, directory: Path, tokenizer: Path) -> Path:
    width = teacher.width // EIGHTH
    ffn = int(width * teacher.ffn_ratio)
    sizes = {"hidden_size": width, "num_attention_heads": teacher.attention_heads, "intermediate_size": ffn}
    if teacher.family == "modernbert":
        every_third = ("full_attention", "sliding_attention", "sliding_attention")
        sizes["layer_types"] = [every_third[layer % 3] for layer in range(teacher.layers)]
    model = tiny_encoder(teacher.family, vocab_size=TINY_VOCAB, num_hidden_layers=teacher.layers, **sizes)
    model.save_pretrained(directory)
    # XLM-R's tokenizer with another architecture's config, as in multilingual-e5-small. Where the family's own class is
    # another one, AutoTokenizer reads tokenizer.json.
    shutil.copy(tokenizer / "sentencepiece.bpe.model", directory)
    XLMRobertaTokenizer.from_pretrained(str(tokenizer)).save_pretrained(directory)
    return directory


def reduced(recipe: dict, teacher_dir: Path, shards: Path) -> list[str]:
    """The overrides that reduce a recipe to this size."""
    changes = {
        "teacher": teacher_dir,
        "data": shards,
        "seq_len": recipe["seq_len"] // EIGHTH,
        "global_batch": 2,
        "micro_batch_per_gpu": 1,
        "relations.heads": recipe["relations"]["heads"] // EIGHTH,
        "student.hidden": recipe["student"]["hidden"] // EIGHTH,
    }
    if "ffn" in recipe["student"]:
        changes["student.ffn"] = recipe["student"]["ffn"] // EIGHTH
    for name, differs in recipe.get("students", {}).items():
        if hidden := ((differs or {}).get("student") or {}).get("hidden"):
            changes[f"students.{name}.student.hidden"] = hidden // EIGHTH
    return [word for key, value in changes.items() for word in ("--set", f"{key}={value}")]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_dry_run(
    path: Path, training: TrainingProcess, made: dict[Teacher, Path], tiny_shards: Path, tmp_path: Path
) -> None:
    recipe, members = yaml.safe_load(path.read_text()), load_recipe(path, []).members()
    teacher = TEACHERS[recipe["teacher"]]
    assert (recipe["relations"]["teacher_layer"], recipe["relations"]["heads"]) == (
        teacher.distilled_layer,
        teacher.relation_heads,
    )
    layers = sorted({member.relations.teacher_layer for member in members.values()})
    assert layers == [teacher.distilled_layer] or path.stem == "sweep_teacher_layer"
    words = ["--deepspeed", "ds_configs/zero2.json", "--recipe", path, "--run-dir", tmp_path / "run", "--dry-run"]
    tried = training.run(*words, *reduced(recipe, made[teacher], tiny_shards))
    assert tried.code == 0, tried.err
    assert f"read at layer {', '.join(map(str, layers))}, " in tried.out
    for name, member in members.items():
        shape = f"{member.student.layers} layers x {member.student.hidden // EIGHTH},"
        assert re.search(rf"^  student {name} +{shape}" if name else rf"^  student +{shape}", tried.out, re.MULTILINE)
    assert "micro-batch 1 x accumulation 2 x 1 rank(s)" in tried.out
    assert len(re.findall(r"^  loss.* [0-9.]+ \(q-q", tried.out, re.MULTILINE)) == len(members), tried.out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_header_says_what_it_promises(path: Path) -> None:
    """Paper, the exact command, hardware, time, memory, score, and what of that was measured."""
    lines = path.read_text().splitlines()
    header = "\n".join(line for line in lines[: next(i for i, line in enumerate(lines) if line[:1] != "#")])
    command = f"deepspeed pipeline/train.py --deepspeed ds_configs/zero2.json --recipe recipes/{path.name}"
    assert command in header or path.stem == "quickstart"
    for word in ("arXiv 2012.15828", "Hardware", "ime", "emory", "Score", "easured"):
        assert word in header, f"{path.name} does not say {word}"
