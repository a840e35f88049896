"""Tokenizer directories of many kinds: shards have the ids of `AutoTokenizer`, or an error prints a fix that works."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from tokenizers import AddedToken, Tokenizer
from transformers import AutoTokenizer

from data_prep.shards import ShardSet
from data_prep.tokenizer_ids import POSITIONS_FROM_PADDING
from pipeline.distillation.models.architectures import usable_positions
from tests.tiny_encoders import CONFIGS, tiny_encoder
from tests.unit.data_prep.corpus import run
from tests.unit.data_prep.id_checks import TEXT, XLMR, assert_ids_are_the_models, changed, error_of, paste, write
from tests.unit.data_prep.tiny_tokenizers import byte_bpe, word_piece


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer_config": {"tokenizer_class": "CamembertTokenizer"}},
        {"config": {"model_type": "camembert"}},
        {"tokenizer_config": XLMR, "added_tokens": {"zblorg": 2002, "😀": 2003}},
    ],
    ids=["CamemBERT by class", "CamemBERT by model type", "added words"],
)
def test_a_model_with_other_ids_than_xlmrs_is_rejected_and_the_printed_fix_works(
    files: dict, model_alone: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    directory = model_alone(**files)
    message = error_of(text, directory, tmp_path / "shards")
    assert re.search(
        r"sentencepiece\.bpe\.model are not those of AutoTokenizer\.from_pretrained\(.*lines differ", message
    )
    assert message.count(f'AutoTokenizer.from_pretrained("{directory}").save_pretrained("{directory}")') == 1
    assert re.search(r"The first, a line that every tokenizer is checked on: '.*' from token \d+ on is \d+ '", message)
    AutoTokenizer.from_pretrained(directory).save_pretrained(directory)
    assert_ids_are_the_models(text, directory, tmp_path / "shards")


@pytest.mark.parametrize("files", [{}, {"config": {"model_type": "xlm-roberta"}}, {"tokenizer_config": XLMR}])
def test_xlmrs_model_alone_is_compared_with_xlmrs_class(
    files: dict, model_alone: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    directory = model_alone(**files)
    run(text, directory, tmp_path / "shards")
    run(text, directory / "sentencepiece.bpe.model", tmp_path / "of-file")
    one, other = ShardSet(tmp_path / "shards"), ShardSet(tmp_path / "of-file")
    assert one.fingerprint == other.fingerprint
    assert one.manifest["languages"]["en"]["counts"]["lines_compared"] == len(TEXT)


def test_a_file_is_compared_with_the_tokenizer_of_its_directory(
    model_alone: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    directory = model_alone(tokenizer_config={"tokenizer_class": "CamembertTokenizer"})
    shutil.copy(directory / "sentencepiece.bpe.model", directory / "umberto.model")
    for name in ("sentencepiece.bpe.model", "umberto.model"):
        assert "35 of 35 lines differ" in error_of(text, directory / name, tmp_path / "shards")


def test_a_model_without_a_named_class_gives_a_note(
    model_alone: Callable[..., Path], text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = model_alone()
    run(text, directory, tmp_path / "shards", quiet=False)
    assert (
        f"note: the directory of {directory}/sentencepiece.bpe.model does not name its class" in capsys.readouterr().err
    )
    write(directory / "tokenizer_config.json", XLMR)
    run(text, directory, tmp_path / "again", quiet=False)
    assert "note:" not in capsys.readouterr().err


def test_two_files_with_different_ids_are_rejected_and_the_printed_fix_leaves_one(
    tiny_tokenizer: Path, text: Path, tmp_path: Path
) -> None:
    """prepare reads the SentencePiece model, because the class is XLM-R's. AutoTokenizer reads the other file."""
    directory = Path(shutil.copytree(tiny_tokenizer, tmp_path / "tokenizer"))
    AutoTokenizer.from_pretrained(directory).save_pretrained(directory)
    content = json.loads((directory / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary[10], vocabulary[11] = vocabulary[11], vocabulary[10]
    write(directory / "tokenizer.json", content)
    message = error_of(text, directory, tmp_path / "shards")
    paste(message)
    assert (directory / "sentencepiece.bpe.model.unused").is_file()
    assert_ids_are_the_models(text, directory, tmp_path / "shards")


@pytest.mark.parametrize("files", ["spm.model", "vocab.txt", "vocab.json"])
def test_the_printed_command_makes_a_tokenizer_json_of_other_vocabularies(
    files: str, model_alone: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    if files == "spm.model":
        directory = model_alone(
            "spm.model", tokenizer_config={"vocab_type": "spm"}, config={"model_type": "deberta-v2"}
        )
    elif files == "vocab.txt":
        directory = word_piece(tmp_path / "tokenizer")
        vocabulary = json.loads((directory / "tokenizer.json").read_text())["model"]["vocab"]
        (directory / "vocab.txt").write_text("\n".join(sorted(vocabulary, key=vocabulary.__getitem__)) + "\n")
        changed(directory / "tokenizer_config.json", tokenizer_class="BertTokenizer")
        (directory / "tokenizer.json").unlink()
    else:
        directory = byte_bpe(tmp_path / "tokenizer")
        model = json.loads((directory / "tokenizer.json").read_text())["model"]
        write(directory / "vocab.json", model["vocab"])
        (directory / "merges.txt").write_text("\n".join(" ".join(pair) for pair in model["merges"]) + "\n")
        changed(directory / "tokenizer_config.json", tokenizer_class="RobertaTokenizer")
        (directory / "tokenizer.json").unlink()
    message = error_of(text, directory, tmp_path / "shards")
    assert f"holds {files}, from which prepare does not read ids" in message
    if files == "spm.model":
        paste(message)
    else:
        AutoTokenizer.from_pretrained(directory).save_pretrained(directory)
    assert_ids_are_the_models(text, directory, tmp_path / "shards")


def test_the_message_asks_for_a_missing_model_config_first(
    model_alone: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    message = error_of(text, model_alone("spm.model", tokenizer_config={"vocab_type": "spm"}), tmp_path / "shards")
    assert "copy the model's config.json into" in message
    assert "save_pretrained" in message


def test_unknown_words_stay_where_the_tokenizer_puts_them(text: Path, tmp_path: Path) -> None:
    """With WordPiece a line of unknown words is a line of [UNK]. Only special tokens that the text spells are left out."""
    shards = assert_ids_are_the_models(text, word_piece(tmp_path / "tokenizer"), tmp_path / "shards")
    assert shards.manifest["tokenizer"]["unk"] == 1
    stream = shards.stream("en", 0, shards.num_tokens("en"))
    assert (stream == 1).sum() >= 5
    assert (stream == shards.eos_id).sum() == len(TEXT)


@pytest.mark.parametrize("make", [word_piece, byte_bpe])
def test_added_words_are_one_id_as_in_the_tokenizer(make: Callable[[Path], Path], text: Path, tmp_path: Path) -> None:
    directory = make(tmp_path / "tokenizer")
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokenizer.add_tokens([AddedToken("zblorg", normalized=False), "😀"])
    tokenizer.save(str(directory / "tokenizer.json"))
    shards = assert_ids_are_the_models(text, directory, tmp_path / "shards")
    stream = shards.stream("en", 0, shards.num_tokens("en"))
    assert {tokenizer.token_to_id("zblorg"), tokenizer.token_to_id("😀")} <= set(stream.tolist())


def test_tokenizer_json_decides_if_it_adds_words_to_xlmrs(tiny_tokenizer: Path, text: Path, tmp_path: Path) -> None:
    reference = AutoTokenizer.from_pretrained(tiny_tokenizer)
    reference.add_tokens(["zblorg"])
    directory = Path(shutil.copytree(tiny_tokenizer, tmp_path / "tokenizer"))
    reference.save_pretrained(directory)
    assert (directory / "sentencepiece.bpe.model").is_file()
    assert_ids_are_the_models(text, directory, tmp_path / "shards")


@pytest.mark.parametrize("setting", [{"do_lower_case": False}, {"strip_accents": False}])
def test_a_setting_that_overrides_the_tokenizer_json_is_rejected(setting: dict, text: Path, tmp_path: Path) -> None:
    directory = word_piece(tmp_path / "tokenizer")
    changed(directory / "tokenizer_config.json", tokenizer_class="BertTokenizer", **setting)
    message = error_of(text, directory, tmp_path / "shards")
    AutoTokenizer.from_pretrained(directory).save_pretrained(directory)  # as the message says
    assert "save_pretrained" in message
    assert_ids_are_the_models(text, directory, tmp_path / "shards")


def test_a_prefix_space_that_overrides_the_tokenizer_json_is_rejected(text: Path, tmp_path: Path) -> None:
    directory = byte_bpe(tmp_path / "tokenizer")
    changed(directory / "tokenizer_config.json", tokenizer_class="RobertaTokenizer", add_prefix_space=True)
    assert "35 of 35 lines differ" in error_of(text, directory, tmp_path / "shards")


def test_row_ends_with_another_token_are_rejected(text: Path, tmp_path: Path) -> None:
    directory = word_piece(tmp_path / "tokenizer")
    changed(
        directory / "tokenizer.json",
        post_processor={"type": "BertProcessing", "sep": ["[SEP]", 3], "cls": ["[MASK]", 4]},
    )
    changed(directory / "tokenizer_config.json", tokenizer_class="BertTokenizer")
    message = error_of(text, directory, tmp_path / "shards")
    assert "begins and ends rows with the ids [4] and [3]" in message
    assert "puts 2 '[CLS]' before a text and 3 '[SEP]' after it" in message


@pytest.mark.parametrize("family", ["T5Tokenizer", "XLNetTokenizer", "MBartTokenizer"])
def test_a_tokenizer_of_another_kind_of_model_is_rejected(
    family: str, model_alone: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    """Their SentencePiece models have XLM-R's special ids here, so only the rows differ."""
    name = "sentencepiece.bpe.model" if family == "MBartTokenizer" else "spiece.model"
    message = error_of(text, model_alone(name, tokenizer_config={"tokenizer_class": family}), tmp_path / "shards")
    assert "puts nothing before a text" in message


def test_both_special_tokens_at_the_end_are_rejected(text: Path, tmp_path: Path) -> None:
    directory = word_piece(tmp_path / "tokenizer")
    template = [{"Sequence": {"id": "A", "type_id": 0}}] + [
        {"SpecialToken": {"id": t, "type_id": 0}} for t in ("[SEP]", "[CLS]")
    ]
    tokens = {t: {"id": t, "ids": [n], "tokens": [t]} for t, n in (("[SEP]", 3), ("[CLS]", 2))}
    processor = {"type": "TemplateProcessing", "single": template, "pair": template, "special_tokens": tokens}
    changed(directory / "tokenizer.json", post_processor=processor)
    assert "does not put one special token at each end" in error_of(text, directory, tmp_path / "shards")


def test_a_tokenizer_that_transformers_cannot_load_is_rejected(
    model_alone: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    directory = model_alone(tokenizer_config={"tokenizer_class": "PreTrainedTokenizerFast"})
    assert "cannot load this tokenizer (ValueError: " in error_of(text, directory, tmp_path / "shards")


def test_a_model_type_without_its_vocabulary_gets_another_fix(
    model_alone: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    """e5 has BERT's config and XLM-R's tokenizer. Without a tokenizer class, AutoTokenizer makes a BERT tokenizer of five words."""
    directory = model_alone(config={"model_type": "bert"})
    message = error_of(text, directory, tmp_path / "shards")
    command = re.search(r"(echo '[^']*' > \S+)", message)
    assert command is not None, message
    _, content, _, file = shlex.split(command[1])
    Path(file).write_text(content)
    assert_ids_are_the_models(text, directory, tmp_path / "shards")


@pytest.mark.parametrize("name", CONFIGS)
def test_the_models_that_count_positions_from_padding_are_known(name: str) -> None:
    """These models, and no others, have fewer positions for a text than `max_position_embeddings`: 2 with padding id 1."""
    model, row = tiny_encoder(name), torch.full((1, 80), 10)
    counts_from_padding = name in POSITIONS_FROM_PADDING
    assert usable_positions(model.config) == (78 if counts_from_padding else 80)
    with (
        torch.inference_mode(),
        pytest.raises((IndexError, RuntimeError), match="out of") if counts_from_padding else nullcontext(),
    ):
        model(row)
    model(row[:, : usable_positions(model.config)])


def test_a_padding_id_that_moves_positions_is_rejected(
    model_alone: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    directory = model_alone(tokenizer_config=XLMR, config={"model_type": "xlm-roberta", "pad_token_id": 0})
    assert "has pad_token_id 0, the tokenizer's padding is 1" in error_of(text, directory, tmp_path / "shards")
    changed(directory / "config.json", pad_token_id=1)
    assert_ids_are_the_models(text, directory, tmp_path / "shards")
