"""Invalid model directories and every command that loads one: exit code 2, one paragraph, no code of the model runs."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForMaskedLM, AutoModelForSequenceClassification

from pipeline.__main__ import main
from pipeline.distillation.models.teacher import load_encoder
from pipeline.errors import EXIT_USER, UserError, exit_code_of
from tests.conftest import REPO
from tests.tiny_encoders import CONFIGS, random_rows, tiny_encoder

Change = Callable[[Path], object]
LAYER = "encoder.layer.2.output.dense.weight"


def weights(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor] | None]) -> Change:
    def apply(directory: Path) -> None:
        tensors = load_file(directory / "model.safetensors")
        save_file(change(tensors) or tensors, directory / "model.safetensors", {"format": "pt"})

    return apply


def config(**changes: object) -> Change:
    """Set keys of config.json; None removes one."""

    def apply(directory: Path) -> None:
        tree = {**json.loads((directory / "config.json").read_text()), **changes}
        (directory / "config.json").write_text(
            json.dumps({key: value for key, value in tree.items() if value is not None})
        )

    return apply


def file(name: str, content: bytes) -> Change:
    return lambda directory: (directory / name).write_bytes(content)


def sharded(change: Callable[[dict[str, str]], object]) -> Change:
    """Two files and an index, which `change` edits."""

    def apply(directory: Path) -> None:
        tensors = load_file(directory / "model.safetensors")
        (directory / "model.safetensors").unlink()
        names = sorted(tensors)
        place = {name: f"model-0000{1 + (number > 30)}-of-00002.safetensors" for number, name in enumerate(names)}
        for part in set(place.values()):
            save_file({name: tensors[name] for name in names if place[name] == part}, directory / part)
        change(place)
        (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": place}))

    return apply


def linked_outside(directory: Path) -> None:
    """An index that names a file of another directory, which exists."""
    shutil.copyfile(directory / "model.safetensors", directory.parent / "other.safetensors")
    sharded(lambda place: place.update(dict.fromkeys(place, "../other.safetensors")))(directory)


def cut(directory: Path) -> None:
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def a_pipe(directory: Path) -> None:
    """Opening it would block indefinitely."""
    (directory / "model.safetensors").unlink()
    os.mkfifo(directory / "model.safetensors")


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 471000000\n"
MODELS: dict[str, tuple[Change, str]] = {
    "names of torch.compile": (weights(lambda w: {f"_orig_mod.{k}": v for k, v in w.items()}), r"`_orig_mod\."),
    "names of DDP": (weights(lambda w: {f"module.{k}": v for k, v in w.items()}), r"begin with `module\.`"),
    "names of a trainer": (weights(lambda w: {f"model.{k}": v for k, v in w.items()}), r"begin with `model\.`"),
    "names of another architecture": (
        weights(lambda w: {f"bert.{k}": v for k, v in w.items()}),
        r"lack weights.*`bert\.",
    ),
    "a weight that is missing": (weights(lambda w: {k: v for k, v in w.items() if k != LAYER}), LAYER),
    "a bias that is missing": (
        weights(lambda w: {k: v for k, v in w.items() if k != "embeddings.LayerNorm.bias"}),
        r"LayerNorm\.bias",
    ),
    "no tensor": (weights(lambda w: {"pooler.dense.bias": torch.zeros(48)}), "lack weights"),
    "a layer too many in the config": (config(num_hidden_layers=5), r"`encoder\.layer\.4`"),
    "a layer too many in the file": (config(num_hidden_layers=3), r"encoder\.layer\.3.*does not use"),
    "distances of relative positions": (
        weights(lambda w: w.update({"encoder.layer.0.attention.self.distance_embedding.weight": torch.zeros(9, 12)})),
        "distance_embedding.*does not use",
    ),
    "relative positions": (config(position_embedding_type="relative_key"), "position_embedding_type"),
    "an adapter inside": (
        weights(lambda w: w.update({"encoder.layer.0.attention.self.query.lora_A.weight": torch.zeros(2, 48)})),
        "lora_A",
    ),
    "an adapter in the directory": (file("adapter_config.json", b"{}"), "adapter"),
    "a weight under two names": (weights(lambda w: w.update({f"roberta.{LAYER}": w[LAYER] + 1})), "twice"),
    "another width": (config(hidden_size=96), r"is \[\d+(, \d+)*\] in its files and \["),
    "more rows in the config": (config(vocab_size=3000), r"\[2002, 48\] in its files and \[3000, 48\]"),
    "NaN": (weights(lambda w: w[LAYER].__setitem__(0, float("nan"))), f"NaN or infinity in `{LAYER}`"),
    "infinity": (weights(lambda w: w[LAYER].__setitem__(0, float("inf"))), "NaN or infinity"),
    "8-bit weights": (weights(lambda w: w.update({LAYER: w[LAYER].to(torch.int8)})), "unquantised"),
    "fp8 weights": (weights(lambda w: w.update({LAYER: w[LAYER].to(torch.float8_e4m3fn)})), "unquantised"),
    "bitsandbytes": (config(quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True}), "unquantised"),
    "gptq": (config(quantization_config={"quant_method": "gptq", "bits": 4}), "unquantised"),
    "awq, incomplete": (config(quantization_config={"bits": 4}), "unquantised"),
    "weights named by the config": (config(transformers_weights="x.safetensors"), "transformers_weights"),
    "a config named by the config": (config(configuration_files=["config.4.0.0.json"]), "configuration_files"),
    "code of its own": (config(auto_map={"AutoConfig": "evil.C", "AutoModel": "evil.M"}), "auto_map"),
    "code and a type of its own": (config(model_type="evil", auto_map={"AutoModel": "evil.M"}), "'evil'"),
    "no type": (config(model_type=None), "model_type"),
    "a decoder": (config(is_decoder=True), "decoder"),
    "a width in words": (config(hidden_size="48"), "hidden_size"),
    "a width of 0": (config(hidden_size=0), "hidden_size"),
    "layers below 0": (config(num_hidden_layers=-1), "num_hidden_layers"),
    "a billion layers": (config(num_hidden_layers=10**9), "num_hidden_layers"),
    "a billion rows": (config(vocab_size=10**9), "config.json"),
    "heads that do not divide": (config(num_attention_heads=7), "config.json"),
    "an unknown activation": (config(hidden_act="no-such"), "no-such"),
    "a norm in words": (config(layer_norm_eps="tiny"), "layer_norm_eps"),
    "a dropout of 5": (config(hidden_dropout_prob=5.0), "dropout"),
    "config: a list": (file("config.json", b"[]"), "model_type"),
    "config: not JSON": (file("config.json", b'{"model_type": "bert"'), "not readable JSON"),
    "config: deep": (file("config.json", b"[" * 200_000), "not readable JSON"),
    "config: NaN": (file("config.json", b'{"model_type": "xlm-roberta", "layer_norm_eps": NaN}'), "NaN"),
    "config: not UTF-8": (file("config.json", b'{"model_type": "\xff\xfe"}'), "not readable JSON"),
    "config: a pointer": (file("config.json", POINTER), "lfs pull"),
    "config: missing": (lambda directory: (directory / "config.json").unlink(), "config.json is missing"),
    "weights: a pointer": (file("model.safetensors", POINTER), "lfs pull"),
    "weights: cut": (cut, "cut short or corrupt"),
    "weights: empty": (file("model.safetensors", b""), "cut short or corrupt"),
    "weights: something else": (file("model.safetensors", b"PK\x03\x04" + bytes(500)), "cut short or corrupt"),
    "weights: a pipe": (a_pipe, r"holds no model\.safetensors"),
    "weights: pickled": (
        lambda directory: (directory / "model.safetensors").rename(directory / "pytorch_model.bin"),
        r"holds no model\.safetensors",
    ),
    "weights: without an index": (
        lambda directory: (directory / "model.safetensors").rename(directory / "model-1.safetensors"),
        "no index",
    ),
    "index: pickle": (sharded(lambda place: place.update({LAYER: "pytorch_model.bin"})), r"names 'pytorch_model\.bin'"),
    "index: another directory": (linked_outside, r"names '\.\./other\.safetensors'"),
    "index: an absolute path": (sharded(lambda place: place.update({LAYER: "/tmp/x.safetensors"})), "names '/tmp"),
    "index: a missing file": (
        sharded(lambda place: place.update({"x": "gone.safetensors"})),
        r"gone\.safetensors is miss",
    ),
    "index: half of it": (
        sharded(lambda place: [place.pop(k) for k, v in list(place.items()) if "00002-of" in v]),
        "lack weights",
    ),
    "index: not an index": (
        lambda directory: (
            (directory / "model.safetensors").unlink(),
            file("model.safetensors.index.json", b'{"weight_map": ["a"]}')(directory),
        ),
        "no index of weights",
    ),
}


@pytest.fixture
def changed(tiny_teacher: Path, tmp_path: Path) -> Callable[[Change], Path]:
    """A changed copy of the tiny teacher."""

    def make(change: Change) -> Path:
        directory = shutil.copytree(tiny_teacher, tmp_path / "changed")
        change(directory)
        return directory

    return make


def error_of(command: Callable[[], object], capsys: pytest.CaptureFixture) -> str:
    capsys.readouterr()
    assert exit_code_of(command) == EXIT_USER
    written = capsys.readouterr().err
    assert "Traceback" not in written
    assert written.splitlines()[-1].startswith("error: ")
    return written.splitlines()[-1]


@pytest.mark.parametrize("kind", MODELS)
def test_no_such_model_is_loaded_as_a_teacher_or_evaluated(
    kind: str, changed: Callable[[Change], Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    change, cause = MODELS[kind]
    directory, output = changed(change), tmp_path / "evaluation"
    as_teacher = error_of(lambda: load_encoder(directory), capsys)
    words = ["evaluate", str(directory), "--tasks", "speed", "--output", str(output)]
    evaluated = error_of(lambda: main(words), capsys)
    assert re.search(cause, as_teacher)
    assert str(directory) in as_teacher
    assert evaluated == as_teacher.replace("the teacher", "the model")
    assert not output.exists()


SOME = ("names of torch.compile", "distances of relative positions", "gptq", "weights: a pointer", "config: deep")


@pytest.mark.parametrize("kind", SOME)
def test_trim_and_heldout_use_the_same_loader(
    kind: str,
    changed: Callable[[Change], Path],
    tiny_teacher: Path,
    tiny_shards: Path,
    vocabulary: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    change, cause = MODELS[kind]
    directory, output = str(changed(change)), str(tmp_path / "output")
    trim = ["trim", directory, "--vocabulary", str(vocabulary), "--output", output]
    words = ["--tasks", "heldout", "--teacher", directory, "--data", str(tiny_shards), "--output", output]
    for command in (trim, ["evaluate", str(tiny_teacher), *words, "--set", "heldout.seq_len=32"]):
        assert re.search(cause, error_of(lambda command=command: main(command), capsys))
        assert not Path(output).exists()


TOKENIZERS = {
    "code of its own": ("tokenizer_config.json", b'{"auto_map": {"AutoTokenizer": ["evil.T", null]}}', "own code"),
    "a list": ("tokenizer_config.json", b"[]", "not readable JSON"),
    "a pointer": ("sentencepiece.bpe.model", POINTER, "lfs pull"),
    "empty": ("tokenizer.json", b"{}", "no tokenizer that loads"),
    "deep": ("tokenizer.json", b"[" * 200_000, "no tokenizer that loads"),
}


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_no_such_tokenizer_is_evaluated(
    kind: str, changed: Callable[[Change], Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    name, content, cause = TOKENIZERS[kind]
    directory = changed(file(name, content))
    (directory / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    words = ["evaluate", str(directory), "--tasks", "speed", "--output", str(tmp_path / "evaluation")]
    assert re.search(cause, error_of(lambda: main(words), capsys))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("kind", ["gptq", "code of its own", "weights: cut", "config: deep"])
def test_no_card_is_written_for_an_invalid_model(
    kind: str, changed: Callable[[Change], Path], capsys: pytest.CaptureFixture
) -> None:
    change, cause = MODELS[kind]
    directory = changed(change)
    (directory / "lineage.json").write_text(json.dumps({"teacher": "a", "recipe": {"steps": 1}}))
    assert re.search(cause, error_of(lambda: main(["card", str(directory)]), capsys))
    assert not (directory / "README.md").exists()


@pytest.mark.parametrize("kind", SOME)
def test_plan_and_doctor_report_it(
    kind: str, changed: Callable[[Change], Path], tiny_recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    change, cause = MODELS[kind]
    override = ["--recipe", str(tiny_recipe), "--set", f"teacher={changed(change)}"]
    capsys.readouterr()
    assert exit_code_of(lambda: main(["doctor", *override, "--run-dir", str(tmp_path / "run")])) == EXIT_USER
    written = capsys.readouterr()
    assert "Traceback" not in written.out + written.err
    assert re.search(cause, written.out)
    if kind in ("gptq", "config: deep"):  # a plan reads the config alone
        machine = ["--gpu", "a100-80", "--deepspeed", str(REPO / "ds_configs" / "zero2.json")]
        assert re.search(cause, error_of(lambda: main(["plan", *override, *machine]), capsys))


# -- tensors that are ignored


@pytest.mark.parametrize("model_type", [name for name in CONFIGS if name not in ("distilbert",)])
@pytest.mark.parametrize("head", [AutoModelForMaskedLM, AutoModelForSequenceClassification])
def test_an_encoder_is_read_out_of_a_model_with_a_head(model_type: str, head: type, tmp_path: Path) -> None:
    bare, rows = tiny_encoder(model_type), random_rows(2, 12)
    model = head.from_config(bare.config)  # type: ignore[attr-defined]
    model.base_model.load_state_dict(bare.state_dict(), strict=False)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(load_encoder(tmp_path)(rows)[0], bare(rows)[0])


def test_tensors_of_older_releases_are_ignored_or_renamed(tiny_teacher: Path, tmp_path: Path) -> None:
    """position_ids as a tensor, and gamma and beta of norms."""
    directory = shutil.copytree(tiny_teacher, tmp_path / "old")
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}

    def rename(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        for new, name in old.items():
            tensors = {key.replace(new, name): tensor for key, tensor in tensors.items()}
        return {**tensors, "embeddings.position_ids": torch.arange(66)[None]}

    weights(rename)(directory)
    now, then = load_encoder(directory).state_dict(), load_encoder(tiny_teacher).state_dict()
    assert all(torch.equal(now[name], then[name]) for name in then)


def test_positions_that_only_debertas_decoder_reads(tmp_path: Path) -> None:
    tiny_encoder("deberta-v2").save_pretrained(tmp_path)
    extra = {"embeddings.position_embeddings.weight": torch.zeros(80, 48)}
    weights(lambda tensors: {**tensors, **extra})(tmp_path)
    load_encoder(tmp_path)
    config(relative_attention=False, position_biased_input=True)(tmp_path)
    with pytest.raises(UserError, match=r"rel_embeddings.*does not use"):
        load_encoder(tmp_path)


def test_a_cache_of_links_is_loaded_like_a_directory(tiny_teacher: Path, tmp_path: Path) -> None:
    """The layout of the hub's cache: a snapshot of links to files that are named by their hash."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / ("a" * 40)
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted(tiny_teacher.iterdir())):
        shutil.copyfile(path, blobs / f"{number:040x}")
        (snapshot / path.name).symlink_to(Path("../..") / "blobs" / f"{number:040x}")
    load_encoder(snapshot)
