"""Retrieval: the measure on small vectors, the sentence vectors against the plain model, and every kind of bad input."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from pipeline.__main__ import main
from pipeline.errors import UserError, exit_code_of
from pipeline.evaluation.command import read_overrides
from pipeline.evaluation.encoder import load_encoder, sentence_vectors
from pipeline.evaluation.retrieval import (
    RetrievalConfig,
    both_directions,
    evaluate_retrieval,
    read_pairs,
    read_pairs_file,
)
from tests.tiny_encoders import tiny_encoder
from tests.unit.data_prep.test_fast_tokenizer import word_piece

REPO = Path(__file__).resolve().parents[3]
TEXTS = ["Hello world!", "Ein längerer Satz, der in mehr Stücke zerfällt als der erste.", "你好，世界", "да"]


def write_pairs(directory: Path, language: str, text: str) -> Path:
    path = directory / f"en-{language}.tsv"
    path.write_text(text, encoding="utf-8")
    return path


# -- the measure


def test_accuracy_of_a_case_by_hand() -> None:
    english = torch.eye(3)
    other = torch.tensor([[0.9, 0.8, 0.1], [0.7, 0.6, 0.0], [0.2, 0.7, 0.3]])
    # English 0, 1, 2 are nearest to other 0, 0, 2; other 0, 1, 2 to English 0, 0, 1.
    result = both_directions(torch.cat([english, other]), [0, 1, 2], [3, 4, 5])
    expected = {"from_english": 2 / 3, "to_english": 1 / 3, "mean": 1 / 2}
    assert result == pytest.approx(expected)


def test_copies_of_a_text_are_equally_correct() -> None:
    vectors = torch.eye(3)
    assert both_directions(vectors, [0, 0], [1, 1])["mean"] == 1.0


# -- the vectors


@torch.inference_mode()
def plain_vectors(directory: Path, text: str, values_layer: int) -> dict[str, torch.Tensor]:
    """The vectors of one sentence without padding, from the unchanged Hugging Face model."""
    model = AutoModel.from_pretrained(directory, add_pooling_layer=False).eval()
    ids = AutoTokenizer.from_pretrained(directory)(text, return_tensors="pt")
    states = model(**ids, output_hidden_states=True).hidden_states
    value = model.encoder.layer[values_layer - 1].attention.self.value
    chosen = {"output": states[-1], "last_input": states[-2], "values": value(states[values_layer - 1])}
    return {pooling: torch.nn.functional.normalize(x[0].mean(dim=0), dim=0) for pooling, x in chosen.items()}


@pytest.mark.parametrize("values_layer", [2, None])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_vectors_are_those_of_the_plain_model(tiny_teacher: Path, values_layer: int | None, batch_size: int) -> None:
    encoder = load_encoder(str(tiny_teacher), values_layer)
    vectors, num_tokens = sentence_vectors(encoder, TEXTS, max_length=60, batch_size=batch_size)
    assert num_tokens == sum(len(encoder.tokenizer(text)["input_ids"]) for text in TEXTS)
    for row, text in enumerate(TEXTS):
        expected = plain_vectors(tiny_teacher, text, encoder.values_layer)
        for pooling, vector in expected.items():
            torch.testing.assert_close(vectors[pooling][row], vector, rtol=1e-5, atol=1e-5)


def test_evaluation_leaves_the_model_as_it_was(tiny_teacher: Path) -> None:
    encoder = load_encoder(f"{tiny_teacher}@2")
    sentence_vectors(encoder, TEXTS, max_length=60, batch_size=4)
    assert not any(module._forward_pre_hooks for module in encoder.model.modules())
    assert len(encoder.model.encoder.layer) == encoder.model.config.num_hidden_layers


def test_identical_languages_are_found(tiny_teacher: Path, tmp_path: Path) -> None:
    write_pairs(tmp_path, "xx", "".join(f"{text}\t{text}\n" for text in TEXTS))
    result = evaluate_retrieval(load_encoder(str(tiny_teacher)), RetrievalConfig(pairs=str(tmp_path), max_length=60))
    assert result["mean"] == {"output": 1.0, "last_input": 1.0, "values": 1.0}
    assert result["num_pairs"] == {"xx": len(TEXTS)}


# -- reading pairs


def test_the_first_pairs_are_read_and_line_separators_inside_text_are_kept(tmp_path: Path) -> None:
    path = write_pairs(tmp_path, "xx", "a\u2028b\tc\tsource\tkey\nd\te\nf\tg\n")
    assert read_pairs_file(path, max_pairs=2) == [("a\u2028b", "c"), ("d", "e")]
    assert len(read_pairs_file(path, max_pairs=99)) == 3


@pytest.mark.parametrize("bad", ["no tab at all", "\tonly the translation", "only English\t", ""])
def test_a_malformed_line_is_named_by_number(tmp_path: Path, bad: str) -> None:
    path = write_pairs(tmp_path, "xx", f"a\tb\n{bad}\nc\td\n")
    with pytest.raises(UserError, match=r"en-xx\.tsv, line 2"):
        read_pairs_file(path, max_pairs=10)


def test_a_byte_order_mark_is_not_part_of_the_first_sentence(tmp_path: Path) -> None:
    path = write_pairs(tmp_path, "xx", "\ufeffa\tb\nc\td\n")
    assert read_pairs_file(path, max_pairs=9) == [("a", "b"), ("c", "d")]


def test_too_few_pairs(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="at least 2"):
        read_pairs_file(write_pairs(tmp_path, "xx", "a\tb\n"), max_pairs=10)


def test_an_empty_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"en-xx\.tsv"):
        read_pairs_file(write_pairs(tmp_path, "xx", ""), max_pairs=10)


def test_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "en-xx.tsv"
    path.write_bytes("a\tb\nç\td\n".encode("latin-1"))
    with pytest.raises(UserError, match="byte 4"):
        read_pairs_file(path, max_pairs=10)


def test_a_missing_language_lists_those_that_are_there(tmp_path: Path) -> None:
    write_pairs(tmp_path, "xx", "a\tb\nc\td\n")
    with pytest.raises(UserError, match="no pairs for yy; it has xx"):
        read_pairs(RetrievalConfig(pairs=str(tmp_path), languages=["xx", "yy"]))


def test_a_directory_without_pairs(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"retrieval\.pairs"):
        read_pairs(RetrievalConfig(pairs=str(tmp_path / "nothing")))


def test_every_sample_file_reads() -> None:
    pairs = read_pairs(RetrievalConfig(pairs=str(REPO / "samples" / "parallel"), max_pairs=10_000))
    assert len(pairs) >= 12
    assert min(map(len, pairs.values())) >= 50


# -- loading


def test_a_model_without_tokenizer(tiny_teacher: Path, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((tiny_teacher / name).read_bytes())
    with pytest.raises(UserError, match="no tokenizer"):
        load_encoder(str(tmp_path))


def test_a_tokenizer_of_another_vocabulary(tiny_teacher: Path, tmp_path: Path) -> None:
    model = AutoModel.from_pretrained(tiny_teacher, add_pooling_layer=False)
    model.resize_token_embeddings(100)
    model.save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((tiny_teacher / name).read_bytes())
    with pytest.raises(UserError, match="only 100 embeddings"):
        load_encoder(str(tmp_path))


def test_a_smaller_tokenizer_with_another_padding(tiny_teacher: Path, tmp_path: Path) -> None:
    """A BERT tokenizer with an XLM-R model: all its ids are ids of the model, but of other pieces."""
    other = word_piece(tmp_path / "other")
    for name in ("config.json", "model.safetensors"):
        (other / name).write_bytes((tiny_teacher / name).read_bytes())
    with pytest.raises(UserError, match="padding is id 0 of the tokenizer and id 1 of the model"):
        load_encoder(str(other))


def test_a_bert_with_the_tokenizer_of_xlm_r(tiny_teacher: Path, tmp_path: Path) -> None:
    """As in e5-small: more embeddings than pieces, and padding ids 0 (config) and 1 (tokenizer), which BERT accepts."""
    tiny_encoder("bert", vocab_size=2037, pad_token_id=0).save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json", "sentencepiece.bpe.model"):
        (tmp_path / name).write_bytes((tiny_teacher / name).read_bytes())
    assert load_encoder(str(tmp_path)).tokenizer.pad_token_id == 1


def test_a_layer_that_is_not_there(tiny_teacher: Path) -> None:
    with pytest.raises(UserError, match="it has no layer 9"):
        load_encoder(f"{tiny_teacher}@9")


def test_a_directory_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model not found: .*student"):
        load_encoder(str(tmp_path / "student"))


# -- the command


def evaluate(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pipeline", "evaluate", *arguments]
    return subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=120)


def test_the_command_prints_a_table_and_writes_json(tiny_teacher: Path, tmp_path: Path) -> None:
    done = evaluate(
        *[str(tiny_teacher), f"{tiny_teacher}@1", "--tasks", "retrieval", "--output", str(tmp_path / "out")],
        *[
            "--set",
            "retrieval.languages=[de, sw]",
            "--set",
            "retrieval.max_pairs=5",
            "--set",
            "retrieval.max_length=60",
        ],
    )
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "out" / "evaluation.json").read_text())["tasks"]["retrieval"]
    assert list(results) == [str(tiny_teacher), f"{tiny_teacher}@1"]
    mean = results[str(tiny_teacher)]["mean"]["values"]
    row = next(line for line in done.stdout.splitlines() if line.startswith(f"{tiny_teacher} ") and "values" in line)
    assert row.split()[-1] == f"{mean:.3f}"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "poetry"], "Tasks: heldout, retrieval"),
        (["--set", "retrieval.pair=x"], "did you mean `pairs`"),
        (["--set", "retrieval.batch_size=1000000007"], "`retrieval.batch_size` is 1000000007"),
        (["--set", "retrieval.max_pairs=1"], "it must be between 2 and"),
    ],
)
def test_bad_arguments_give_one_line_and_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    command_line = ["evaluate", "nowhere", "--output", str(tmp_path / "out"), *arguments]
    assert exit_code_of(lambda: main(command_line)) == 2
    printed = capsys.readouterr().err.strip().splitlines()
    assert len(printed) == 1
    assert message in printed[0]
    assert not (tmp_path / "out").exists()


def test_overrides_reach_the_task() -> None:
    assert read_overrides(['retrieval.prefix="query: "']).retrieval.prefix == "query: "


def test_more_tokens_than_the_model_has_positions(tiny_teacher: Path) -> None:
    with pytest.raises(UserError, match=r"at most 64 tokens.* --set retrieval.max_length=64"):
        evaluate_retrieval(load_encoder(str(tiny_teacher)), RetrievalConfig(max_length=65))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("English\tGerman\na\tb\nc\td\n", "line 1, looks like a header"),
        ("a\tb\nc\tand\td\n", r"line 2: 3 column\(s\), line 1 has 2"),
    ],
)
def test_a_header_or_a_tab_within_a_sentence(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "en-de.tsv").write_text(text)
    with pytest.raises(UserError, match=message):
        read_pairs(RetrievalConfig(pairs=str(tmp_path)))
