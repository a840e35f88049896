"""Errors of a user: one paragraph with what is wrong, where, and the fix; exit code 2; no files left."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file, save_file

from pipeline.errors import EXIT_USER, exit_code_of
from pipeline.runtime.dist import shut_down
from pipeline.runtime.stop import STOP_SIGNALS
from pipeline.train import main

Run = Callable[..., str]


@pytest.fixture
def error_of(
    tmp_path: Path, tiny_recipe: Path, fp32_config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> Iterator[Run]:
    """Run pipeline/train.py's main with overrides that it must reject. Returns the one paragraph that it printed."""
    handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    run_dir = tmp_path / "run"

    def run(*overrides: str, recipe: Path = tiny_recipe, ds: Path = fp32_config) -> str:
        sets = [word for override in overrides for word in ("--set", override)]
        arguments = ["--deepspeed", str(ds), "--recipe", str(recipe), "--run-dir", str(run_dir), *sets]
        monkeypatch.setattr(sys, "argv", ["pipeline/train.py", *arguments])
        assert exit_code_of(main) == EXIT_USER
        shut_down()  # after an error the process would end without it
        error = capsys.readouterr().err
        assert "Traceback" not in error
        paragraphs = [line for line in error.splitlines() if line.startswith("error: ")]
        assert len(paragraphs) == 1, error
        assert not run_dir.exists(), "a run that was rejected left files"
        return paragraphs[0]

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE", "LOCAL_RANK"])
def test_a_rank_that_is_not_a_number(name: str, error_of: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_PORT", "29500")
    monkeypatch.setenv(name, "two")
    assert f"{name} is 'two'" in error_of()


def test_missing_recipe_lists_the_recipes(error_of: Run) -> None:
    error = error_of(recipe=Path("recipes/quikstart.yaml"))
    assert "recipes/quikstart.yaml" in error
    assert "recipes/quickstart.yaml" in error


def test_options_cannot_be_abbreviated(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """An option of a later version must not change the meaning of an abbreviation."""
    monkeypatch.setattr(sys, "argv", ["pipeline/train.py", "--deepspeed", "x.json", "--allow"])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == EXIT_USER
    assert "unrecognized arguments: --allow" in capsys.readouterr().err


def test_unknown_key_names_the_nearest(error_of: Run) -> None:
    assert "did you mean `alpha`" in error_of("alfa=0.3")
    assert "`student.layer`" in error_of("student.layer=3")


def test_wrong_type(error_of: Run) -> None:
    assert "`steps` must be int, not 'many'" in error_of("steps=many")
    assert "alpha is 3.0" in error_of("alpha=3")


def test_missing_shards_name_the_command(error_of: Run, tmp_path: Path) -> None:
    assert "python -m data_prep prepare" in error_of(f"data={tmp_path / 'nowhere'}")


def test_missing_teacher_names_the_command(error_of: Run) -> None:
    assert "make demo" in error_of("teacher=artifacts/no_such_teacher")


def test_unknown_architecture_lists_the_known(error_of: Run, tmp_path: Path, tiny_teacher: Path) -> None:
    other = copy_of(tiny_teacher, tmp_path)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "model_type": "gpt2", "architectures": ["GPT2Model"]}))
    error = error_of(f"teacher={other}")
    assert "gpt2" in error
    assert "xlm-roberta" in error


def test_layer_out_of_range(error_of: Run) -> None:
    for role, last in (("teacher", 4), ("student", 2)):
        error = error_of(f"relations.{role}_layer=9")
        assert f"no layer 9 in the {role}" in error
        assert f"layers 1 to {last}" in error
        assert f"relations.{role}_layer" in error


def test_relation_heads_that_do_not_divide(error_of: Run) -> None:
    error = error_of("relations.heads=7")
    assert "7" in error
    assert "one of: 1, 2, 3, 4, 6, 8, 12, 24" in error
    error = error_of("relations.heads=24", "student.hidden=32")  # the teacher's width is 48
    assert error.endswith("one of: 1, 2, 4, 8, 16")


@pytest.mark.parametrize("override", ["relations.tail_weight=-1", "relations.pairs={q-q: .nan}"])
def test_invalid_relation_weights(error_of: Run, override: str) -> None:
    assert override.partition("=")[0] in error_of(override)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("relations.teacher_layer=99", "no layer 99 in the teacher"),
        ("relations.teacher_layer=-1", "no layer -1 in the teacher"),
        ("relations.heads=7", "7"),
        ("relations.heads=0", "0"),
        ("student.hidden=96", "the student is 96 wide"),
    ],
)
def test_a_projected_student_is_rejected_before_the_teacher_runs(override: str, words: str, error_of: Run) -> None:
    assert words in error_of("student.init=project", override)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("init=layrs", "`student.init` is 'layrs'; it must be one of random, layers, project, or an encoder"),
        ("init=~no-such-user/x", "encoder of `student.init` not found: ~no-such-user/x is not a directory"),
        ("init=./nowhere", "encoder of `student.init` not found: ./nowhere is not a directory"),
        ("layers=3", r"layers 4, not 3 (`student.layers`). For a student of this shape: --set student.layers=4"),
        ("init_layers=[1, 2, 3, 4]", "`student.init_layers` names layers of the teacher"),
    ],
)
def test_an_encoder_to_start_from(change: str, words: str, error_of: Run, tiny_teacher: Path) -> None:
    assert words in error_of(
        f"student={{layers: 4, hidden: 48, heads: 4, ffn: 96, init: {tiny_teacher}}}", f"student.{change}"
    )


def test_an_encoder_to_start_from_with_other_content(error_of: Run, tmp_path: Path, tiny_teacher: Path) -> None:
    start = shutil.copytree(tiny_teacher, tmp_path / "start")
    overrides = ("student={layers: 4, hidden: 48, heads: 4, ffn: 96}", f"student.init={start}")
    weights = start / "model.safetensors"
    tensors = load_file(weights)
    tensors["encoder.layer.1.output.dense.weight"][0, 0] = float("inf")
    save_file(tensors, weights, {"format": "pt"})
    error = error_of(*overrides)
    assert (
        f"the encoder of `student.init` '{start}' cannot be loaded: it holds NaN or infinity in `encoder.layer.1"
        in error
    )
    model = start / "sentencepiece.bpe.model"
    model.write_bytes(model.read_bytes() + b"\x00")
    error = error_of(*overrides)
    assert f"the encoder of `student.init` '{start}' has another tokenizer (sha256 " in error
    assert "than the teacher's (sha256 " in error
    for file in (*start.glob("*.model"), *start.glob("tokenizer*")):
        file.unlink()
    assert f"copy the tokenizer files of the model that it was made from into {start}" in error_of(*overrides).lower()
    (start / "config.json").rename(start / "run.json")
    error = error_of(*overrides)
    assert "which is a run directory. Export the student and start from that: " in error
    assert f"-m pipeline export {start} " in error


def test_attention_heads_that_do_not_divide(error_of: Run) -> None:
    assert "student.heads" in error_of("student.heads=5")


def test_tokenizer_of_other_shards(error_of: Run, tmp_path: Path, tiny_teacher: Path) -> None:
    other = copy_of(tiny_teacher, tmp_path)
    model = other / "sentencepiece.bpe.model"
    model.write_bytes(model.read_bytes() + b"\x00")
    assert "another tokenizer" in error_of(f"teacher={other}")


def test_a_tokenizer_with_other_ids_than_the_shards(error_of: Run, tmp_path: Path, tiny_teacher: Path) -> None:
    """The SentencePiece model has the hash that the shards name, and the teacher's tokenizer still gives other ids."""
    other = copy_of(tiny_teacher, tmp_path)
    settings = json.loads((other / "tokenizer_config.json").read_text())
    (other / "tokenizer_config.json").write_text(json.dumps({**settings, "add_prefix_space": False}))
    error = error_of(f"teacher={other}")
    assert "are not those of AutoTokenizer.from_pretrained" in error
    assert "save_pretrained" in error


def test_token_id_beyond_the_vocabulary(error_of: Run, tmp_path: Path, tiny_teacher: Path) -> None:
    from transformers import AutoModel

    small = tmp_path / "small"
    model = AutoModel.from_pretrained(tiny_teacher, add_pooling_layer=False)
    model.resize_token_embeddings(500)
    model.save_pretrained(small)
    shutil.copy(tiny_teacher / "sentencepiece.bpe.model", small)
    error = error_of(f"teacher={small}")
    assert "2002" in error
    assert "500" in error


def test_truncated_shard_names_the_file(error_of: Run, tmp_path: Path, tiny_shards: Path) -> None:
    shards = copy_of(tiny_shards, tmp_path)
    victim = next((shards / "tr").glob("*.tok"))
    victim.write_bytes(victim.read_bytes()[:-100])
    assert victim.name in error_of(f"data={shards}")


def test_too_little_text_for_one_row(error_of: Run) -> None:
    # sw has the least text; positions of the tiny teacher end at 64, but text is looked at first
    error = error_of("seq_len=60000")
    assert "sw" in error


def test_sequence_longer_than_the_positions(error_of: Run) -> None:
    assert "positions for 64" in error_of("seq_len=65")


def test_batch_that_does_not_divide(error_of: Run) -> None:
    assert "micro_batch_per_gpu could be 1, 2, 4, 8" in error_of("micro_batch_per_gpu=3")


def test_vocabulary_of_another_language(error_of: Run) -> None:
    assert "xx" in error_of("languages=[tr, xx]")


def test_weights_of_a_missing_language(error_of: Run) -> None:
    assert "xx" in error_of("language_weights={hi: 1, sw: 1, he: 1, tr: 1, xx: 2}")


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda config: {**config, "quantization_config": {"quant_method": "fp8"}}, "unquantised"),
        (lambda config: {**config, "num_hidden_layers": 3}, "does not use"),
        (lambda config: {**config, "num_hidden_layers": 10**9}, "num_hidden_layers"),
        (lambda config: {**config, "auto_map": {"AutoModel": "evil.Model"}}, "auto_map"),
    ],
)
def test_teacher_config_that_does_not_match_its_weights(
    spoil: Callable[[dict], dict], words: str, error_of: Run, tmp_path: Path, tiny_teacher: Path
) -> None:
    other = shutil.copytree(tiny_teacher, tmp_path / "teacher")
    (other / "config.json").write_text(json.dumps(spoil(json.loads((other / "config.json").read_text()))))
    error = error_of(f"teacher={other}")
    assert words in error
    assert str(other) in error


def test_nan_in_the_teacher(error_of: Run, tmp_path: Path, tiny_teacher: Path) -> None:
    from safetensors.torch import load_file, save_file

    other = copy_of(tiny_teacher, tmp_path)
    weights = load_file(other / "model.safetensors")
    name = next(name for name in weights if name.endswith("layer.1.output.dense.weight"))
    weights[name][0, 0] = float("nan")
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    assert name in error_of(f"teacher={other}")


def test_deepspeed_json(error_of: Run, tmp_path: Path, fp32_config: Path) -> None:
    base = json.loads(fp32_config.read_text())

    def with_changes(**changes: object) -> Path:
        path = tmp_path / "ds.json"
        path.write_text(json.dumps({**base, **changes}))
        return path

    assert "ds_configs/zero2.json" in error_of(ds=Path("ds_configs/zero9.json"))
    assert "did you mean `gradient_clipping`" in error_of(ds=with_changes(gradient_cliping=1.0))
    both = error_of(ds=with_changes(gradient_clipping=2.5))
    assert "2.5" in both
    assert "ds.json" in both
    assert "tiny.yaml" in both
    adam = {"type": "AdamW", "params": {"lr": 0.5}}
    assert "`lr` to 0.5" in error_of(ds=with_changes(optimizer=adam))
    assert "stage is 0" in error_of(ds=with_changes(zero_optimization={"stage": 0}))
    assert "scheduler" in error_of(ds=with_changes(scheduler={"type": "WarmupLR"}))
    (tmp_path / "ds.json").write_text("{")
    assert "not valid JSON" in error_of(ds=tmp_path / "ds.json")


def test_recipe_that_is_not_a_mapping_or_runs_code(error_of: Run, tmp_path: Path) -> None:
    hostile = tmp_path / "hostile.yaml"
    hostile.write_text("!!python/object/apply:os.system ['touch /tmp/owned']")
    assert "not readable YAML" in error_of(recipe=hostile)
    hostile.write_text("- just\n- a list")
    assert "key: value" in error_of(recipe=hostile)


def test_port_in_use(error_of: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        monkeypatch.setenv("MASTER_PORT", str(other.getsockname()[1]))
        monkeypatch.setenv("WORLD_SIZE", "2")  # one rank alone meets nobody
        assert "--master_port" in error_of()


def test_resolved_recipe_reads_back_equal(tiny_recipe: Path, tmp_path: Path) -> None:
    from pipeline.config import load_recipe, recipe_to_yaml

    recipe = load_recipe(tiny_recipe, ["optimizer.lr=5e-4", "languages=[tr]"])
    assert recipe.optimizer.lr == 5e-4
    again = tmp_path / "again.yaml"
    again.write_text(recipe_to_yaml(recipe))
    assert load_recipe(again, []) == recipe
    assert yaml.safe_load(again.read_text())["languages"] == ["tr"]


def copy_of(directory: Path, tmp_path: Path) -> Path:
    return shutil.copytree(directory, tmp_path / "copy")
