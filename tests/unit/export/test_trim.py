"""Models cut to a smaller vocabulary: hidden states of covered text are equal, and a wrong map is rejected."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from data_prep.shards import ShardSet
from pipeline.__main__ import main
from pipeline.config import load_recipe
from pipeline.distillation.models.sentence_files import sentence_settings
from pipeline.distillation.models.teacher import load_encoder, load_teacher
from pipeline.distillation.models.vocabulary import cut_embedding, read_vocabulary
from pipeline.errors import UserError
from pipeline.evaluation.encoder import load_encoder as load_with_tokenizer
from pipeline.evaluation.pooling import Dense, read_dense
from pipeline.evaluation.training_metadata import languages_of
from pipeline.export import trim
from pipeline.export.sentence_transformers_files import write_dense
from pipeline.planning.meta_models import build_encoders
from tests.tiny_encoders import tiny_encoder


@pytest.fixture(scope="module")
def trimmed(tiny_teacher: Path, vocabulary: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("trimmed") / "small"
    main(["trim", str(tiny_teacher), "--vocabulary", str(vocabulary), "--output", str(output)])
    return output


@torch.inference_mode()
@pytest.mark.parametrize("language", ["sw", "tr"])
def test_covered_text_gives_equal_hidden_states(
    tiny_teacher: Path, tiny_shards: Path, trimmed: Path, language: str
) -> None:
    ids = ShardSet(tiny_shards).stream(language, 0, 50)
    old, new = AutoTokenizer.from_pretrained(tiny_teacher), AutoTokenizer.from_pretrained(trimmed)
    text = old.decode(ids.tolist(), skip_special_tokens=True)
    models = [AutoModel.from_pretrained(directory).eval() for directory in (tiny_teacher, trimmed)]
    states = [
        model(**tokenizer(text, return_tensors="pt")).last_hidden_state
        for model, tokenizer in zip(models, (old, new), strict=True)
    ]
    assert torch.equal(*states)
    assert models[1].config.vocab_size == len(new) < models[0].config.vocab_size


@torch.inference_mode()
def test_a_teacher_cut_at_load_reads_the_same(tiny_teacher: Path, vocabulary: Path) -> None:
    """Q, K and V at the distilled layer, as in training."""
    kept = read_vocabulary(vocabulary)
    new_BL = trim.random_rows(kept, 1)[:4]
    full, cut = load_encoder(tiny_teacher), load_encoder(tiny_teacher)
    cut_embedding(cut, kept)
    assert cut.get_input_embeddings().weight.shape == (len(kept), 48)
    before, after = (load_teacher(model, 3) for model in (full, cut))
    assert all(map(torch.equal, before(kept.old_ids_V[new_BL]), after(new_BL)))


def test_plan_and_doctor_count_what_is_kept(tiny_recipe: Path, vocabulary: Path) -> None:
    full, small = (load_recipe(tiny_recipe, sets) for sets in ([], [f"vocabulary={vocabulary}"]))
    cut = 2002 - len(read_vocabulary(vocabulary))
    assert build_encoders(full).student_parameters - build_encoders(small).student_parameters == cut * 24
    assert build_encoders(full).trained_parameters - build_encoders(small).trained_parameters == cut * 24


def test_the_files_of_a_trimmed_model(tiny_teacher: Path, trimmed: Path, vocabulary: Path) -> None:
    about = json.loads((trimmed / "vocabulary.json").read_text())
    assert about == json.loads((vocabulary / "vocabulary.json").read_text())
    lineage = json.loads((trimmed / "lineage.json").read_text())["trimmed"]
    assert lineage["from"] == str(tiny_teacher)
    assert lineage["pieces"] == [2002, about["vocab_size"]]
    card = (trimmed / "README.md").read_text()
    for text in ("sw, tr", f"{about['vocab_size']:,} of 2,002 pieces", "| hi |"):
        assert text in card


def test_a_trimmed_model_keeps_its_projection_of_sentence_vectors(
    tiny_teacher: Path, vocabulary: Path, tmp_path: Path
) -> None:
    source = Path(shutil.copytree(tiny_teacher, tmp_path / "source"))
    random = torch.Generator().manual_seed(0)
    dense = Dense(torch.randn(20, 48, generator=random), torch.randn(20, generator=random), "Tanh")
    write_dense(source, dense)
    trim.trim(source, read_vocabulary(vocabulary), tmp_path / "trimmed")
    kept = read_dense(tmp_path / "trimmed")
    assert kept is not None
    assert kept.bias_E is not None
    assert torch.equal(kept.weight_Ed, dense.weight_Ed)
    assert torch.equal(kept.bias_E, torch.as_tensor(dense.bias_E))
    assert kept.activation == "Tanh"


def test_a_projection_that_is_not_known_is_not_replaced_by_another(
    tiny_teacher: Path, vocabulary: Path, tmp_path: Path
) -> None:
    source = Path(shutil.copytree(tiny_teacher, tmp_path / "source"))
    (source / "2_Dense").mkdir()
    (source / "2_Dense" / "config.json").write_text('{"activation_function": "torch.nn.modules.activation.GELU"}')
    with pytest.raises(
        UserError, match=r"2_Dense has the activation GELU; known here: Identity, Tanh.*move .*2_Dense away"
    ):
        trim.trim(source, read_vocabulary(vocabulary), tmp_path / "trimmed")
    assert not (tmp_path / "trimmed").exists()


def test_modules_that_a_trimmed_model_does_not_have_are_named(
    tiny_teacher: Path, vocabulary: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = Path(shutil.copytree(tiny_teacher, tmp_path / "source"))
    kinds = {"": "Transformer", "1_Pooling": "Pooling", "2_Dense": "Dense", "3_LSTM": "LSTM"}
    modules = [{"path": path, "type": f"sentence_transformers.models.{kind}"} for path, kind in kinds.items()]
    (source / "1_Pooling").mkdir()
    (source / "1_Pooling" / "config.json").write_text('{"pooling_mode_cls_token": true}')
    (source / "modules.json").write_text(json.dumps(modules))
    trim.trim(source, read_vocabulary(vocabulary), tmp_path / "trimmed")
    assert "the trimmed model has no Dense, LSTM, which" in capsys.readouterr().err
    write_dense(source, Dense(torch.eye(48)))
    trim.trim(source, read_vocabulary(vocabulary), tmp_path / "trimmed")
    assert "the trimmed model has no LSTM, which" in capsys.readouterr().err


POOLINGS = ({"pooling_mode_cls_token": True}, {"pooling_mode_max_tokens": True})


@pytest.mark.parametrize("pooling", POOLINGS, ids=["cls", "max"])
def test_a_trimmed_model_makes_sentence_vectors_as_before(
    pooling: dict[str, bool], tiny_teacher: Path, vocabulary: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = Path(shutil.copytree(tiny_teacher, tmp_path / "source"))
    kinds = {"": "Transformer", "1_Pooling": "Pooling"}
    modules = [{"path": path, "type": f"sentence_transformers.models.{kind}"} for path, kind in kinds.items()]
    (source / "1_Pooling").mkdir()
    (source / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 48, **pooling}))
    (source / "modules.json").write_text(json.dumps(modules))
    (source / "config_sentence_transformers.json").write_text(json.dumps({"prompts": {"query": "query: "}}))
    trim.trim(source, read_vocabulary(vocabulary), tmp_path / "trimmed")
    if "pooling_mode_max_tokens" in pooling:
        assert not (tmp_path / "trimmed" / "modules.json").exists()
        assert "pools by max" in capsys.readouterr().err
    else:
        before, after = (sentence_settings(str(tmp_path / name), "auto").settings for name in ("source", "trimmed"))
        assert before == after
        assert (after.pooling, after.normalize, after.prompts) == ("cls", False, {"query": "query: "})


def test_a_model_that_is_trimmed_again_has_the_languages_of_both(
    tiny_teacher: Path, vocabulary: Path, tmp_path: Path
) -> None:
    """A language whose pieces the first vocabulary did not keep does not come back with the second."""
    source = Path(shutil.copytree(tiny_teacher, tmp_path / "source"))
    (source / "lineage.json").write_text(json.dumps({"trimmed": {"from": "x", "languages": ["tr", "de"]}}))
    trim.trim(source, read_vocabulary(vocabulary), tmp_path / "again")
    assert languages_of(tmp_path / "again") == ["tr"]


def test_a_trimmed_model_cuts_texts_where_its_source_does(tiny_teacher: Path, vocabulary: Path, tmp_path: Path) -> None:
    """Vectors of longer texts are then the same: paraphrase-multilingual-MiniLM has 512 positions and cuts at 128."""
    source = Path(shutil.copytree(tiny_teacher, tmp_path / "source"))
    modules = [
        {"path": path, "type": f"sentence_transformers.models.{kind}"}
        for path, kind in (("", "Transformer"), ("1_Pooling", "Pooling"))
    ]
    (source / "modules.json").write_text(json.dumps(modules))
    (source / "1_Pooling").mkdir()
    (source / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')
    kept = {}
    for name, settings in (
        ("shorter", {"max_seq_length": 16, "do_lower_case": True}),
        ("longer", {"max_seq_length": 4096, "do_lower_case": False}),
        ("none", {"max_seq_length": None}),
    ):
        (source / "sentence_bert_config.json").write_text(json.dumps(settings))
        trim.trim(source, read_vocabulary(vocabulary), tmp_path / name)
        kept[name] = json.loads((tmp_path / name / "sentence_bert_config.json").read_text())
    assert kept == {
        "shorter": {"max_seq_length": 16, "do_lower_case": True},
        "longer": {"max_seq_length": 64, "do_lower_case": False},
        "none": {"max_seq_length": 64, "do_lower_case": False},
    }


# -- wrong input


def edited(**changes: object) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        path = directory / "vocabulary.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


def edited_map(edit: Callable[[list[int]], list[int]]) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        path = directory / "vocabulary.json"
        about = json.loads(path.read_text())
        ids = edit(about["old_ids"])
        path.write_text(json.dumps({**about, "old_ids": ids, "vocab_size": len(ids)}))

    return change


def other_tokenizer(directory: Path) -> None:
    with open(directory / "sentencepiece.bpe.model", "ab") as file:
        file.write(b"\xf8\x07\x01")


CORRUPTIONS = {
    "the map is missing": (lambda d: (d / "vocabulary.json").unlink(), "vocabulary.json is missing"),
    "the tokenizer is missing": (lambda d: (d / "sentencepiece.bpe.model").unlink(), "is missing"),
    "not JSON": (lambda d: (d / "vocabulary.json").write_text("{"), r"is \w+ \("),
    "a list": (lambda d: (d / "vocabulary.json").write_text("[]"), r"is \w+ \("),
    "another version": (edited(version=9), "version 9"),
    "ids that are none": (edited(old_ids=["a", "b"]), r"is \w+ \(|maps 2"),
    "too short": (edited(vocab_size=7), "should map 7"),
    "another tokenizer next to it": (other_tokenizer, "not the tokenizer that"),
    "<pad> dropped": (edited_map(lambda ids: ids[:1] + ids[2:]), "drops special ids"),
    "<mask> dropped": (edited_map(lambda ids: ids[:-1]), "drops special ids"),
    "an id twice": (edited_map(lambda ids: ids[:9] + ids[8:]), "not in ascending order"),
    "an id beyond": (edited_map(lambda ids: ids[:-2] + [99999, ids[-1]]), "not in ascending order"),
}


@pytest.mark.parametrize("corruption", CORRUPTIONS)
def test_a_corrupt_vocabulary(vocabulary: Path, tmp_path: Path, corruption: str) -> None:
    copy = Path(shutil.copytree(vocabulary, tmp_path / "copy"))
    spoil, message = CORRUPTIONS[corruption]
    spoil(copy)
    with pytest.raises(UserError, match=message) as caught:
        read_vocabulary(copy)
    assert "trim-vocab" in str(caught.value)


def test_a_vocabulary_of_another_tokenizer(tiny_teacher: Path, vocabulary: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(tiny_teacher, tmp_path / "other"))
    other_tokenizer(other)
    with pytest.raises(UserError, match="cut from another tokenizer"):
        trim.trim(other, read_vocabulary(vocabulary), tmp_path / "small")
    (other / "sentencepiece.bpe.model").unlink()
    with pytest.raises(UserError, match="cut from another tokenizer"):
        trim.trim(other, read_vocabulary(vocabulary), tmp_path / "small")
    assert not (tmp_path / "small").exists()


def test_a_smaller_tokenizer_with_the_untrimmed_model(tiny_teacher: Path, vocabulary: Path, tmp_path: Path) -> None:
    mixed = Path(shutil.copytree(vocabulary, tmp_path / "mixed"))
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(tiny_teacher / name, mixed / name)
    size = len(read_vocabulary(vocabulary))
    with pytest.raises(UserError, match=f"keeps {size} pieces, the tokenizer has {size}, the model 2002 embeddings"):
        load_with_tokenizer(str(mixed))


def test_a_model_with_fewer_embeddings(tiny_teacher: Path, vocabulary: Path) -> None:
    model = load_encoder(tiny_teacher)
    model.resize_token_embeddings(500)
    with pytest.raises(UserError, match="only 500 embeddings"):
        cut_embedding(model, read_vocabulary(vocabulary))


@pytest.mark.parametrize(("model_type", "fits"), [("camembert", False), ("deberta-v2", False), ("bert", True)])
def test_only_models_with_ids_of_xlm_r_are_cut(vocabulary: Path, model_type: str, fits: bool) -> None:
    """CamemBERT adds 4 to a piece's number: its 2005 rows are enough for 2002 old ids, but belong to other pieces."""
    model, kept = tiny_encoder(model_type, vocab_size=2005), read_vocabulary(vocabulary)
    if fits:
        cut_embedding(model, kept)
        assert model.get_input_embeddings().num_embeddings == len(kept)
    else:
        with pytest.raises(UserError, match=f"a {model_type} model does not number its pieces as XLM-R does"):
            cut_embedding(model, kept)


def test_a_wrong_cut_is_detected_and_leaves_no_files(
    tiny_teacher: Path, vocabulary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = trim.cut_embedding

    def off_by_one(model, kept):
        right(model, kept)
        model.get_input_embeddings().weight.data.copy_(model.get_input_embeddings().weight.roll(1, 0))

    monkeypatch.setattr(trim, "cut_embedding", off_by_one)
    with pytest.raises(UserError, match="hidden states changed"):
        trim.trim(tiny_teacher, read_vocabulary(vocabulary), tmp_path / "small")
    assert list(tmp_path.iterdir()) == []


def test_half_precision_stays_half(tiny_teacher: Path, vocabulary: Path, tmp_path: Path) -> None:
    half = Path(shutil.copytree(tiny_teacher, tmp_path / "half"))
    AutoModel.from_pretrained(half, add_pooling_layer=False, dtype=torch.float16).save_pretrained(half)
    trim.trim(half, read_vocabulary(vocabulary), tmp_path / "small")
    assert AutoModel.from_pretrained(tmp_path / "small").dtype == torch.float16
    sha256 = hashlib.sha256((tmp_path / "small" / "sentencepiece.bpe.model").read_bytes()).hexdigest()
    assert sha256 == json.loads((vocabulary / "vocabulary.json").read_text())["tokenizer_sha256"]
