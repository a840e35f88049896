"""XNLI from fixtures in the official layout: learning, selection, kept results, and every kind of bad input."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

from pipeline.__main__ import main
from pipeline.errors import UserError, exit_code_of
from pipeline.evaluation.encoder import Encoder, load_encoder
from pipeline.evaluation.finetuning.batches import tokenize_pairs
from pipeline.evaluation.finetuning.grid import choose
from pipeline.evaluation.finetuning.loop import FinetuneTask, GridPoint, finetune
from pipeline.evaluation.finetuning.pair_classification import classification_loss, make_task, pair_table
from pipeline.evaluation.finetuning.xnli import TASK, XnliConfig, read
from pipeline.evaluation.finetuning.xnli_data import read_xnli
from pipeline.evaluation.ranks import alone
from tests.conftest import TINY_VOCAB
from tests.tiny_encoders import tiny_encoder
from tests.unit.evaluation.labelled_pairs import interrupted_in_epoch_3, write_hub_data, write_xnli


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_xnli(tmp_path_factory.mktemp("xnli"))


@pytest.fixture
def encoder(tiny_teacher: Path) -> Encoder:
    return load_encoder(str(tiny_teacher))


def config(directory: Path | str, **settings: object) -> XnliConfig:
    quick = {"learning_rates": [3e-3], "epochs": 5, "batch": 16, "micro_batch": 6, "max_length": 48}
    return XnliConfig(data=str(directory), **{**quick, **settings})


# -- learning and selection


def test_a_decisive_word_is_learned_and_transfers_to_other_languages(
    encoder: Encoder, pairs: Path, tmp_path: Path
) -> None:
    result = TASK.evaluate([encoder], config(pairs), alone(), tmp_path)[encoder.name]
    test = {language: scores["accuracy"] for language, scores in result["test"].items()}
    assert test["en"] >= 90
    assert test["de"] >= 90
    assert test["sw"] <= 10, "its labels are shifted by one: what is correct in English is wrong there"
    assert result["mean"]["accuracy"] == pytest.approx(sum(test.values()) / 3)
    assert result["train_pairs"] == 96
    losses = [epoch["loss"] for epoch in result["cells"][0]["epochs"]]
    assert losses[0] > 0.5 > 10 * losses[-1]
    again = TASK.evaluate([encoder], config(pairs), alone(), tmp_path / "again")[encoder.name]
    assert again == result, "same seed, same figures"


def test_the_rate_is_chosen_on_the_mean_of_all_development_languages() -> None:
    def point(rate: float, seed: int, dev: float, en: float, de: float) -> dict:
        test = {"en": {"accuracy": en}, "de": {"accuracy": de}}
        return {"learning_rate": rate, "seed": seed, "dev_mean": dev, "test": test, "best_epoch": seed + 1}

    # the best single grid point (70) belongs to the rate that is worse over its seeds: (70 + 50) / 2 < (64 + 62) / 2
    first_rate = [point(3e-5, 0, 70, 90, 80), point(3e-5, 1, 50, 50, 40)]
    chosen = choose([*first_rate, point(6e-5, 0, 64, 70, 60), point(6e-5, 1, 62, 60, 54)])
    assert chosen["learning_rate"] == 6e-5
    assert chosen["test"] == {"en": {"accuracy": 65}, "de": {"accuracy": 57}}
    assert (chosen["mean"], chosen["dev_mean"], chosen["best_epochs"]) == ({"accuracy": 61}, 63, [1, 2])
    assert chosen["test_mean_of_each_seed"] == {"0": 65, "1": 57}


def test_the_best_epoch_is_tested_and_not_the_last(encoder: Encoder, pairs: Path, tmp_path: Path) -> None:
    settings = config(pairs, epochs=3)
    weights_at: list[torch.Tensor] = []

    def score(model, split: str) -> dict:
        weights_at.append(model.classifier.out_proj.weight.clone())
        return {"en": {"accuracy": {1: 40.0, 2: 60.0, 3: 50.0}.get(len(weights_at), 0.0)}}

    task = dataclasses.replace(task_of(encoder, settings), score=score)
    result = finetune(task, settings, GridPoint(1e-3, 0), tmp_path, alone(), "tiny")
    assert (result["best_epoch"], result["dev_mean"]) == (2, 60.0)
    assert torch.equal(weights_at[3], weights_at[1])
    assert not torch.equal(weights_at[2], weights_at[1])


def test_the_loss_by_hand() -> None:
    # row 0: softmax of (0, 0, ln 2) gives its class 2 one half; row 1: (ln 3, 0, 0) gives class 0 three fifths
    logits = torch.tensor([[0.0, 0.0, math.log(2)], [math.log(3), 0.0, 0.0]])
    loss = classification_loss(SimpleNamespace(logits=logits), {}, torch.tensor([[2], [0]]))
    assert float(loss) == pytest.approx(math.log(2) + math.log(5 / 3))


def test_micro_batches_do_not_change_the_gradient(encoder: Encoder, pairs: Path, tmp_path: Path) -> None:
    results = [
        finetune(task_of(encoder, settings), settings, GridPoint(1e-3, 0), tmp_path / str(size), alone(), "tiny")
        for size in (16, 5)
        for settings in [config(pairs, epochs=1, micro_batch=size)]
    ]
    assert results[0]["epochs"][0]["loss"] == pytest.approx(results[1]["epochs"][0]["loss"], rel=1e-4)


# -- kept results


def task_of(encoder: Encoder, settings: XnliConfig) -> FinetuneTask:
    return make_task(encoder, read(settings), settings, alone())


@pytest.mark.parametrize("name", ["grid_point.json", "cell.json"])
def test_a_finished_grid_point_is_kept_and_only_the_missing_one_is_run(
    name: str, encoder: Encoder, pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Earlier versions wrote cell.json, which is still read."""
    TASK.evaluate([encoder], config(pairs, epochs=1), alone(), tmp_path)
    (written,) = tmp_path.glob("*/lr0.003-seed0/*")
    assert written.name == "grid_point.json", "the checkpoints of a finished grid point are deleted"
    kept = written.rename(written.with_name(name))
    kept.write_text(json.dumps(json.loads(kept.read_text()) | {"dev_mean": 99.0}))
    both = config(pairs, epochs=1, learning_rates=[3e-3, 1e-3])
    result = TASK.evaluate([encoder], both, alone(), tmp_path)[encoder.name]
    assert [point["dev_mean"] == 99.0 for point in result["cells"]] == [True, False]
    assert "finished before, kept" in capsys.readouterr().out
    for other in (
        config(pairs, epochs=1, max_train=90),
        config(pairs, epochs=2),
        config(pairs, epochs=1, micro_batch=5),
    ):
        result = TASK.evaluate([encoder], other, alone(), tmp_path)[encoder.name]
        assert result["dev_mean"] != 99.0, "other data or settings make another grid point"


def test_an_interrupted_grid_point_resumes_from_its_last_epoch(encoder: Encoder, pairs: Path, tmp_path: Path) -> None:
    settings, point = config(pairs, epochs=4), GridPoint(3e-3, 0)
    task = task_of(encoder, settings)
    expected = finetune(task, settings, point, tmp_path / "once", alone(), "tiny")
    left = interrupted_in_epoch_3(task, settings, point, tmp_path / "cut")
    assert json.loads((left / "state.json").read_text())["step"] == 2 * 6, "two epochs of ceil(96 / 16) steps"
    assert finetune(task, settings, point, tmp_path / "cut", alone(), "tiny") == expected

    weight = left.parent / next((tmp_path / "once").glob("step-*")).name / "weight-00000-of-00001.safetensors"
    content = bytearray(weight.read_bytes())
    content[-1] ^= 1
    weight.write_bytes(content)
    with pytest.raises(UserError, match="To start this fine-tuning again, delete"):
        finetune(task, settings, point, tmp_path / "cut", alone(), "tiny")


# -- the files


def test_both_layouts_are_read(pairs: Path) -> None:
    data = read(config(pairs, languages=["sw", "en"], max_train=5, max_evaluation=4))
    assert data.train.labels == [0, 1, 2, 0, 1], "`contradictory` is XNLI-MT's word for contradiction"
    assert list(data.dev) == list(data.test) == ["sw", "en"]
    assert data.test["en"].labels == [0, 1, 2, 0]
    assert data.test["sw"].labels == [1, 2, 0, 1]
    assert "world" in data.test["en"].second[0]


def test_a_byte_order_mark_is_not_part_of_the_header(pairs: Path, tmp_path: Path) -> None:
    for path in pairs.rglob("*.tsv"):
        (tmp_path / path.name).write_text(path.read_text(), encoding="utf-8-sig")
    assert read(config(tmp_path)) == read(config(pairs))


def test_the_library_gives_the_same_pairs(pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    data = read(config(pairs, languages=["en"]))
    rows = {
        split: [
            {"premise": a, "hypothesis": b, "label": label}
            for a, b, label in zip(of.first, of.second, of.labels, strict=True)
        ]
        for split, of in (("train", data.train), ("validation", data.dev["en"]), ("test", data.test["en"]))
    }
    library = config(write_hub_data(tmp_path, rows), languages=["en"])
    assert read(library) == data
    library.languages = ["xx"]
    with pytest.raises(UserError, match="has no xx; it has en"):
        read(library)


def changed(pairs: Path, tmp_path: Path, name: str, old: str, new: str) -> Path:
    """A copy in which `old` is replaced once in the file `name`."""
    for path in pairs.rglob("*.tsv"):
        text = path.read_text()
        if path.name == name:
            assert old in text
            text = text.replace(old, new, 1)
        (tmp_path / path.name).write_text(text)
    return tmp_path


@pytest.mark.parametrize(
    ("name", "old", "new", "message"),
    [
        (
            "multinli.train.en.tsv",
            "\tcontradictory\n",
            "\tcontradiktion\n",
            r"en\.tsv, line 4: unknown label .*did you mean",
        ),
        ("multinli.train.en.tsv", "\tneutral\n", "\n", r"en\.tsv, line 3: 2 columns, the header has 3"),
        ("multinli.train.en.tsv", "premise\thypo", "premise\thypothesis", r"line 1: the header lacks hypo"),
        ("xnli.dev.tsv", "\tneutral\t", "\t-\t", r"dev\.tsv, line 3: unknown label '-'"),
        ("xnli.test.tsv", "\tx\tx\t", "\tx\t", r"test\.tsv, line 2: 8 columns"),
    ],
)
def test_a_bad_line_is_named(pairs: Path, tmp_path: Path, name: str, old: str, new: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read(config(changed(pairs, tmp_path, name, old, new)))


def test_empty_pairs_and_empty_files(pairs: Path, tmp_path: Path) -> None:
    path = changed(pairs, tmp_path, "", "", "") / "multinli.train.en.tsv"
    path.write_text("premise\thypo\tlabel\na\tb\tneutral\n \tb\tneutral\n")
    with pytest.raises(UserError, match=r"en\.tsv, line 3: a sentence of the pair is empty"):
        read(config(tmp_path))
    path.write_text("premise\thypo\tlabel\n")
    with pytest.raises(UserError, match="no pairs"):
        read(config(tmp_path))
    path.write_bytes("premise\thypo\tlabel\naç\tb\tneutral\n".encode("latin-1"))
    with pytest.raises(UserError, match=r"line 2: not UTF-8 \(byte 1"):
        read(config(tmp_path))


def test_missing_files_and_languages(pairs: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--set xnli\.data=DIR"):
        read(XnliConfig())
    with pytest.raises(UserError, match=r"no multinli\.train\.fr\.tsv"):
        read(config(pairs, train_language="fr"))
    with pytest.raises(UserError, match="no pairs in fr, ur; it has de, en, sw"):
        read(config(pairs, languages=["en", "fr", "ur"]))
    (changed(pairs, tmp_path, "", "", "") / "xnli.test.tsv").unlink()
    with pytest.raises(UserError, match=r"no xnli\.test\.tsv"):
        read(config(tmp_path))


# -- the models


def test_an_encoder_with_missing_weights(tiny_teacher: Path, tmp_path: Path) -> None:
    weights = load_file(tiny_teacher / "model.safetensors")
    dropped = next(name for name in weights if name.endswith("layer.2.output.dense.weight"))
    save_file(
        {name: w for name, w in weights.items() if name != dropped}, tmp_path / "model.safetensors", {"format": "pt"}
    )
    (tmp_path / "config.json").write_bytes((tiny_teacher / "config.json").read_bytes())
    with pytest.raises(UserError, match=f"lack weights of the encoder: 1 of them.*{dropped}"):
        load_encoder(str(tmp_path))


def test_a_head_in_the_files_is_not_used(tiny_teacher: Path, pairs: Path, tmp_path: Path) -> None:
    """The head of a fine-tuned checkpoint, with as many or other classes, is replaced by a new one; its body is kept."""
    for num_labels in (3, 7):
        directory = shutil.copytree(tiny_teacher, tmp_path / str(num_labels))
        tuned = AutoModelForSequenceClassification.from_pretrained(tiny_teacher, num_labels=num_labels)
        tuned.classifier.out_proj.weight.data.fill_(5.0)
        tuned.save_pretrained(directory)
        encoder = load_encoder(str(directory))
        model = task_of(encoder, config(pairs)).load()
        assert model.classifier.out_proj.weight.shape[0] == 3
        assert model.classifier.out_proj.weight.abs().max() < 2
        body = dict(encoder.model.named_parameters())
        assert all(torch.equal(parameter, body[name]) for name, parameter in model.roberta.named_parameters())
        model.roberta.embeddings.word_embeddings.weight.data.zero_()
        assert body["embeddings.word_embeddings.weight"].abs().max() > 0  # a copy, not the encoder's own


def test_a_pooler_in_the_files_is_kept(tmp_path: Path, tiny_tokenizer: Path, pairs: Path) -> None:
    """BERT's classes use their pooler, so a trained pooler is fine-tuned as well."""
    shutil.copytree(tiny_tokenizer, tmp_path, dirs_exist_ok=True)
    saved = tiny_encoder("bert", vocab_size=TINY_VOCAB)
    saved.save_pretrained(tmp_path)
    model = task_of(load_encoder(str(tmp_path)), config(pairs)).load()
    assert torch.equal(model.bert.pooler.dense.weight, saved.pooler.dense.weight)


def test_the_head_alone_is_new(encoder: Encoder, pairs: Path) -> None:
    model = task_of(encoder, config(pairs)).load()
    body = dict(encoder.model.named_parameters())
    assert all(torch.equal(parameter, body[name]) for name, parameter in model.roberta.named_parameters())


def test_longer_than_the_positions(encoder: Encoder, pairs: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--set xnli\.max_length=64"):
        TASK.evaluate([encoder], config(pairs, max_length=65), alone(), tmp_path)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("xnli.epochs=0", "`xnli.epochs` is 0"),
        ("xnli.learning_rates=[]", "xnli.learning_rates"),
        ("xnli.learning_rate=3e-5", "did you mean `learning_rates`"),
        ("xnli.warmup_share=1.0", "warmup_share"),
        ("xnli.max_length=3", "at least 8 tokens"),
    ],
)
def test_bad_settings(tmp_path: Path, capsys: pytest.CaptureFixture[str], setting: str, message: str) -> None:
    # deepspeed --module puts --local_rank in front
    command = ["--local_rank=0", "evaluate", "nowhere", "--tasks", "xnli", "--output", str(tmp_path), "--set", setting]
    assert exit_code_of(lambda: main(command)) == 2
    assert message in capsys.readouterr().err


def test_the_table_has_every_language_and_the_average() -> None:
    test = {"de": {"accuracy": 71.25}, "en": {"accuracy": 80.0}}
    result = {"test": test, "mean": {"accuracy": 75.625}, "dev_mean": 74.0, "learning_rate": 4e-5, "best_epochs": [3]}
    lines = pair_table("XNLI", {"student": {**result, "train_language": "en", "train_pairs": 9}}).splitlines()
    assert lines[1].split()[:4] == ["model", "de", "en", "average"]
    assert lines[2].split() == ["student", "71.2", "80.0", "75.6", "74.0", "lr", "4e-05,", "epoch", "3"]


@pytest.mark.parametrize(("family", "changes"), [("roberta", {"type_vocab_size": 1}), ("distilbert", {}), ("bert", {})])
def test_segment_ids_are_given_to_models_with_embeddings_for_them(family: str, changes: dict) -> None:
    """BERT's tokenizer returns segment 1 for the second sentence, also with another body."""
    model = tiny_encoder(family, **changes)

    class Tokenizer:
        def __call__(self, first, second, **_):
            return {"input_ids": [[5, 6, 7]] * len(first), "token_type_ids": [[0, 1, 1]] * len(first)}

    rows = tokenize_pairs(Encoder("m", model, Tokenizer(), 1, "m"), ["a"], ["b"], [0], 16)
    inputs = rows.inputs([0], 1, torch.device("cpu"))
    assert ("token_type_ids" in inputs) == (family == "bert")
    model(**inputs)


def test_header_names_in_any_case_and_columns_in_any_order(tmp_path: Path) -> None:
    data = write_xnli(tmp_path / "xnli", train=3, evaluation=3, languages=("en",))
    train = next(data.rglob("multinli.train.en.tsv"))
    lines = [line.split("\t")[::-1] for line in train.read_text().splitlines()]
    lines[0] = [name.upper() for name in lines[0]]
    expected = read_xnli(str(data), "en", None, None, None).train
    train.write_text("\n".join("\t".join(line) for line in lines) + "\n\n", encoding="utf-8-sig")
    assert read_xnli(str(data), "en", None, None, None).train == expected


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("premise\thypo\tlabel", "premise\thypo\thypo\tlabel", "hypo twice"),
        ("\n", "\r", "carriage return"),
    ],
)
def test_other_layouts_are_rejected(before: str, after: str, message: str, tmp_path: Path) -> None:
    data = write_xnli(tmp_path / "xnli", train=3, evaluation=3, languages=("en",))
    train = next(data.rglob("multinli.train.en.tsv"))
    train.write_bytes(train.read_text().replace(before, after).encode())
    with pytest.raises(UserError, match=message):
        read_xnli(str(data), "en", None, None, None)


def test_two_files_of_one_name_that_differ(tmp_path: Path) -> None:
    data = write_xnli(tmp_path / "xnli", train=3, evaluation=3, languages=("en",))
    train = next(data.rglob("multinli.train.en.tsv"))
    (data / "older").mkdir()
    copy = data / "older" / train.name
    copy.write_bytes(train.read_bytes())
    read_xnli(str(data), "en", None, None, None)
    copy.write_bytes(train.read_bytes()[:-3])
    with pytest.raises(UserError, match="differ, and only one can be read"):
        read_xnli(str(data), "en", None, None, None)
