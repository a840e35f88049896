"""Speed and size of a model with known figures; Spearman on small cases; every kind of bad file."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoModel

from pipeline.__main__ import main
from pipeline.errors import UserError
from pipeline.evaluation.encoder import load_encoder
from pipeline.evaluation.speed import SpeedConfig, evaluate_speed, forward_of
from pipeline.evaluation.sts import StsConfig, evaluate_sts, ranks, read_all, read_scored_pairs, spearman

COLUMNS = StsConfig().columns
QUICK = SpeedConfig(batches=[1, 2], lengths=[8], rounds=1, seconds_per_turn=0.0)


# -- size and speed


def test_size_is_that_of_the_model(tiny_teacher: Path) -> None:
    model = AutoModel.from_pretrained(tiny_teacher, add_pooling_layer=False)
    result = evaluate_speed([load_encoder(str(tiny_teacher))], QUICK)[str(tiny_teacher)]
    assert result["parameters"] == model.num_parameters()
    words = model.config.vocab_size * model.config.hidden_size
    assert result["parameters_without_word_embeddings"] == model.num_parameters() - words
    assert result["megabytes"] == pytest.approx(model.num_parameters() * 4 / 1e6, abs=0.1)
    assert list(result["sentences_per_second"]) == ["1x8", "2x8"]
    assert result["times_first"] == {"1x8": 1.0, "2x8": 1.0}


def test_a_full_batch_without_padding_is_timed(tiny_teacher: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = load_encoder(str(tiny_teacher))
    seen = []
    monkeypatch.setattr(
        encoder, "model", type("Spy", (), {"__call__": lambda self, input_ids: seen.append(input_ids)})()
    )
    monkeypatch.setattr(type(encoder), "device", "cpu")
    forward_of(encoder, batch=3, length=7)()
    assert [tuple(ids.shape) for ids in seen] == [(3, 7)] * 2
    assert int(seen[0].min()) >= 4
    assert int(seen[0].max()) < len(encoder.tokenizer)


def test_a_length_beyond_the_positions(tiny_teacher: Path) -> None:
    with pytest.raises(UserError, match="at most 64 tokens"):
        evaluate_speed([load_encoder(str(tiny_teacher))], SpeedConfig(lengths=[65]))


# -- similarity


def test_ranks_share_ties() -> None:
    assert ranks(np.array([10.0, 30.0, 20.0, 20.0])).tolist() == [1.0, 4.0, 2.5, 2.5]


def test_spearman_by_hand() -> None:
    assert spearman(np.array([1.0, 2.0, 3.0]), np.array([10.0, 100.0, 1000.0])) == pytest.approx(1.0)
    assert spearman(np.array([1.0, 2.0, 3.0]), np.array([3.0, 2.0, 1.0])) == pytest.approx(-1.0)
    # ranks 1 2 3 4 5 against 2 1 4 3 5: 1 - 6 * (1 + 1 + 1 + 1) / (5 * 24) = 0.8
    assert spearman(np.array([1.0, 2, 3, 4, 5]), np.array([20.0, 10, 40, 30, 50])) == pytest.approx(0.8)


def test_a_header_line_names_the_columns(tmp_path: Path) -> None:
    path = tmp_path / "pairs.tsv"
    path.write_text('genre\tscore\tsentence1\tsentence2\nnews\t3.5\tA "quoted\tb\nnews\t1\tc\td\n')
    pairs = read_scored_pairs(path, COLUMNS)
    assert (pairs.first, pairs.second, pairs.scores) == (['A "quoted', "c"], ["b", "d"], [3.5, 1.0])


def test_a_header_line_behind_a_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "pairs.csv"
    path.write_text("sentence1,score,sentence2\na,1,b\nc,2,d\n", encoding="utf-8-sig")
    assert read_scored_pairs(path, COLUMNS).scores == [1.0, 2.0]


def test_without_a_header_the_first_three_columns_count(tmp_path: Path) -> None:
    path = tmp_path / "pairs.csv"
    path.write_text('"one, two",b,5\nc,d,0\n')
    pairs = read_scored_pairs(path, COLUMNS)
    assert (pairs.first, pairs.scores) == (["one, two", "c"], [5.0, 0.0])


def test_a_header_in_the_usual_order_is_not_a_pair(tmp_path: Path) -> None:
    path = tmp_path / "pairs.csv"
    path.write_text("sentence1,sentence2,score\na,b,1\nc,d,2\n")
    assert read_scored_pairs(path, COLUMNS).first == ["a", "c"]


def test_column_names_in_any_case_and_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "pairs.TSV"
    path.write_bytes(b"\xef\xbb\xbfScore\tSentence1 \tSENTENCE2\r\n\r\n1\ta\tb\r\n2\tc\td\r\n\r\n")
    assert read_scored_pairs(path, COLUMNS).first == ["a", "c"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('a,"b,1\nc,d,2\ne,f",3\ng,h,4\n', "lines 1 to 3: a cell with a line break"),
        ('sentence1,sentence2,score\na,b,1\n"c" d,e,2\n', "line 3: .*Double the quotation marks"),
        ('sentence1,sentence2,score\na,b,1\nc,"d,2\n', "line 3"),
        ("sentence1,sentence2,score\na,b,1\nc, or so,d,2\n", "line 3: 4 columns, the first line has 3"),
        ("sentence1,sentence2,score\na,b,1\nc,d\n", "line 3: 2 columns, the first line has 3"),
        ("news,file,2014,1,3.5,a,b\nnews,file,2015,2,1.5,c,d\n", "7 columns and no header .*'2014'"),
        ("a\tb\t1\nc\td\t2\n", "1 columns and no header"),
        ("first,second,label\na,b,1\nc,d,2\n", r"no header: it lacks sentence1.*sts\.columns"),
        ("sentence1,sentence1,sentence2,score\na,b,c,1\n", "sentence1 twice"),
        ("a,b,1_0\nc,d,2\n", "line 1"),
        ("a,b,inf\nc,d,2\n", "line 1"),
        ("sentence1,sentence2,score\n", r"0 pair\(s\)"),
        ("\n\n", r"0 pair\(s\)"),
    ],
)
def test_an_ambiguous_table_is_rejected(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "pairs.csv"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        read_scored_pairs(path, COLUMNS)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a\tb\t1\nc\td\tgood\n", "line 2"),
        ("a\tb\t1\n\tno first\t2\n", "line 2"),
        ("a\tb\t1\nc\td\n", "line 2"),
        ("a\tb\t1\nc\td\tnan\n", "line 2"),
        ("", "two different scores"),
        ("a\tb\t1\nc\td\t1\n", "two different scores"),
    ],
)
def test_a_bad_file_is_named_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "pairs.tsv"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        read_scored_pairs(path, COLUMNS)


def test_json_lines(tmp_path: Path) -> None:
    """MTEB's layout, plain and compressed."""
    lines = [
        {"id": 1, "sentence1": "a", "sentence2": "b", "score": 1},
        {"sentence1": "c", "sentence2": "d", "score": "2.5"},
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "x.jsonl").write_text(text)
    (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    for name in ("x.jsonl", "x.jsonl.gz"):
        pairs = read_scored_pairs(tmp_path / name, COLUMNS)
        assert (pairs.first, pairs.second, pairs.scores) == (["a", "c"], ["b", "d"], [1.0, 2.5])
    for broken, message in (
        (text.replace("sentence2", "other", 1), r"line 1: `sentence2` is missing; the line has id, sentence1, other"),
        (text.replace('"b"', "[1]"), r"line 1: `sentence2` is neither text nor number"),
        (text.replace('"2.5"', '"high"'), r"line 2: expected sentence, sentence, number"),
        (text + "{", r"line 3: no JSON object"),
        (text.replace("2.5", "1"), "at least two different scores"),
    ):
        (tmp_path / "x.jsonl").write_text(broken)
        with pytest.raises(UserError, match=message):
            read_scored_pairs(tmp_path / "x.jsonl", COLUMNS)


def test_no_file() -> None:
    with pytest.raises(UserError, match=r"sts\.files"):
        read_all(StsConfig())
    with pytest.raises(UserError, match=r"file nothing\.tsv not found"):
        read_all(StsConfig(files=["nothing.tsv"]))


def test_scores_equal_to_the_cosines_have_correlation_1(tiny_teacher: Path, tmp_path: Path) -> None:
    encoder = load_encoder(str(tiny_teacher))
    sentences = [
        ("Hello world!", "Hello world"),
        ("eins", "你好，世界"),
        ("ja", "nein, niemals"),
        ("x y z", "das Haus"),
    ]
    from pipeline.evaluation.encoder import sentence_vectors

    vectors, _ = sentence_vectors(encoder, [text for pair in sentences for text in pair], 60, 2)
    cosines = (vectors["output"][::2] * vectors["output"][1::2]).sum(dim=1).tolist()
    path = tmp_path / "pairs.tsv"
    path.write_text("".join(f"{a}\t{b}\t{cosine:.8f}\n" for (a, b), cosine in zip(sentences, cosines, strict=True)))
    result = evaluate_sts([encoder], StsConfig(files=[str(path)], max_length=60))[str(tiny_teacher)]
    assert result["mean"]["output"] == pytest.approx(1.0)


def test_a_collapsed_encoder_has_correlation_0(
    tiny_teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same vector for every text: no ranking, no NaN in evaluation.json, and a warning."""
    model = AutoModel.from_pretrained(tiny_teacher, add_pooling_layer=False)
    for parameter in model.parameters():
        parameter.data.zero_()
    model.save_pretrained(tmp_path / "flat")
    for name in ("tokenizer.json", "tokenizer_config.json", "sentencepiece.bpe.model"):
        (tmp_path / "flat" / name).write_bytes((tiny_teacher / name).read_bytes())
    path = tmp_path / "pairs.tsv"
    path.write_text("a\tb\t1\nc\td\t2\n")
    settings = ["--set", f"sts.files=[{path}]", "--set", "sts.max_length=60"]
    main(["evaluate", str(tmp_path / "flat"), "--tasks", "sts", "--output", str(tmp_path), *settings])
    (result,) = json.loads((tmp_path / "evaluation.json").read_text())["tasks"]["sts"].values()
    assert result["mean"] == {"output": 0.0, "last_input": 0.0, "values": 0.0}
    assert "all pairs are equally alike" in capsys.readouterr().err


def test_the_command_does_both(tiny_teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "pairs.tsv"
    path.write_text("a\tb\t1\nc\td\t2\ne\tf\t3\n")
    settings = [f"sts.files=[{path}]", "sts.max_length=60", "speed.lengths=[8]", "speed.batches=[1]"]
    settings += ["speed.seconds_per_turn=0.0"]
    main(
        ["evaluate", str(tiny_teacher), f"{tiny_teacher}@1", "--tasks", "sts,speed", "--output", str(tmp_path)]
        + [word for setting in settings for word in ("--set", setting)]
    )
    tasks = json.loads((tmp_path / "evaluation.json").read_text())["tasks"]
    assert list(tasks) == ["sts", "speed"]
    assert all(list(results) == [str(tiny_teacher), f"{tiny_teacher}@1"] for results in tasks.values())
    assert (tmp_path / "evaluation.png").is_file()
    printed = capsys.readouterr().out
    assert "Spearman" in printed
    assert "1x8" in printed


def test_a_model_named_twice(tiny_teacher: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="twice"):
        main(["evaluate", str(tiny_teacher), str(tiny_teacher), "--output", str(tmp_path)])
