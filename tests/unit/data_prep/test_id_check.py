"""Ids in shards are those of `AutoTokenizer` of the same directory, or prepare refuses before it writes anything."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from tokenizers import AddedToken, Tokenizer
from transformers import AutoTokenizer

from data_prep.__main__ import main
from data_prep.awkward import LINES, composed
from data_prep.line_sample import sample_lines
from data_prep.manifest import make_manifest, read_run, take_in, write_manifest
from data_prep.shards import DataError, ShardSet
from data_prep.sources import Source
from data_prep.tokenizer import SentencePieceTokenizer, open_tokenizer
from tests.conftest import REPO, SAMPLES
from tests.unit.data_prep.corpus import run
from tests.unit.data_prep.families import byte_bpe, word_piece

TEXT = ["The quick ☺ brown Fox zblorg [SEP] x", "Élève naïve 😀 東京", "a </s> b <mask> c", "the lazy dog"]
XLMR = {"tokenizer_class": "XLMRobertaTokenizer"}


@pytest.fixture
def text(tmp_path: Path) -> Path:
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "en.txt").write_text("\n".join(TEXT) + "\n", encoding="utf-8")
    return tmp_path / "text"


@pytest.fixture
def model_alone(tiny_tokenizer: Path, tmp_path: Path) -> Callable[..., Path]:
    """A directory with the tiny SentencePiece model under a name, and these JSON files."""

    def make(name: str = "sentencepiece.bpe.model", **files: dict) -> Path:
        directory = tmp_path / "tokenizer"
        directory.mkdir()
        shutil.copy(tiny_tokenizer / "sentencepiece.bpe.model", directory / name)
        for file, content in files.items():
            write(directory / f"{file}.json", content)
        return directory

    return make


def write(file: Path, content: dict) -> None:
    file.write_text(json.dumps(content), encoding="utf-8")


def changed(file: Path, **changes: object) -> None:
    write(file, {**json.loads(file.read_text()), **changes})


def refusal(text: Path, tokenizer: Path, output: Path) -> str:
    """The one message; nothing is written."""
    with pytest.raises(DataError) as error:
        run(text, tokenizer, output)
    assert not output.exists()
    assert "\n" not in str(error.value)
    return str(error.value)


def paste(message: str) -> None:
    """Run the command that a message prints, word for word, with this Python."""
    command = re.search(r"(python -c '[^']*')", message)
    assert command is not None, message
    program, *arguments = shlex.split(command[1])
    assert program == "python"
    subprocess.run([sys.executable, *arguments], check=True, capture_output=True)


def assert_ids_are_the_models(text: Path, tokenizer: Path, output: Path) -> ShardSet:
    """Every line of the text that spells no special token, against AutoTokenizer; the counts in the manifest."""
    assert run(text, tokenizer, output) == []
    shards, reference = ShardSet(output), AutoTokenizer.from_pretrained(tokenizer)
    stream = shards.stream("en", 0, shards.num_tokens("en"))
    lines = np.split(stream, np.flatnonzero(stream == shards.eos_id) + 1)[:-1]
    assert len(lines) == len(TEXT)
    for line, ids in zip(TEXT, lines, strict=True):
        if not any(special in line for special in reference.all_special_tokens):
            assert [shards.bos_id, *ids.tolist()] == reference(line)["input_ids"]
    counts = shards.manifest["languages"]["en"]["counts"]
    assert counts["lines_compared"] == len(TEXT)
    assert "lines_compared_differing" not in counts
    return shards


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer_config": {"tokenizer_class": "CamembertTokenizer"}},
        {"config": {"model_type": "camembert"}},
        {"tokenizer_config": XLMR, "added_tokens": {"zblorg": 2002, "😀": 2003}},
    ],
    ids=["CamemBERT by class", "CamemBERT by model type", "added words"],
)
def test_a_model_that_is_not_numbered_as_xlmrs_is_refused_and_the_printed_fix_works(
    files: dict, model_alone: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    directory = model_alone(**files)
    message = refusal(text, directory, tmp_path / "shards")
    assert re.search(
        r"sentencepiece\.bpe\.model are not those of AutoTokenizer\.from_pretrained\(.*lines differ", message
    )
    assert message.count(f'AutoTokenizer.from_pretrained("{directory}").save_pretrained("{directory}")') == 1
    assert re.search(r"The first, a line that every tokenizer is tried on: '.*' from token \d+ on is \d+ '", message)
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
        assert "35 of 35 lines differ" in refusal(text, directory / name, tmp_path / "shards")


def test_a_model_beside_which_nothing_says_whose_it_is(
    model_alone: Callable[..., Path], text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = model_alone()
    run(text, directory, tmp_path / "shards", quiet=False)
    assert f"note: nothing beside {directory}/sentencepiece.bpe.model says whose tokenizer" in capsys.readouterr().err
    write(directory / "tokenizer_config.json", XLMR)
    run(text, directory, tmp_path / "again", quiet=False)
    assert "note:" not in capsys.readouterr().err


def test_two_files_that_disagree_are_refused_and_the_printed_fix_leaves_one(
    tiny_tokenizer: Path, text: Path, tmp_path: Path
) -> None:
    """The class is XLM-R's and decides for the SentencePiece model, AutoTokenizer reads the other file."""
    directory = Path(shutil.copytree(tiny_tokenizer, tmp_path / "tokenizer"))
    AutoTokenizer.from_pretrained(directory).save_pretrained(directory)
    content = json.loads((directory / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary[10], vocabulary[11] = vocabulary[11], vocabulary[10]
    write(directory / "tokenizer.json", content)
    message = refusal(text, directory, tmp_path / "shards")
    paste(message)
    assert (directory / "sentencepiece.bpe.model.unused").is_file()
    assert_ids_are_the_models(text, directory, tmp_path / "shards")


def test_a_word_that_only_the_text_of_a_language_has_is_compared_too(
    tiny_tokenizer: Path, text: Path, tmp_path: Path
) -> None:
    """Two pieces change places that no fixed line has: lines of the language differ, those of another do not."""
    directory = Path(shutil.copytree(tiny_tokenizer, tmp_path / "tokenizer"))
    AutoTokenizer.from_pretrained(directory).save_pretrained(directory)
    content = json.loads((directory / "tokenizer.json").read_text())
    words = (SAMPLES / "cc100" / "de.txt.xz", "de")
    lines = sample_lines("de", [Source("de", words[0], "de.txt.xz")]).lines
    encoder = open_tokenizer(directory)
    elsewhere = set(encoder.encode_lines([line.encode() for line in LINES])[0].tolist())
    ids = encoder.encode_lines([line.encode() for line in lines])[0]
    numbers, counts = np.unique(ids[~np.isin(ids, [*elsewhere, 0, 1, 2, 3])], return_counts=True)
    one, other = numbers[np.argsort(-counts)[:2]].tolist()
    vocabulary = content["model"]["vocab"]
    vocabulary[one][0], vocabulary[other][0] = vocabulary[other][0], vocabulary[one][0]
    write(directory / "tokenizer.json", content)
    shutil.copy(words[0], text)
    message = refusal(text, directory, tmp_path / "shards")
    assert "The first, a line of de: " in message


def test_splits_that_score_the_same_are_no_other_tokenizer(tmp_path: Path) -> None:
    """A run of dots is `..` `.` to one library and `.` `..` to the other, by rounding alone: in a fixed line as in the text."""
    directory = tmp_path / "tokenizer"
    directory.mkdir()
    lines = [f"{number} words… and more" for number in range(20)]
    train(directory, ["tiếng việt số một", "カキクケコ ガギグゲゴ ハヒフヘホ パピプペポ ゙ ゚"])
    reference, encoder = AutoTokenizer.from_pretrained(directory), open_tokenizer(directory)
    pairs = [
        (encoder.encode_lines([line.encode()])[0].tolist()[:-1], reference(line)["input_ids"][1:-1]) for line in lines
    ]
    differing = [pair for pair in pairs if pair[0] != pair[1]]
    assert len(differing) > 2
    assert isinstance(encoder, SentencePieceTokenizer)
    assert all(encoder.are_near_tie(*pair) for pair in differing)
    assert not encoder.are_near_tie(differing[0][0], differing[0][1][1:])
    (tmp_path / "en.txt").write_text("\n".join(lines))
    run([str(tmp_path / "en.txt")], directory, tmp_path / "shards")
    counts = ShardSet(tmp_path / "shards").manifest["languages"]["en"]["counts"]
    assert (counts["lines_compared"], counts["lines_compared_differing"]) == (len(lines), len(differing))


def train(directory: Path, texts: list[str]) -> None:
    """A SentencePiece model of these texts and the fixed lines, in XLM-R's layout."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*texts, *LINES] * 10),
        model_prefix=str(directory / "sentencepiece.bpe"),
        vocab_size=600,
        hard_vocab_limit=False,
        character_coverage=1.0,
        minloglevel=2,
    )
    write(directory / "tokenizer_config.json", XLMR)


def test_a_few_lines_may_differ(tiny_tokenizer: Path, tmp_path: Path) -> None:
    """U+0085 is a blank to one library and an unknown character to the other."""
    (tmp_path / "en.txt").write_bytes("\n".join([*TEXT, "one\u0085two", "three\u0085four"]).encode())
    run([str(tmp_path / "en.txt")], tiny_tokenizer, tmp_path / "shards")
    counts = ShardSet(tmp_path / "shards").manifest["languages"]["en"]["counts"]
    assert (counts["lines_compared"], counts["lines_compared_differing"]) == (len(TEXT) + 2, 2)


def test_decomposed_vietnamese_and_half_width_kana_are_no_other_tokenizer(tmp_path: Path) -> None:
    """The two libraries compose characters of several code points differently; the composed line is the same to both."""
    lines = [*["Tie\u0302\u0301ng Vie\u0323\u0302t"] * 9, *["ｶﾞｷﾞｸﾞ ﾊﾟﾋﾟ"] * 9]
    directory = tmp_path / "tokenizer"
    directory.mkdir()
    train(directory, ["tiếng việt số một", "カキクケコ ガギグゲゴ ハヒフヘホ パピプペポ ゙ ゚"])
    reference, encoder = AutoTokenizer.from_pretrained(directory), open_tokenizer(directory)

    def differ(line: str) -> bool:
        return encoder.encode_lines([line.encode()])[0].tolist() != reference(line)["input_ids"][1:]

    assert all(map(differ, lines))
    assert not any(differ(composed(line)) for line in lines)
    (tmp_path / "vi.txt").write_text(
        "\n".join(f"{line} {number}" for number, line in enumerate(lines)), encoding="utf-8"
    )
    run([str(tmp_path / "vi.txt")], directory, tmp_path / "shards")
    counts = ShardSet(tmp_path / "shards").manifest["languages"]["vi"]["counts"]
    assert (counts["lines_compared"], counts["lines_compared_differing"]) == (18, 18)


@pytest.mark.parametrize("files", ["spm.model", "vocab.txt", "vocab.json"])
def test_a_vocabulary_that_only_transformers_reads_names_the_command_that_makes_a_tokenizer_json(
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
    message = refusal(text, directory, tmp_path / "shards")
    assert f"holds {files}, from which ids are not read here" in message
    if files == "spm.model":
        paste(message)
    else:
        AutoTokenizer.from_pretrained(directory).save_pretrained(directory)
    assert_ids_are_the_models(text, directory, tmp_path / "shards")


def test_without_the_models_config_it_is_asked_for_first(
    model_alone: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    message = refusal(text, model_alone("spm.model", tokenizer_config={"vocab_type": "spm"}), tmp_path / "shards")
    assert "copy the model's config.json into" in message
    assert "save_pretrained" in message


def test_unknown_words_stay_where_the_tokenizer_puts_them(text: Path, tmp_path: Path) -> None:
    """Of WordPiece: a line of unknown words is a line of [UNK], and only special tokens spelled in the text are left out."""
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


def test_words_that_were_added_to_xlmrs_tokenizer_decide_for_its_tokenizer_json(
    tiny_tokenizer: Path, text: Path, tmp_path: Path
) -> None:
    reference = AutoTokenizer.from_pretrained(tiny_tokenizer)
    reference.add_tokens(["zblorg"])
    directory = Path(shutil.copytree(tiny_tokenizer, tmp_path / "tokenizer"))
    reference.save_pretrained(directory)
    assert (directory / "sentencepiece.bpe.model").is_file()
    assert_ids_are_the_models(text, directory, tmp_path / "shards")


@pytest.mark.parametrize("setting", [{"do_lower_case": False}, {"strip_accents": False}])
def test_a_setting_that_overrides_the_tokenizer_json_is_noticed(setting: dict, text: Path, tmp_path: Path) -> None:
    directory = word_piece(tmp_path / "tokenizer")
    changed(directory / "tokenizer_config.json", tokenizer_class="BertTokenizer", **setting)
    message = refusal(text, directory, tmp_path / "shards")
    AutoTokenizer.from_pretrained(directory).save_pretrained(directory)  # what the message says
    assert "save_pretrained" in message
    assert_ids_are_the_models(text, directory, tmp_path / "shards")


def test_a_prefix_space_that_overrides_the_tokenizer_json_is_noticed(text: Path, tmp_path: Path) -> None:
    directory = byte_bpe(tmp_path / "tokenizer")
    changed(directory / "tokenizer_config.json", tokenizer_class="RobertaTokenizer", add_prefix_space=True)
    assert "35 of 35 lines differ" in refusal(text, directory, tmp_path / "shards")


def test_row_ends_of_another_token_are_refused(text: Path, tmp_path: Path) -> None:
    directory = word_piece(tmp_path / "tokenizer")
    changed(
        directory / "tokenizer.json",
        post_processor={"type": "BertProcessing", "sep": ["[SEP]", 3], "cls": ["[MASK]", 4]},
    )
    changed(directory / "tokenizer_config.json", tokenizer_class="BertTokenizer")
    message = refusal(text, directory, tmp_path / "shards")
    assert "begins and ends rows with the ids [4] and [3]" in message
    assert "puts 2 '[CLS]' before a text and 3 '[SEP]' after it" in message


@pytest.mark.parametrize("family", ["T5Tokenizer", "XLNetTokenizer", "MBartTokenizer"])
def test_a_tokenizer_of_no_encoder_is_refused(
    family: str, model_alone: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    """Their SentencePiece models have XLM-R's special ids here, so the rows alone tell."""
    name = "sentencepiece.bpe.model" if family == "MBartTokenizer" else "spiece.model"
    message = refusal(text, model_alone(name, tokenizer_config={"tokenizer_class": family}), tmp_path / "shards")
    assert "puts nothing before a text" in message


def test_both_special_tokens_at_the_end_are_no_row_ends(text: Path, tmp_path: Path) -> None:
    directory = word_piece(tmp_path / "tokenizer")
    template = [{"Sequence": {"id": "A", "type_id": 0}}] + [
        {"SpecialToken": {"id": t, "type_id": 0}} for t in ("[SEP]", "[CLS]")
    ]
    tokens = {t: {"id": t, "ids": [n], "tokens": [t]} for t, n in (("[SEP]", 3), ("[CLS]", 2))}
    processor = {"type": "TemplateProcessing", "single": template, "pair": template, "special_tokens": tokens}
    changed(directory / "tokenizer.json", post_processor=processor)
    assert "does not put one special token at each end" in refusal(text, directory, tmp_path / "shards")


def test_a_tokenizer_that_transformers_cannot_load_is_refused(
    model_alone: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    directory = model_alone(tokenizer_config={"tokenizer_class": "PreTrainedTokenizerFast"})
    assert "cannot load this tokenizer (ValueError: " in refusal(text, directory, tmp_path / "shards")


def test_a_model_type_without_its_vocabulary_is_told_apart(
    model_alone: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    """BERT's config beside XLM-R's model: e5's kind. AutoTokenizer makes a BERT tokenizer of five words."""
    directory = model_alone(config={"model_type": "bert"})
    message = refusal(text, directory, tmp_path / "shards")
    command = re.search(r"(echo '[^']*' > \S+)", message)
    assert command is not None, message
    _, content, _, file = shlex.split(command[1])
    Path(file).write_text(content)
    assert_ids_are_the_models(text, directory, tmp_path / "shards")


def test_padding_that_moves_positions_is_refused(model_alone: Callable[..., Path], text: Path, tmp_path: Path) -> None:
    directory = model_alone(tokenizer_config=XLMR, config={"model_type": "xlm-roberta", "pad_token_id": 0})
    assert "has pad_token_id 0, the tokenizer's padding is 1" in refusal(text, directory, tmp_path / "shards")
    changed(directory / "config.json", pad_token_id=1)
    assert_ids_are_the_models(text, directory, tmp_path / "shards")


def test_the_sample_is_the_same_at_every_run_and_holds_the_rare_lines(tmp_path: Path) -> None:
    lines = [f"line number {number} of plain text" for number in range(5000)]
    lines[3500] = "a line with ☃ in it"
    (tmp_path / "en.txt").write_text("\n".join(lines))
    source = Source("en", tmp_path / "en.txt", "en.txt")
    one, other = sample_lines("en", [source]), sample_lines("en", [source])
    assert one == other
    assert one.lines[:100] == lines[:100]
    assert lines[3500] in one.lines
    assert any(line in one.lines for line in lines[1000:3500])
    assert len(one.lines) <= 300


def test_the_counts_survive_a_merge_and_old_outputs_have_none(tiny_tokenizer: Path, text: Path, tmp_path: Path) -> None:
    run(text, tiny_tokenizer, tmp_path / "one")
    take_in(tmp_path / "merged", tmp_path / "one")
    write_manifest(tmp_path / "merged")
    merged = ShardSet(tmp_path / "merged").manifest
    assert merged == ShardSet(tmp_path / "one").manifest
    assert set(merged["ids_compared_with"]) == {"transformers", "tokenizers", "sha256"}
    old = {key: value for key, value in read_run(tmp_path / "merged").items() if key != "ids_compared_with"}
    write(tmp_path / "merged" / "prepare.json", old)
    write(tmp_path / "merged" / "manifest.json", make_manifest(tmp_path / "merged", old))
    assert run(text, tiny_tokenizer, tmp_path / "merged") == []
    assert "ids_compared_with" not in ShardSet(tmp_path / "merged").manifest


def test_shards_without_unknown_words_are_told_from_later_ones(text: Path, tmp_path: Path) -> None:
    """What older versions made of WordPiece: their outputs are not continued, and a run that reads them says so."""
    directory = word_piece(tmp_path / "tokenizer")
    run(text, directory, tmp_path / "shards")
    what, warnings = ShardSet(tmp_path / "shards").compare_ids(directory)
    assert (what, warnings) == ("ids compared with AutoTokenizer's when the shards were prepared", [])
    old = read_run(tmp_path / "shards")
    del old["tokenizer"]["unk"], old["ids_compared_with"]
    write(tmp_path / "shards" / "prepare.json", old)
    write_manifest(tmp_path / "shards")
    what, warnings = ShardSet(tmp_path / "shards").compare_ids(directory)
    assert re.fullmatch(r"ids compared with AutoTokenizer's on \d\d lines", what)
    assert ["left out unknown words" in warning for warning in warnings] == [True]
    with pytest.raises(DataError, match="unk is None there and 1 here"):
        run(text, directory, tmp_path / "shards")


def test_a_vocabulary_is_not_cut_from_a_model_that_is_not_xlmrs(
    model_alone: Callable[..., Path], text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = model_alone(tokenizer_config={"tokenizer_class": "CamembertTokenizer"})
    words = ["trim-vocab", "--tokenizer", directory, "--input", text, "--output", tmp_path / "small", "--workers", 1]
    assert main([str(word) for word in words]) == 2
    assert "(CamembertTokenizer)" in capsys.readouterr().err
    assert not (tmp_path / "small").exists()


def test_transformers_and_torch_stay_out_of_the_process_that_forks_its_workers(
    tiny_tokenizer: Path, text: Path, tmp_path: Path
) -> None:
    code = (
        "import sys; from data_prep.__main__ import main; "
        f"assert main(['prepare', '--input', {str(text)!r}, '--tokenizer', {str(tiny_tokenizer)!r}, '--workers', '2', "
        f"'--output', {str(tmp_path / 'shards')!r}]) == 0; assert not {{'torch', 'transformers'}} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=REPO, check=True, capture_output=True)
    assert ShardSet(tmp_path / "shards").manifest["languages"]["en"]["counts"]["lines_compared"] == len(TEXT)


def test_a_comparison_that_is_killed_is_named(
    monkeypatch: pytest.MonkeyPatch, tiny_tokenizer: Path, text: Path, tmp_path: Path
) -> None:
    import os
    import signal

    from data_prep import id_check

    monkeypatch.setattr(id_check, "reference_of", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    assert "ended with status -9" in refusal(text, tiny_tokenizer, tmp_path / "shards")
