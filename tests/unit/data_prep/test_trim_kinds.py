"""A smaller vocabulary of a `tokenizer.json` of every kind: covered text is split as before, and what cannot be cut is rejected."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from data_prep.__main__ import main
from data_prep.awkward import LINES
from data_prep.fast_pieces import FastPieces
from data_prep.tokenizer_ids import tokenizer_file
from tests.unit.data_prep.trim_tokenizers import KEPT, KINDS, LANGUAGES, NUM_LINES, cut_to, sample_lines, write_text

BYTES = {f"<0x{byte:02X}>" for byte in range(256)}


def about(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "vocabulary.json").read_text())


def tree(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "tokenizer.json").read_text())


def write_tree(directory: Path, content: dict[str, Any]) -> None:
    (directory / "tokenizer.json").write_text(json.dumps(content))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("trim") / "text")


def trim_vocab(tokenizer: Path, text: Path, output: Path, *words: object) -> int:
    arguments = ["trim-vocab", "--tokenizer", tokenizer, "--input", text, "--output", output, "--workers", 1, *words]
    return main([str(word) for word in arguments])


@pytest.fixture(scope="module")
def made(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    """The directories of a kind's tokenizer and of the smaller one, made once."""
    found: dict[str, tuple[Path, Path]] = {}

    def make(kind: str) -> tuple[Path, Path]:
        if kind not in found:
            directory = tmp_path_factory.mktemp(kind)
            full = KINDS[kind](directory / "full")
            found[kind] = full, cut_to(full, text, directory / "small")
        return found[kind]

    return make


@pytest.mark.parametrize("kind", KINDS)
def test_covered_text_maps_one_to_one(kind: str, made: Callable[[str], tuple[Path, Path]]) -> None:
    """With AutoTokenizer, rows with their special tokens: text that was counted, text that was not, and awkward lines."""
    full, small = made(kind)
    old, new = (AutoTokenizer.from_pretrained(directory) for directory in (full, small))
    old_ids = np.array(about(small)["old_ids"])
    assert len(new) == len(old_ids) == about(small)["vocab_size"] < 0.8 * len(old)
    lines = [line for language in LANGUAGES for line in sample_lines(language)] + list(LINES)
    covered = 0
    for before, after in zip(old(lines)["input_ids"], new(lines)["input_ids"], strict=True):
        unknown_word = kind == "BERT" and old.unk_token_id in before
        if not unknown_word and set(before) <= set(old_ids.tolist()):
            covered += 1
            assert old_ids[after].tolist() == before
    assert len(KEPT) * NUM_LINES < covered < len(lines)


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_keep_their_meaning(kind: str, made: Callable[[str], tuple[Path, Path]]) -> None:
    full, small = made(kind)
    old, new = (AutoTokenizer.from_pretrained(directory) for directory in (full, small))
    old_ids = about(small)["old_ids"]
    assert new.special_tokens_map == old.special_tokens_map
    for token in old.all_special_tokens:
        assert old_ids[new.convert_tokens_to_ids(token)] == old.convert_tokens_to_ids(token)
    before, after = (Tokenizer.from_file(str(directory / "tokenizer.json")) for directory in (full, small))
    added = {number: token.content for number, token in before.get_added_tokens_decoder().items()}
    assert {old_ids[n]: token.content for n, token in after.get_added_tokens_decoder().items()} == added
    assert old_ids[after.padding["pad_id"]] == before.padding["pad_id"]
    assert [old_ids[n] for n in after.encode("a", "b").ids] == before.encode("a", "b").ids
    settings = json.loads((small / "tokenizer_config.json").read_text())
    assert {n: token["content"] for n, token in settings["added_tokens_decoder"].items()} == {
        str(n): token.content for n, token in after.get_added_tokens_decoder().items()
    }
    if kind == "mDeBERTa":
        assert old_ids[settings["unk_id"]] == 3
        assert after.token_to_id("[MASK]") == len(old_ids) - 1


@pytest.mark.parametrize("kind", ["mmBERT", "ModernBERT", "RoBERTa"])
def test_text_in_bytes_never_becomes_unknown(kind: str, made: Callable[[str], tuple[Path, Path]]) -> None:
    full, small = made(kind)
    old, new = (Tokenizer.from_file(str(directory / "tokenizer.json")) for directory in (full, small))
    for line in (*LINES, *sample_lines("zh-Hans")):
        if "\ufffd" not in line:
            assert new.decode(new.encode(line).ids) == old.decode(old.encode(line).ids)


def test_the_merges_of_a_cut_bpe_are_in_their_order(made: Callable[[str], tuple[Path, Path]]) -> None:
    full, small = (tree(directory)["model"] for directory in made("mmBERT"))
    position = {tuple(merge): rank for rank, merge in enumerate(full["merges"])}
    ranks = [position[tuple(merge)] for merge in small["merges"]]
    assert ranks == sorted(ranks)
    assert 0 < len(ranks) < len(position)
    assert small["vocab"].keys() >= BYTES


def test_the_lowest_score_of_a_unigram_stays(made: Callable[[str], tuple[Path, Path]]) -> None:
    """The score of an unknown character follows from it."""
    full, small = (tree(directory)["model"]["vocab"] for directory in made("mDeBERTa"))
    assert min(score for _, score in small) == min(score for _, score in full)


def test_a_cut_tokenizer_can_be_cut_again(made: Callable[[str], tuple[Path, Path]], text: Path, tmp_path: Path) -> None:
    _, small = made("mmBERT")
    assert trim_vocab(small, text / "en.txt", tmp_path / "smaller") == 0
    assert about(tmp_path / "smaller")["vocab_size"] < about(small)["vocab_size"]


def test_text_and_its_shards_count_the_same(
    made: Callable[[str], tuple[Path, Path]], text: Path, tmp_path: Path
) -> None:
    """Shards in which a line ends with [SEP], whose id is behind the pieces."""
    full, small = made("ModernBERT")
    words = ["prepare", "--tokenizer", full, "--input", text, "--output", tmp_path / "shards", "--workers", 1]
    assert main([str(word) for word in words]) == 0
    words = ["trim-vocab", "--tokenizer", full, "--shards", tmp_path / "shards", "--output", tmp_path / "small"]
    assert main([str(word) for word in words]) == 0
    assert about(tmp_path / "small") == about(small)
    assert all(loss["lines"] == loss["lines_equal"] > 50 for loss in about(small)["loss"].values())


@pytest.mark.parametrize("form", ["strings", "no type"])
def test_other_spellings_of_the_same_file(
    form: str, made: Callable[[str], tuple[Path, Path]], text: Path, tmp_path: Path
) -> None:
    """Merges as "a b", and files of earlier versions, which do not name the type of the model."""
    full, small = made("RoBERTa")
    other = Path(shutil.copytree(full, tmp_path / "other"))
    content = tree(other)
    if form == "strings":
        content["model"]["merges"] = [" ".join(merge) for merge in content["model"]["merges"]]
    else:
        del content["model"]["type"]
    write_tree(other, content)
    assert trim_vocab(other, text, tmp_path / "small") == 0
    assert about(tmp_path / "small")["old_ids"] == about(small)["old_ids"]
    cut, expected = tree(tmp_path / "small"), tree(small)
    if form == "strings":
        assert cut["model"].pop("merges") == [" ".join(merge) for merge in expected["model"].pop("merges")]
    else:
        expected["model"].pop("type")
    assert cut == expected


def test_special_tokens_at_any_id(made: Callable[[str], tuple[Path, Path]], text: Path, tmp_path: Path) -> None:
    """The unknown token of a Unigram tokenizer behind its pieces."""
    full, small = made("mDeBERTa")
    other = Path(shutil.copytree(full, tmp_path / "other"))
    content = tree(other)
    vocab = content["model"]["vocab"]
    vocab.append(vocab.pop(3))
    content["model"]["unk_id"] = len(vocab) - 1
    content["added_tokens"] = sorted(
        (
            {**token, "id": len(vocab) - 1} if token["content"] == "[UNK]" else token
            for token in content["added_tokens"]
        ),
        key=lambda token: token["id"],
    )
    write_tree(other, content)
    changed = {"added_tokens_decoder": {}, "unk_id": len(vocab) - 1, "tokenizer_class": "PreTrainedTokenizerFast"}
    settings = json.loads((other / "tokenizer_config.json").read_text())
    (other / "tokenizer_config.json").write_text(json.dumps({**settings, **changed}))
    assert trim_vocab(other, text, tmp_path / "small") == 0
    found = about(tmp_path / "small")
    assert found["vocab_size"] == about(small)["vocab_size"]
    assert tree(tmp_path / "small")["model"]["unk_id"] == found["vocab_size"] - 2
    new = AutoTokenizer.from_pretrained(tmp_path / "small")
    assert new("🂡", add_special_tokens=False)["input_ids"][-1] == found["vocab_size"] - 2


def test_other_files_with_ids_follow(made: Callable[[str], tuple[Path, Path]], text: Path, tmp_path: Path) -> None:
    full, _ = made("RoBERTa")
    other = Path(shutil.copytree(full, tmp_path / "other"))
    last = max(tree(other)["model"]["vocab"].values())
    (other / "added_tokens.json").write_text(json.dumps({"<mask>": 4}))
    (other / "special_tokens_map.json").write_text(json.dumps({"mask_token": "<mask>"}))
    (other / "config.json").write_text(json.dumps({"model_type": "roberta", "pad_token_id": 1, "bos_token_id": last}))
    assert trim_vocab(other, text, tmp_path / "small") == 0
    small = about(tmp_path / "small")
    assert json.loads((tmp_path / "small" / "added_tokens.json").read_text()) == {"<mask>": 4}
    assert json.loads((tmp_path / "small" / "special_tokens_map.json").read_text()) == {"mask_token": "<mask>"}
    assert small["special_ids"] == [0, 1, 2, 3, 4, last]
    assert tokenizer_file(tmp_path / "small").name == small["tokenizer_file"] == "tokenizer.json"


def test_ids_before_padding_stay_where_positions_count_from_it(
    made: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    other = Path(shutil.copytree(made("RoBERTa")[0], tmp_path / "other"))
    (other / "config.json").write_text(json.dumps({"model_type": "roberta", "pad_token_id": 9}))
    assert FastPieces(other / "tokenizer.json").facts["special_ids"] == [*range(10)]


@pytest.mark.parametrize("named", ["GemmaTokenizer", "BertTokenizer"])
def test_a_class_that_only_the_models_config_overrules(
    named: str, made: Callable[[str], tuple[Path, Path]], text: Path, tmp_path: Path
) -> None:
    """With a ModernBERT's config.json AutoTokenizer reads tokenizer.json whatever the class. A vocabulary has no config.json."""
    full, _ = made("mmBERT")
    other = Path(shutil.copytree(full, tmp_path / "other"))
    settings = json.loads((other / "tokenizer_config.json").read_text())
    (other / "tokenizer_config.json").write_text(json.dumps({**settings, "tokenizer_class": named}))
    (other / "config.json").write_text(json.dumps({"model_type": "modernbert", "pad_token_id": 0}))
    assert trim_vocab(other, text, tmp_path / "small") == 0
    old, new = (AutoTokenizer.from_pretrained(directory) for directory in (other, tmp_path / "small"))
    old_ids = about(tmp_path / "small")["old_ids"]
    for line in sample_lines("ru")[:20]:
        assert [old_ids[number] for number in new(line)["input_ids"]] == old(line)["input_ids"]
    kept_class = json.loads((tmp_path / "small" / "tokenizer_config.json").read_text())["tokenizer_class"]
    assert kept_class == (named if named == "GemmaTokenizer" else "PreTrainedTokenizerFast")


# -- what cannot be cut


def failure(capsys: pytest.CaptureFixture[str], tokenizer: Path, text: Path, output: Path) -> str:
    """The error of a command that must fail and write nothing: one paragraph."""
    assert trim_vocab(tokenizer, text, output) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert not output.exists()
    return errors[0]


def changed_model(**changes: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda content: {**content, "model": {**content["model"], **changes}}


def more_merges(*merges: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda content: changed_model(merges=[*content["model"]["merges"], *merges])(content)


def more_pieces(**pieces: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda content: changed_model(vocab={**content["model"]["vocab"], **pieces})(content)


def unknown_processor(content: dict[str, Any]) -> dict[str, Any]:
    return {**content, "post_processor": {"type": "Sequence", "processors": [{"type": "Other"}]}}


WRONG = {
    "WordLevel": ("BERT", changed_model(type="WordLevel"), "kind WordLevel"),
    "an unnamed kind": ("BERT", lambda content: {**content, "model": {"vocab": content["model"]["vocab"]}}, "an unnamed kind"),
    "no model": ("BERT", lambda content: {**content, "model": None}, "no `model`"),
    "an id twice": ("RoBERTa", more_pieces(xyz=7), "gives the id 7 to"),
    "a negative id": ("RoBERTa", more_pieces(xyz=-7), "not a number from 0 to"),
    "an id that is text": ("RoBERTa", more_pieces(xyz="7"), "not a number from 0 to"),
    "a piece twice": (
        "mDeBERTa",
        lambda content: changed_model(vocab=[*content["model"]["vocab"], content["model"]["vocab"][9]])(content),
        "lists a piece twice",
    ),
    "a merge of one": ("RoBERTa", more_merges("ab"), "'ab' is not a pair"),
    "a merge of three": ("RoBERTa", more_merges(["a", "b", "c"]), "is not a pair"),
    "a merge of numbers": ("RoBERTa", more_merges([1, 2]), "is not a pair"),
    "a part that is no piece": ("RoBERTa", more_merges(["a", "xyzzy"]), "needs the piece 'xyzzy'"),
    "a result that is no piece": ("RoBERTa", more_merges(["q", "~"]), "needs the piece 'q~'"),
    "an empty part": ("RoBERTa", more_merges(["", "a"]), "adds nothing"),
    "a cycle": (
        "RoBERTa",
        lambda content: more_merges(["a", "##"])(more_pieces(**{"##": 99999})(changed_model(continuing_subword_prefix="##")(content))),
        "adds nothing|needs",
    ),
    "merges that are none": ("RoBERTa", changed_model(merges={"a": "b"}), "is dict, not list"),
    "a merge of the unknown token": (
        "mmBERT",
        lambda content: more_merges(["<unk>", "a"])(more_pieces(**{"<unk>a": 3000})(content)),
        "joins '<unk>'",
    ),
    "a merge of a byte": (
        "mmBERT",
        lambda content: more_merges(["<0x41>", "a"])(more_pieces(**{"<0x41>a": 3000})(content)),
        "joins '<0x41>'",
    ),
    "a random split": ("RoBERTa", changed_model(dropout=0.1), "splits at random"),
    "a gap": ("ModernBERT", more_pieces(xyz=5000), "ids have a gap"),
    "an unknown processor": ("BERT", unknown_processor, "not a valid tokenizer.json|post-processor of type"),
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG)
def test_what_cannot_be_cut_is_rejected(
    wrong: str, made: Callable[[str], tuple[Path, Path]], text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kind, change, message = WRONG[wrong]
    full, _ = made(kind)
    other = Path(shutil.copytree(full, tmp_path / "other"))
    write_tree(other, change(tree(other)))
    capsys.readouterr()
    error = failure(capsys, other, text, tmp_path / "small")
    assert any(part in error for part in message.split("|")), error
    assert "tokenizer.json" in error
