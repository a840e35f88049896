"""Files of tagged words: official layouts, tagging schemes, and every kind of bad input."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.__main__ import main
from pipeline.errors import UserError, exit_code_of
from pipeline.evaluation.finetuning.tagging_data import TaggingConfig, TaggingData, read_tagging
from pipeline.evaluation.finetuning.tagging_files import TaggedSentences, read_columns, read_conllu
from tests.unit.evaluation.labelled_pairs import write_hub_data
from tests.unit.evaluation.tagged_words import CONLLU, write_ud, write_wikiann


def read(directory: Path, **settings: object) -> TaggingData:
    return read_tagging(TaggingConfig(data=str(directory), **settings))


# -- CoNLL-U


def test_the_words_of_conllu_are_its_syntactic_words(tmp_path: Path) -> None:
    path = tmp_path / "x.conllu"
    path.write_text(CONLLU, encoding="utf-8-sig")
    found = read_conllu(path, None)
    assert found.words == ["Sie geht zu dem Markt für".split() + ["10 000", "Euro"], ["Halt"]]
    assert found.tags == ["PRON VERB ADP DET NOUN ADP NUM NOUN".split(), ["INTJ"]]
    assert found.skipped == {"multiword tokens": 1, "empty nodes": 1}
    assert len(read_conllu(path, 1)) == 1
    path.write_bytes(CONLLU.rstrip().replace("\n", "\r\n").encode())
    assert read_conllu(path, None) == found


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("\tVVFIN\t_\t", "\tVVFIN\t", r"line 4: 9 tab-separated columns, CoNLL-U has 10"),
        ("\tPRON\t", "\tPRN\t", r"line 3: unknown UPOS tag 'PRN'; did you mean `PRON`"),
        ("\tPRON\t", "\t_\t", r"line 3: unknown UPOS tag '_'"),
        ("2\tgeht\tgehen\tVERB\tVV", "3\tgeht\tgehen\tVERB\tVV", r"line 4: the id '3' after 1 word\(s\)"),
        ("3-4\t", "4-3\t", r"line 5: the id '4-3'"),
        ("3-4\t", "3-3\t", r"line 5: the id '3-3'"),
        ("3-4\t", "3-99\t", r"line 12: the sentence ends at word 8, but a multiword token reaches to word 99"),
        ("4\tdem", "4-5\tx\t_\t_\t_\t_\t_\t_\t_\t_\n4\tdem", r"line 7: the id '4-5'"),  # overlaps 3-4
        ("5.1\t", "7.1\t", r"line 9: the id '7.1' after 5 word\(s\).*or an empty node \(5\.1\)"),
        ("5.1\t", "five\t", r"line 9: the id 'five'"),
        ("\n\n# sent_id = 2", "", r"line 13: the id '1' after 8 word\(s\).*separate sentences by an empty line"),
    ],
)
def test_a_bad_line_of_conllu_is_named(tmp_path: Path, old: str, new: str, message: str) -> None:
    path = tmp_path / "x.conllu"
    assert old in CONLLU
    path.write_text(CONLLU.replace(old, new, 1))
    with pytest.raises(UserError, match=message):
        read_conllu(path, None)


def test_a_treebank_without_its_text(tmp_path: Path) -> None:
    path = tmp_path / "x.conllu"
    path.write_text("1\t_\t_\tNOUN\t_\t_\t0\t_\t_\t_\n\n")
    with pytest.raises(UserError, match="distributed without its text"):
        read_conllu(path, None)
    path.write_text("# only a comment\n\n")
    with pytest.raises(UserError, match="has no sentences"):
        read_conllu(path, None)


# -- one word per line


def columns(tmp_path: Path, text: str, layout: str = "conll", lenient: bool = False) -> TaggedSentences:
    path = tmp_path / "en" / "x"
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    return read_columns(path, None, layout, lenient)


CONLL_2003 = (
    "-DOCSTART- -X- O O\n\nEU NNP I-NP I-ORG\nrejects VBZ I-VP O\n\nPeter NNP I-NP I-PER\nBlackburn NNP I-NP I-PER\n"
)
UNER = "# text = in tampa bay\n1\tin\tO\t-\t-\n2\ttampa\tB-LOC\t-\tsomebody\n3\tbay\tI-LOC\t-\tsomebody\n\n"
WIKIANN = "en:Tampa\tB-LOC\nen:Bay\tI-LOC\nen::\tO\n\nen:is\tO\n"
MASAKHANE = "Trump B-PER\nda O\n\nTwitter B-ORG\n"


@pytest.mark.parametrize(
    ("text", "layout", "words", "tags", "scheme"),
    [
        (
            CONLL_2003,
            "conll",
            [["EU", "rejects"], ["Peter", "Blackburn"]],
            [["B-ORG", "O"], ["B-PER", "I-PER"]],
            "IOB1",
        ),
        (UNER, "uner", [["in", "tampa", "bay"]], [["O", "B-LOC", "I-LOC"]], "IOB2"),
        (WIKIANN, "wikiann", [["Tampa", "Bay", ":"], ["is"]], [["B-LOC", "I-LOC", "O"], ["O"]], "IOB2"),
        (MASAKHANE, "wikiann", [["Trump", "da"], ["Twitter"]], [["B-PER", "O"], ["B-ORG"]], "IOB2"),
        ("a\tNOUN\n\nb\tX\n", "xtreme", [["a"], ["b"]], [["NOUN"], ["X"]], ""),
        ("a I-X\nb B-X\nc O\n", "conll", [["a", "b", "c"]], [["B-X", "B-X", "O"]], "IOB1"),
        ("a B-X\nb I-X\nc E-X\nd S-X\n", "conll", [list("abcd")], [["B-X", "I-X", "I-X", "B-X"]], "BIOES"),
        ("a B-X\nb L-X\nc U-X\nd O\n", "conll", [list("abcd")], [["B-X", "I-X", "B-X", "O"]], "BIOES"),  # BILOU
        ("a O\nb O\n", "conll", [["a", "b"]], [["O", "O"]], "IOB2"),
        (
            "a B-X\n O\n",
            "conll",
            [["a", ""]],
            [["B-X", "O"]],
            "IOB2",
        ),  # an empty word, as MasakhaNER's xho/train.txt has
    ],
)
def test_layouts_and_schemes(tmp_path: Path, text: str, layout: str, words: list, tags: list, scheme: str) -> None:
    found = columns(tmp_path, text, layout)
    assert (found.words, found.tags, found.scheme) == (words, tags, scheme)
    assert found.labels == ("entities" if scheme else "upos")


@pytest.mark.parametrize(
    ("text", "line", "scheme"),
    [
        ("a B-X\nb O\nc I-X\n\nd B-X\ne I-X\n", 3, "IOB2"),
        ("a I-X\nb O\nc B-X\n\nd I-X\n", 3, "IOB1"),
        ("a B-X\nb E-X\nc I-X\n\nd S-X\n", 3, "BIOES"),
        ("a S-X\nb B-X\n\nc S-X\n", 2, "BIOES"),  # an entity that does not end
        ("a B-X\nb I-Y\n\nc B-X\n", 2, "IOB2"),
    ],
)
def test_mixed_schemes_are_rejected_and_the_printed_fix_reads_them(
    tmp_path: Path, text: str, line: int, scheme: str
) -> None:
    first = rf"en/x, line {line}: the tags mix schemes: of 2 sentences.* 1 are not {scheme} \(the first: line {line}\)"
    with pytest.raises(UserError, match=rf"{first}.*--set tagging\.scheme=lenient"):
        columns(tmp_path, text)
    found = columns(tmp_path, text, lenient=True)
    assert found.scheme == f"{scheme} but for 1 sentence(s)"
    assert all(tag == "O" or tag[:2] in ("B-", "I-") for tags in found.tags for tag in tags)


def test_a_few_sentences_may_follow_no_scheme(tmp_path: Path) -> None:
    """Released files have some. What was read of them is in the results."""
    text = "a B-X\nb I-X\nc O\n\n" * 199 + "a B-X\nb O\nc I-X\n"
    found = columns(tmp_path, text)
    assert (found.scheme, found.tags[-1]) == ("IOB2 but for 1 sentence(s)", ["B-X", "O", "B-X"])
    with pytest.raises(UserError, match=r"of 202 sentences 3 are not IOB2"):
        columns(tmp_path, text + "\na O\nb I-X\n" * 2)


@pytest.mark.parametrize(
    ("text", "layout", "message"),
    [
        ("a\n", "conll", r"line 1: 1 column\(s\), expected a word and its tag"),
        ("a\n", "xtreme", r"line 1: 1 column\(s\).* XTREME's scripts remove the tags of test files"),
        ("1\ta\n", "uner", r"line 1: 2 column\(s\)"),
        ("a B-X\nb Q-X\n", "conll", r"line 2: 'Q-X' is no tag of an entity"),
        ("a B-X\nb B-\n", "conll", r"line 2: 'B-' is no tag"),
        ("a B-X\nb NOUN\n", "conll", r"line 2: 'NOUN' is no tag"),
        ("a NOUN\n\nb B-X\n", "conll", r"line 3: 'B-X' is no UPOS tag, but those before are"),
        ("en:a\tO\nb\tO\n", "wikiann", r"line 2: 'b' does not begin with 'en:'"),
        ("a O\rb O\n", "conll", r"line 1: a carriage return"),
        ("\n\n", "conll", "has no sentences"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, text: str, layout: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        columns(tmp_path, text, layout)


def test_latin_1_is_named(tmp_path: Path) -> None:
    path = tmp_path / "esp.train"
    path.write_bytes("Coruña B-LOC\n".encode("latin-1"))
    with pytest.raises(UserError, match=r"line 1: not UTF-8 \(byte 4 of the line\).*iconv -f latin1 -t utf-8"):
        read_columns(path, None, "conll", False)


# -- directories


def test_languages_and_treebanks(tmp_path: Path) -> None:
    data = write_ud(tmp_path / "ud", train=5, evaluation=3)
    other = data / "UD_German-Other"
    other.mkdir()
    (other / "de_other-ud-test.conllu").write_text(CONLLU)
    (data / "UD_English-Tiny" / "not-to-release").mkdir()
    (data / "UD_English-Tiny" / "not-to-release" / "en_old-ud-train.conllu").write_text("no CoNLL-U")
    found = read(data)
    assert (list(found.test), list(found.dev), len(found.train)) == (["de", "en", "sw"], ["de", "en"], 5)
    assert len(found.test["de"]) == 3 + 2, "all treebanks of a language together"
    assert found.about()["skipped"] == {"multiword tokens": 1, "empty nodes": 1}
    found = read(data, languages=["de_other", "de_tiny"], train_language="en_tiny", max_train=4, max_evaluation=1)
    assert (list(found.test), len(found.train), len(found.test["de_other"])) == (["de_other", "de_tiny"], 4, 1)
    found = found.only(["de_other"])
    assert (list(found.test), list(found.dev)) == (["de_other"], [])


def test_linked_directories_are_read(tmp_path: Path) -> None:
    write_ud(tmp_path / "ud", train=2, evaluation=2)
    links = tmp_path / "links"
    links.mkdir()
    for name in ("UD_English-Tiny", "UD_German-Tiny"):
        (links / name).symlink_to(tmp_path / "ud" / name)
    (links / "UD_German-Tiny" / "back").symlink_to(links)  # a circle
    assert list(read(links).test) == ["de", "en"]


def test_a_training_file_in_parts(tmp_path: Path) -> None:
    for part in ("train-a", "train-b", "dev", "test"):
        (tmp_path / f"cs_pdt-ud-{part}.conllu").write_text(CONLLU)
    assert len(read(tmp_path, train_language="cs").train) == 4


@pytest.mark.parametrize(
    ("names", "language"),
    [
        (("en/train", "en/dev", "en/test"), "en"),
        (("hau/train.txt", "hau/dev.txt", "hau/test.txt"), "hau"),
        (("train-en.tsv", "dev-en.tsv", "test-en.tsv"), "en"),
        (("esp.train", "esp.testa", "esp.testb"), "es"),
        (("sw_uner-ud-train.iob2", "sw_uner-ud-dev.iob2", "sw_uner-ud-test.iob2"), "sw"),
    ],
)
def test_file_names_of_every_layout(tmp_path: Path, names: tuple[str, ...], language: str) -> None:
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(UNER if name.endswith("iob2") else "tampa\tB-LOC\nbay\tI-LOC\n\n")
    found = read(tmp_path, train_language=language)
    assert (found.labels, found.tags, list(found.test)) == ("entities", ["B-LOC", "I-LOC", "O"], [language])
    assert found.train.words[0][-2:] == ["tampa", "bay"]


def test_every_directory_of_wikiann_is_a_language(tmp_path: Path) -> None:
    languages = ("be-x-old", "cbk-zam", "ceb", "en", "map-bms", "simple", "zh-classical")
    assert list(read(write_wikiann(tmp_path, languages, train=4, evaluation=2)).test) == list(languages)


def test_other_schemes_and_types_are_said(tmp_path: Path) -> None:
    data = write_wikiann(tmp_path, train=4, evaluation=2)
    (data / "de" / "test").write_text("a\tI-LOC\n\nb\tI-CAT\n")
    with open(data / "en" / "train", "a") as train:
        train.write("en:a\tO\nen:b\tI-LOC\n\n" + "en:a\tB-LOC\n\n" * 200)
    about = read(data).about()
    assert about["schemes"] == {"en (training)": "IOB2 but for 1 sentence(s)", "de": "IOB1"}
    assert about["types_not_trained"] == {"de": ["CAT"]}


def test_directories_that_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"the task tagging needs data.*Clone UD treebanks"):
        read_tagging(TaggingConfig())
    (tmp_path / "text.txt").write_text("text")
    with pytest.raises(UserError, match="no tagged sentences found below"):
        read(tmp_path)
    data = write_ud(tmp_path / "ud", train=2, evaluation=2)
    with pytest.raises(UserError, match="in the layout conll"):
        read(data, layout="conll")
    with pytest.raises(UserError, match=r"no training file of de found .* it has en_tiny"):
        read(data, train_language="de")
    with pytest.raises(UserError, match=r"no test file of fr, ur found .* it has de, en, sw"):
        read(data, languages=["en", "fr", "ur"])
    (data / "UD_English-Tiny" / "en_tiny-ud-train.iob2").write_text(UNER)
    with pytest.raises(UserError, match=r"several layouts \(ud, uner\).*--set tagging\.layout=ud"):
        read(data)
    assert read(data, layout="ud").labels == "upos"
    copy = data / "copy"
    copy.mkdir()
    (copy / "en_tiny-ud-test.conllu").write_text(CONLLU)
    with pytest.raises(UserError, match="differ, and only one can be read"):
        read(data, layout="ud")


def test_upos_and_entities_in_one_directory(tmp_path: Path) -> None:
    data = write_wikiann(tmp_path, train=4, evaluation=2)
    (data / "de" / "test").write_text("a\tNOUN\n")
    with pytest.raises(UserError, match="sentences of en have entities tags, those of de have others"):
        read(data)
    (data / "en" / "train").write_text("a\tO\n")
    with pytest.raises(UserError, match="sentences of en have no entities"):
        read(data, languages=["en"])


def test_two_kinds_of_tags_in_files_of_one_language(tmp_path: Path) -> None:
    data = write_wikiann(tmp_path, train=4, evaluation=2)
    (data / "en" / "train.txt").write_text("a DET\ndog NOUN\n\n")
    with pytest.raises(UserError, match=r"en/train has entities tags, .*en/train\.txt has upos\. Name a directory"):
        read(data)


def test_the_library_gives_the_same_sentences(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tags as texts, and as class numbers with names."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    expected = read(write_wikiann(tmp_path / "data", languages=("en",), train=6, evaluation=3))
    names, rows = ["O", "B-LOC", "I-LOC", "B-PER", "I-PER"], {}
    for split, part in (("train", expected.train), ("validation", expected.dev["en"]), ("test", expected.test["en"])):
        pairs = zip(part.words, part.tags, strict=True)
        rows[split] = [{"tokens": words, "ner_tags": [names.index(tag) for tag in tags]} for words, tags in pairs]
    classes = "".join(f"            '{number}': {name}\n" for number, name in enumerate(names))
    features = f"  features:\n  - name: tokens\n    sequence: string\n  - name: ner_tags\n    sequence:\n      class_label:\n        names:\n{classes}"
    source = write_hub_data(tmp_path, rows, f"dataset_info:\n- config_name: en\n{features}")
    found = read_tagging(TaggingConfig(data=source, languages=["en"]))
    for of in ("train", "dev", "test"):
        assert getattr(found, of) == getattr(expected, of)
    with pytest.raises(UserError, match="has no xx; it has en"):
        read_tagging(TaggingConfig(data=source, languages=["xx"]))
    with pytest.raises(UserError, match=r"Name some: --set 'tagging\.languages"):
        read_tagging(TaggingConfig(data=source))


def test_a_bad_file_ends_the_command_before_a_model_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_ud(tmp_path / "ud", train=2, evaluation=2)
    (data / "UD_German-Tiny" / "de_tiny-ud-test.conllu").write_text("1\tword\n")
    command = [
        "evaluate",
        "nowhere",
        "--tasks",
        "tagging",
        "--output",
        str(tmp_path / "out"),
        "--set",
        f"tagging.data={data}",
    ]
    assert exit_code_of(lambda: main(command)) == 2
    error = capsys.readouterr().err
    assert "de_tiny-ud-test.conllu, line 1: 2 tab-separated columns" in error
    assert len(error.strip().splitlines()) == 1
