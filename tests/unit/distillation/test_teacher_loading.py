"""Loading a teacher: which files are read, which are rejected, and the messages."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from copy import deepcopy as copy_module

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.distillation.models.model_files import read_model
from pipeline.distillation.models.teacher import check_vocabulary, load_encoder, load_teacher
from pipeline.errors import UserError
from pipeline.training.identity import weights_hash
from tests.conftest import REPO, first_on_python_path
from tests.tiny_encoders import CONFIGS, VOCABULARY, random_rows, tiny_encoder


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    directory = tmp_path_factory.mktemp("teacher")
    tiny_encoder("xlm-roberta").save_pretrained(directory)
    return directory


@pytest.fixture
def copy(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "copy")


@pytest.mark.parametrize("model_type", CONFIGS)
def test_every_architecture_is_loaded_unchanged(model_type, tmp_path):
    model, rows = tiny_encoder(model_type), random_rows(2, 12)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(load_encoder(tmp_path)(rows)[0], model(rows)[0])


def test_half_precision_files_are_read_as_fp32(tmp_path):
    tiny_encoder("bert").half().save_pretrained(tmp_path)
    assert load_encoder(tmp_path).dtype == torch.float32


def test_a_sharded_file_set_loads(tmp_path):
    model, rows = tiny_encoder("bert"), random_rows(2, 12)
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    with torch.no_grad():
        assert torch.equal(load_encoder(tmp_path)(rows)[0], model(rows)[0])


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 1.25), (torch.float16, 1.75)], ids=str)
def test_a_sharded_teacher_is_not_held_twice(dtype, most, tmp_path):
    """Peak memory above a process that has loaded a small one, in sizes of the teacher in fp32. Files in half precision
    need half of it more while they are read."""
    big = tiny_encoder("xlm-roberta-xl", hidden_size=768, intermediate_size=3072, num_hidden_layers=4).to(dtype)
    big.save_pretrained(tmp_path / "big", max_shard_size="20MB")
    tiny_encoder("xlm-roberta-xl").save_pretrained(tmp_path / "small")
    program = (
        "from benchmarks.naive_baseline import added_peak_mb; from pipeline.distillation.models.teacher import load_encoder\n"
        "load_encoder('small'); print('peak', added_peak_mb(lambda: load_encoder('big')))"
    )
    environment = {**os.environ, "PYTHONPATH": first_on_python_path(REPO)}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    peak_mb = float(done.stdout.split("peak ")[1])
    size_mb = 4 * big.num_parameters() / 2**20
    assert 0.9 * size_mb < peak_mb < most * size_mb


def test_frozen_and_without_a_graph(saved):
    teacher = load_teacher(load_encoder(saved), 3, torch.bfloat16)
    teacher.train()
    assert not teacher.training
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    query, _, _ = teacher(random_rows(2, 12))
    assert query.dtype == torch.bfloat16
    assert query.is_inference()


def test_half_precision_leaves_rotary_positions_exact():
    """Frequencies in bf16 would give phase errors that grow with the position: here 0.3 of Q and K."""
    model = tiny_encoder("modernbert", max_position_embeddings=2048, num_attention_heads=1)
    rows = random_rows(1, 2048)
    exact, half = (
        load_teacher(copy_module(model), 1, dtype, after_rotary=True) for dtype in (torch.float32, torch.bfloat16)
    )
    assert {b.dtype for b in half.buffers() if b.is_floating_point()} == {torch.float32}
    for rounded, true in zip(half(rows), exact(rows), strict=True):
        assert rounded.dtype == torch.bfloat16
        assert (rounded.float() - true).norm() < 1e-2 * true.norm()


def test_dropout_is_off_even_in_training(saved):
    teacher, rows = load_teacher(load_encoder(saved), 3).train(), random_rows(2, 12)
    assert torch.equal(teacher(rows)[0], teacher(rows)[0])


@pytest.mark.parametrize("name", ["artifacts/no-such-teacher", "./no-such-teacher", "/no/such/teacher"])
def test_a_missing_directory_names_the_command(name):
    with pytest.raises(
        UserError, match=f"(?s)teacher not found: {name} is not a directory.*python -m demo.teacher --output"
    ):
        load_encoder(name)


def test_a_hub_name_without_network_is_one_paragraph(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"(?s)'no-such-owner/no-such-model' cannot be loaded.*network") as caught:
        load_encoder("no-such-owner/no-such-model")
    assert "\n" not in str(caught.value)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A filled cache in place of the hub, with one model in several files."""
    revision = "0123456789" * 4
    snapshot = tmp_path / "cache" / "models--some--teacher" / "snapshots" / revision
    tiny_encoder("bert").save_pretrained(snapshot, max_shard_size="50KB")
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text(revision)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return snapshot


def test_a_hub_name_is_read_from_the_cache(hub):
    model, rows = load_encoder("some/teacher"), random_rows(2, 12)
    with torch.no_grad():
        assert torch.equal(model(rows)[0], tiny_encoder("bert")(rows)[0])
    assert model.config._commit_hash == hub.name
    assert weights_hash(read_model("some/teacher")) == weights_hash(read_model(hub))


def test_a_hub_name_is_checked_like_a_directory(hub):
    index = hub / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("model-00001-of", "../model-00001-of"))
    with pytest.raises(UserError, match=r"the teacher 'some/teacher' cannot be loaded: .*names '\.\./model-00001"):
        load_encoder("some/teacher")
    index.unlink()
    (hub / "pytorch_model.bin").write_bytes(b"never read")
    with pytest.raises(UserError, match=r"'some/teacher' cannot be loaded: .*safetensors|no safetensors file of it"):
        load_encoder("some/teacher")


def test_without_safetensors(copy):
    (copy / "model.safetensors").unlink()
    (copy / "pytorch_model.bin").write_bytes(b"never read")
    with pytest.raises(UserError, match="safetensors"):
        load_encoder(copy)


def test_truncated_safetensors(copy):
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(UserError, match=f"(?s){copy.name}.*cannot be loaded"):
        load_encoder(copy)


def test_an_unknown_architecture(copy):
    (copy / "config.json").write_text(json.dumps({"model_type": "gpt2", "n_layer": 1}))
    with pytest.raises(UserError, match="gpt2"):
        load_encoder(copy)


def test_nan_in_the_weights_is_named(copy):
    tensors = load_file(copy / "model.safetensors")
    name = "encoder.layer.2.output.dense.weight"
    tensors[name][0, 0] = float("nan")
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=name):
        load_encoder(copy)


def test_missing_weights_are_not_random(copy):
    tensors = load_file(copy / "model.safetensors")
    del tensors["encoder.layer.2.output.dense.weight"]
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"encoder\.layer\.2\.output\.dense\.weight"):
        load_encoder(copy)


def test_vocabulary_of_the_shards_must_fit(saved):
    model = load_encoder(saved)
    check_vocabulary(model, VOCABULARY, "artifacts/shards")
    with pytest.raises(UserError, match=f"(?s)artifacts/shards.*{VOCABULARY + 1} ids.*{VOCABULARY} rows"):
        check_vocabulary(model, VOCABULARY + 1, "artifacts/shards")
