"""Held-out loss of finished students: the loss against a second computation, which rows it uses, and bad input."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModel

from data_prep.__main__ import main as data_prep
from data_prep.shards import ShardSet
from pipeline.__main__ import main
from pipeline.data.batches import BatchOptions, BatchSource
from pipeline.distillation.relations.reference import relation_kl_reference
from pipeline.errors import UserError
from pipeline.evaluation.encoder import load_encoder
from pipeline.evaluation.heldout import HeldoutConfig, check_input, evaluate_heldout, settings_of
from pipeline.evaluation.ranks import alone
from pipeline.evaluation.training_metadata import DEFAULTS, training_metadata
from tests.conftest import SAMPLES


@pytest.fixture
def config(tiny_teacher: Path, tiny_shards: Path) -> HeldoutConfig:
    settings = {"heads": 12, "seq_len": 32, "heldout_rows": 2, "batch_size": 3}
    return HeldoutConfig(teacher=f"{tiny_teacher}@3", data=str(tiny_shards), **settings)


def student_of(teacher: Path, directory: Path, **recipe: object) -> Path:
    """A copy of the teacher with a lineage."""
    shutil.copytree(teacher, directory)
    (directory / "lineage.json").write_text(json.dumps({"recipe": recipe}))
    return directory


@torch.inference_mode()
def test_the_loss_equals_the_reference_on_the_held_out_rows(
    tiny_teacher: Path, tiny_shards: Path, config: HeldoutConfig
) -> None:
    name = f"{tiny_teacher}@2"
    result = evaluate_heldout([load_encoder(name)], config, alone())[name]
    source = BatchSource(ShardSet(tiny_shards), BatchOptions(32, alpha=0.3, seed=5, heldout_rows=2))
    assert list(result["per_language"]) == source.languages
    model = AutoModel.from_pretrained(tiny_teacher, add_pooling_layer=False).eval()
    for language in source.languages:
        rows = torch.from_numpy(source.heldout(language))
        states = model(rows, output_hidden_states=True).hidden_states
        expected = 0.0
        for letter in ("query", "key", "value"):
            teacher, student = (
                getattr(model.encoder.layer[layer].attention.self, letter)(states[layer]) for layer in (2, 1)
            )
            expected += float(relation_kl_reference(teacher, student, 12))
        assert result["per_language"][language] == pytest.approx(expected, rel=1e-4)


def test_the_loss_of_a_teacher_against_itself_is_zero(tiny_teacher: Path, config: HeldoutConfig) -> None:
    result = evaluate_heldout([load_encoder(f"{tiny_teacher}@3")], config, alone())[f"{tiny_teacher}@3"]
    assert result["mean"] == pytest.approx(0.0, abs=1e-5)


def test_rows_are_those_that_training_left_out(tiny_teacher: Path, tmp_path: Path) -> None:
    trained = {"seq_len": 48, "heldout_rows": 3, "languages": ["sw", "tr"], "documents": "separate"}
    encoders = [load_encoder(str(tiny_teacher)), load_encoder(str(student_of(tiny_teacher, tmp_path / "a", **trained)))]
    assert settings_of(encoders, HeldoutConfig()) == {**DEFAULTS, **trained}
    assert settings_of(encoders, HeldoutConfig(seq_len=32)) == {**DEFAULTS, **trained, "seq_len": 32}
    assert settings_of(encoders[:1], HeldoutConfig()) == DEFAULTS
    other = load_encoder(str(student_of(tiny_teacher, tmp_path / "b", **{**trained, "heldout_rows": 4})))
    with pytest.raises(UserError, match="different `heldout_rows`"):
        settings_of([*encoders, other], HeldoutConfig())
    restart = load_encoder(str(student_of(tiny_teacher, tmp_path / "c", **trained, positions="restart")))
    with pytest.raises(UserError, match="different `positions`"):
        settings_of([encoders[1], restart], HeldoutConfig())
    assert settings_of([restart], HeldoutConfig())["positions"] == "restart"
    assert settings_of([restart], HeldoutConfig(documents="joined"))["positions"] == "continue"
    with pytest.raises(UserError, match=r"heldout\.documents: separate"):
        settings_of(encoders[:1], HeldoutConfig(positions="restart"))
    assert settings_of([*encoders, other], HeldoutConfig(heldout_rows=4))["heldout_rows"] == 4


def test_layers_and_relations_are_those_of_the_training(
    tiny_teacher: Path, tiny_shards: Path, config: HeldoutConfig, tmp_path: Path
) -> None:
    relations = {"teacher_layer": 2, "student_layer": 3, "heads": 8, "pairs": {"q-k": 2.0, "v-v": 1.0}}
    student = str(student_of(tiny_teacher, tmp_path / "a", relations=relations))
    rows = {"data": str(tiny_shards), "seq_len": 32, "heldout_rows": 1}
    result = evaluate_heldout([load_encoder(student)], HeldoutConfig(str(tiny_teacher), **rows), alone())[student]
    assert [result[key] for key in ("teacher_layer", "values_layer", "heads")] == [2, 3, 8]
    named = HeldoutConfig(f"{tiny_teacher}@2", heads=8, pairs={"q-k": 2.0, "v-v": 1.0}, **rows)
    by_name = evaluate_heldout([load_encoder(f"{tiny_teacher}@3")], named, alone())[f"{tiny_teacher}@3"]
    assert by_name["per_language"] == result["per_language"]
    assert result["mean"] > 0
    for changed in (HeldoutConfig(f"{tiny_teacher}@1", **rows), HeldoutConfig(str(tiny_teacher), heads=4, **rows)):
        other = evaluate_heldout([load_encoder(student)], changed, alone())[student]
        assert other["mean"] != pytest.approx(result["mean"]), "a setting overrides the lineage"

    deep = student_of(tiny_teacher, tmp_path / "b", relations={**relations, "teacher_layer": 4})
    both = [load_encoder(student), load_encoder(str(deep))]
    with pytest.raises(UserError, match=r"different `teacher_layer`.*--teacher \S+teacher0@2 "):
        settings_of(both, HeldoutConfig(str(tiny_teacher)))
    assert settings_of(both, HeldoutConfig(f"{tiny_teacher}@3"))["teacher_layer"] == 3


@pytest.mark.parametrize(
    ("relations", "expected"),
    [
        ({}, (None, None)),
        ({"teacher_layer": 19, "student_layer": None}, (19, None)),
        (
            {"layers": [{"teacher": 8, "student": 2}, {"teacher": 19, "student": 6}, {"teacher": 4, "student": 1}]},
            (19, 6),
        ),
    ],
)
def test_of_several_matched_layers_the_highest_is_used(tmp_path: Path, relations: dict, expected: tuple) -> None:
    (tmp_path / "lineage.json").write_text(json.dumps({"recipe": {"steps": 1, "relations": relations}}))
    found = training_metadata(tmp_path)
    assert (found["teacher_layer"], found["student_layer"]) == expected
    (tmp_path / "lineage.json").write_text(json.dumps({"trimmed": {"from": "a"}}))
    assert training_metadata(tmp_path) == {}
    (tmp_path / "lineage.json").write_text('{"recipe": 1}')
    with pytest.raises(UserError, match="is corrupt"):
        training_metadata(tmp_path)


def test_the_command(tiny_teacher: Path, tiny_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["evaluate", str(tiny_teacher), f"{tiny_teacher}@2", "--tasks", "heldout", "--output", str(tmp_path)]
    command += ["--teacher", str(tiny_teacher), "--data", str(tiny_shards)]
    main(
        command + [word for key in ("heads=12", "seq_len=32", "heldout_rows=1") for word in ("--set", f"heldout.{key}")]
    )
    results = json.loads((tmp_path / "evaluation.json").read_text())["tasks"]["heldout"]
    assert results[str(tiny_teacher)]["mean"] < 1e-5 < results[f"{tiny_teacher}@2"]["mean"]
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith(f"{tiny_teacher}@2 "))
    assert row.split()[-1] == f"{results[f'{tiny_teacher}@2']['mean']:.4f}"


# -- bad input


def test_no_teacher_and_no_shards(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--teacher"):
        check_input(HeldoutConfig())
    with pytest.raises(UserError, match="python -m data_prep prepare"):
        check_input(HeldoutConfig(teacher="a", data=str(tmp_path / "shards")))


def test_a_model_with_another_tokenizer_is_rejected(tiny_teacher: Path, config: HeldoutConfig, tmp_path: Path) -> None:
    other = shutil.copytree(tiny_teacher, tmp_path / "other")
    model = other / "sentencepiece.bpe.model"
    model.write_bytes(model.read_bytes() + b"\x00")
    encoder = load_encoder(str(tiny_teacher))
    encoder.path = str(other)
    with pytest.raises(UserError, match="another tokenizer"):
        evaluate_heldout([encoder], config, alone())


def test_the_tokenizer_file_that_determines_ids_is_compared(
    tiny_teacher: Path, config: HeldoutConfig, tmp_path: Path
) -> None:
    """As in CamemBERT: the directory has a SentencePiece model, but the shards were made with tokenizer.json."""
    student = Path(shutil.copytree(tiny_teacher, tmp_path / "student"))
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<pad>"}
    (student / "tokenizer_config.json").write_text(json.dumps(about))
    text = str(SAMPLES / "cc100" / "sw.txt.xz")
    words = ["prepare", "--input", text, "--tokenizer", str(student), "--output", str(tmp_path / "shards")]
    assert data_prep(words) == 0
    config.data, config.teacher = str(tmp_path / "shards"), str(student)
    encoder = load_encoder(str(student))
    assert evaluate_heldout([encoder], config, alone())[encoder.name]["mean"] == pytest.approx(0.0, abs=1e-5)

    other = Path(shutil.copytree(student, tmp_path / "other"))
    (other / "sentencepiece.bpe.model").unlink()
    (other / "tokenizer.json").write_bytes((other / "tokenizer.json").read_bytes() + b"\n")
    encoder.path = str(other)
    with pytest.raises(UserError, match=r"another tokenizer than .*other/tokenizer\.json"):
        evaluate_heldout([encoder], config, alone())


def test_rows_longer_than_the_positions(tiny_teacher: Path, config: HeldoutConfig) -> None:
    config.seq_len = 65
    with pytest.raises(UserError, match=r"--set heldout\.seq_len=64"):
        evaluate_heldout([load_encoder(str(tiny_teacher))], config, alone())
