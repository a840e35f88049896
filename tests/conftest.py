"""Fixtures shared by all tests: a real but tiny SentencePiece model in XLM-R's layout, and tiny teachers that use it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.tiny_tokenizer import TINY_PIECES, make_tiny_tokenizer

# Tests look at answers, not at speed, and several ranks share two cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

REPO = Path(__file__).resolve().parent.parent
SAMPLES = REPO / "samples"
LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
TINY_VOCAB = TINY_PIECES + 2  # fairseq ids: every piece moves up by one, <mask> comes last


def first_on_python_path(root: Path) -> str:
    """PYTHONPATH for a subprocess: `root`, then the inherited entries (packages that `pip install --target` put there)."""
    return os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that prepare text run first: `prepare` forks, and a fork of a process in which other tests have left threads
    (TensorBoard's servers, the compiler's pool) may hang. pytest-xdist keeps this order with --no-loadscope-reorder."""
    items.sort(key=lambda item: REPO / "tests/unit/data_prep" not in item.path.parents)


@pytest.fixture(autouse=True)
def leaves_no_launcher() -> Iterator[None]:
    """`read_launch` completes the environment, and every rank and Slurm job that a later test starts inherits it."""
    before = {name: os.environ.get(name) for name in LAUNCHER_VARIABLES}
    yield
    after = {name: os.environ.get(name) for name in LAUNCHER_VARIABLES}
    assert after == before, "this test changed the launcher's variables: let it use the fixture no_launcher"


@pytest.fixture
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """No launcher and no Slurm; what `read_launch` sets is taken back after the test."""
    slurm = [name for name in os.environ if name.startswith("SLURM") or name == "ALLOW_CPU_RANKS"]
    for name in (*LAUNCHER_VARIABLES, *slurm):
        monkeypatch.setenv(name, "")  # so that it is put back, or removed again
        monkeypatch.delenv(name)
    return monkeypatch


@pytest.fixture(scope="session")
def tiny_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory with `sentencepiece.bpe.model` (2000 pieces) and `tokenizer_config.json`."""
    return make_tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def tiny_teacher(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Path) -> Path:
    """A randomly initialised XLM-RoBERTa (4 layers of 48, vocabulary of the tiny tokenizer) as a Hugging Face directory."""
    return make_tiny_teacher(tmp_path_factory.mktemp("teacher"), tiny_tokenizer)


@pytest.fixture(scope="session")
def tiny_shards(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Path) -> Path:
    """Shards of four sample languages under the tiny tokenizer, made by the real command."""
    return make_tiny_shards(tmp_path_factory.mktemp("shards") / "shards", tiny_tokenizer)


@pytest.fixture(scope="session")
def vocabulary(tiny_teacher: Path, tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What Swahili and Turkish use."""
    from data_prep.__main__ import main

    output = tmp_path_factory.mktemp("vocabulary") / "small"
    words = ["--tokenizer", tiny_teacher, "--shards", tiny_shards, "--languages", "sw,tr", "--output", output]
    assert main(["trim-vocab", *map(str, words)]) == 0
    return output


@pytest.fixture(scope="session")
def tiny_recipe(tmp_path_factory: pytest.TempPathFactory, tiny_teacher: Path, tiny_shards: Path) -> Path:
    """A recipe of twelve fp32 steps that takes seconds; everything else is the product's own."""
    return write_tiny_recipe(tmp_path_factory.mktemp("recipe") / "tiny.yaml", tiny_teacher, tiny_shards)


@pytest.fixture(scope="session")
def fp32_config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ds_configs/zero2.json without fp16: what losses are compared in."""
    return write_fp32_config(tmp_path_factory.mktemp("ds") / "zero2_fp32.json")


def make_tiny_teacher(directory: Path, tokenizer: Path) -> Path:
    import torch
    from transformers import AutoTokenizer, XLMRobertaConfig, XLMRobertaModel

    config = XLMRobertaConfig(
        vocab_size=TINY_VOCAB,
        hidden_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=96,
        max_position_embeddings=66,
        type_vocab_size=1,
        layer_norm_eps=1e-5,
        initializer_range=0.2,  # random relations far from uniform, so that there is something to learn
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    torch.manual_seed(1)
    XLMRobertaModel(config, add_pooling_layer=False).save_pretrained(directory)
    for file in tokenizer.iterdir():
        (directory / file.name).write_bytes(file.read_bytes())
    AutoTokenizer.from_pretrained(directory).save_pretrained(directory)
    return directory


def make_tiny_shards(directory: Path, tokenizer: Path) -> Path:
    inputs = [str(SAMPLES / "cc100" / f"{language}.txt.xz") for language in ("hi", "sw", "he", "tr")]
    command = [sys.executable, "-m", "data_prep", "prepare", "--input", *inputs, "--tokenizer", str(tokenizer)]
    subprocess.run([*command, "--output", str(directory)], cwd=REPO, check=True, capture_output=True)
    return directory


def write_tiny_recipe(path: Path, teacher: Path, shards: Path) -> Path:
    path.write_text(
        f"""
teacher: {teacher}
data: {shards}
steps: 12
global_batch: 8
micro_batch_per_gpu: 4
seq_len: 32
heldout_rows: 2
relations: {{heads: 12, teacher_layer: 3}}
student: {{layers: 2, hidden: 24, heads: 4, dropout: 0.0}}
teacher_options: {{dtype: fp32}}
optimizer: {{lr: 3.0e-3, warmup_steps: 2}}
save_every: 4
eval_every: 6
metrics: {{log_every: 1}}
"""
    )
    return path


def write_fp32_config(path: Path, shipped: str = "zero2") -> Path:
    """A shipped DeepSpeed config without fp16."""
    config = json.loads((REPO / "ds_configs" / f"{shipped}.json").read_text())
    del config["fp16"]
    path.write_text(json.dumps(config))
    return path
