"""`prepare`: the same bytes in every kind of run, and no mixing with another tokenizer, option or text."""

from __future__ import annotations

import lzma
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from data_prep.clean import CleanOptions
from data_prep.durable_files import unique_name
from data_prep.journal import JOURNAL_NAME, Journal
from data_prep.manifest import import_languages, write_manifest
from data_prep.shards import DataError, ShardSet
from data_prep.sources import ReadOptions
from data_prep.verify import verify
from tests.unit.data_prep.corpus import content, run, write_corpus
from tests.unit.data_prep.small_data_set import stop_after


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("input") / "corpus")


@pytest.fixture(scope="module")
def finished(corpus: Path, tiny_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("finished") / "shards"
    assert run(corpus, tiny_tokenizer, output) == []
    return output


@pytest.fixture
def begun(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished output without its manifest and without the last two Turkish shards."""
    output = shutil.copytree(finished, tmp_path / "begun")
    (output / "manifest.json").unlink()
    journal = output / "tr" / "journal.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(lines[:-2]) + lines[-2][:50])
    (output / "tr" / "00099.tok.tmp").write_bytes(b"in flight")
    return output


def test_tokens_are_those_of_sentencepiece_line_by_line(corpus: Path, finished: Path, tiny_tokenizer: Path) -> None:
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tiny_tokenizer / "sentencepiece.bpe.model"))
    expected = []
    for line in (corpus / "hi.txt").read_text().split("\n"):
        if line.strip():
            ids = [3 if piece == 0 else piece + 1 for piece in processor.encode(line)]
            expected += [*ids, 2]
    shards = ShardSet(finished)
    assert shards.stream("hi", 0, shards.num_tokens("hi")).tolist() == expected
    assert shards.languages == ["hi", "sw", "tr"]
    assert len(shards.shards("tr")) > 5
    assert verify(finished) == []


def test_the_public_call_of_sentencepiece_gives_the_same_bytes(
    corpus: Path, finished: Path, tiny_tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data_prep.sentencepiece_tokenizer.KNOWN_SENTENCEPIECE", "another version")
    run(corpus, tiny_tokenizer, tmp_path / "shards")
    assert content(tmp_path / "shards") == content(finished)


@pytest.mark.parametrize("num_workers", [2, 3])
def test_any_number_of_workers_gives_the_same_bytes(
    corpus: Path, finished: Path, tiny_tokenizer: Path, tmp_path: Path, num_workers: int
) -> None:
    run(corpus, tiny_tokenizer, tmp_path / "shards", num_workers=num_workers)
    assert content(tmp_path / "shards") == content(finished)


def test_the_largest_language_comes_first(finished: Path) -> None:
    """tr is six times its sample; by name hi would be first."""
    written = {name: (finished / name / JOURNAL_NAME).stat().st_mtime_ns for name in ("tr", "hi", "sw")}
    assert min(written, key=lambda name: written[name]) == "tr"


def test_shard_size_changes_files_but_not_the_stream(
    corpus: Path, finished: Path, tiny_tokenizer: Path, tmp_path: Path
) -> None:
    run(corpus, tiny_tokenizer, tmp_path / "shards", shard_tokens=1 << 28)
    one, many = ShardSet(tmp_path / "shards"), ShardSet(finished)
    assert len(one.all_shards()) == 3
    for language in one.languages:
        rows = np.arange(one.num_rows(language, 100))
        assert np.array_equal(one.rows(language, rows, 100), many.rows(language, rows, 100))


def test_an_interrupted_run_continues_to_the_same_bytes(
    corpus: Path, finished: Path, tiny_tokenizer: Path, begun: Path
) -> None:
    kept = begun / "tr" / "00000.tok"
    before = kept.stat().st_mtime_ns
    assert run(corpus, tiny_tokenizer, begun) == []
    assert content(begun) == content(finished)
    assert kept.stat().st_mtime_ns == before


def test_a_file_that_was_begun_and_is_gone_is_named(tiny_tokenizer: Path, tmp_path: Path) -> None:
    given, output, small = tmp_path / "in", tmp_path / "out", {"shard_tokens": 500, "block_bytes": 2000}
    (given / "sw").mkdir(parents=True)
    for name in ("part-1.txt", "part-2.txt"):
        (given / "sw" / name).write_text("".join(f"Habari ya asubuhi {name} {number}.\n\n" for number in range(200)))
    run(given, tiny_tokenizer, output, **small)
    expected, entries = content(output), Journal.read(output / "sw").entries
    stop_after(output, "sw", next(number for number, entry in enumerate(entries, start=1) if entry.source == 1))
    before = content(output / "sw")
    last = (given / "sw" / "part-2.txt").rename(tmp_path / "part-2.txt")
    with pytest.raises(
        DataError, match=r"sw holds a part of file 2 of sw; the input now has only 1\. Restore it, or .*--redo sw"
    ):
        run(given, tiny_tokenizer, output, **small)
    assert content(output / "sw") == before
    last.rename(given / "sw" / "part-2.txt")
    assert run(given, tiny_tokenizer, output, **small) == []
    assert content(output) == expected


def test_a_finished_input_is_skipped(
    corpus: Path, finished: Path, tiny_tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    monkeypatch.setattr("data_prep.sources.Source.chunks", None)  # reading any text would fail
    assert run(corpus, tiny_tokenizer, finished) == []
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*")} == before


def test_a_new_date_is_no_change_but_new_text_is(
    corpus: Path, finished: Path, tiny_tokenizer: Path, tmp_path: Path
) -> None:
    moved, output = shutil.copytree(corpus, tmp_path / "in"), shutil.copytree(finished, tmp_path / "out")
    os.utime(moved / "hi.txt", (1, 1))
    assert run(moved, tiny_tokenizer, output) == []
    text = (moved / "hi.txt").read_bytes()
    (moved / "hi.txt").write_bytes(b"x" * 60 + text[60:])
    with pytest.raises(DataError, match=r"hi: .*hi\.txt is not the file that .* was made from .*--redo hi"):
        run(moved, tiny_tokenizer, output)
    assert content(output) == content(finished)
    assert run(moved, tiny_tokenizer, output, redo=["hi"]) == []
    assert content(output)["hi/00000.tok"] != content(finished)["hi/00000.tok"]
    assert verify(output) == []


@pytest.mark.parametrize(
    ("language", "redo", "message"),
    [(None, ["hi", "xx"], "--redo xx: the input has no such"), ("sw", ["hi"], "--redo hi: with --language sw only")],
)
def test_no_language_is_only_deleted(
    corpus: Path,
    finished: Path,
    tiny_tokenizer: Path,
    tmp_path: Path,
    language: str | None,
    redo: list[str],
    message: str,
) -> None:
    output = shutil.copytree(finished, tmp_path / "out")
    with pytest.raises(DataError, match=message):
        run(corpus, tiny_tokenizer, output, language, redo=redo)
    assert content(output) == content(finished)


def test_changed_text_before_the_resume_point_is_rejected(
    corpus: Path, tiny_tokenizer: Path, begun: Path, tmp_path: Path
) -> None:
    moved = shutil.copytree(corpus, tmp_path / "in")
    text = lzma.open(moved / "tr.txt.xz").read()
    (moved / "tr.txt.xz").write_bytes(lzma.compress(b"X" + text[1:]))
    before = content(begun / "tr")
    with pytest.raises(DataError, match=r"tr: The first \d+ bytes of text of .*tr\.txt\.xz are not those.*--redo tr"):
        run(moved, tiny_tokenizer, begun)
    after = content(begun / "tr")
    assert {name: after[name] for name in after if name.endswith(".tok")} == {
        name: before[name] for name in after if name.endswith(".tok")
    }


def test_files_added_to_or_removed_from_a_language_are_rejected(
    corpus: Path, finished: Path, tiny_tokenizer: Path, tmp_path: Path
) -> None:
    moved, output = shutil.copytree(corpus, tmp_path / "in"), shutil.copytree(finished, tmp_path / "out")
    (moved / "sw" / "part-3.txt").write_text("Habari ya leo.\n")
    with pytest.raises(DataError, match=r"sw: it was finished without sw/part-3\.txt.*--redo sw"):
        run(moved, tiny_tokenizer, output)
    (moved / "sw" / "part-3.txt").unlink()
    (moved / "sw" / "part-1.txt").unlink()
    with pytest.raises(DataError, match=r"sw: file 1 was sw/part-1\.txt; the input now has sw/part-2\.txt there"):
        run(moved, tiny_tokenizer, output)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shard_tokens": 7000}, "another option: shard_tokens is 6000 there and 7000 here"),
        ({"clean": CleanOptions(dedup="lines")}, "another option: dedup is 'none' there and 'lines' here"),
        ({"reading": ReadOptions("body")}, "another option: text_field is 'text' there and 'body' here"),
    ],
)
def test_other_options_are_never_mixed(
    corpus: Path, finished: Path, tiny_tokenizer: Path, options: dict[str, object], message: str
) -> None:
    before = content(finished)
    with pytest.raises(DataError, match=message):
        run(corpus, tiny_tokenizer, finished, **options)
    assert content(finished) == before


def test_another_tokenizer_is_never_mixed(corpus: Path, finished: Path, tiny_tokenizer: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.model"
    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString((tiny_tokenizer / "sentencepiece.bpe.model").read_bytes())
    del model.pieces[-1]
    other.write_bytes(model.SerializeToString())
    with pytest.raises(DataError, match="another tokenizer: pieces is 2000 there and 1999 here; sha256"):
        run(corpus, other, finished)


def test_new_languages_need_an_option(corpus: Path, finished: Path, tiny_tokenizer: Path, tmp_path: Path) -> None:
    moved, output = shutil.copytree(corpus, tmp_path / "in"), shutil.copytree(finished, tmp_path / "out")
    (moved / "fi.txt").write_text("Hyvää päivää.\n")
    with pytest.raises(DataError, match=r"begun with hi, sw, tr; the input now also has fi.*--add"):
        run(moved, tiny_tokenizer, output)
    assert run(moved, tiny_tokenizer, output, may_add=True) == []
    assert ShardSet(output).languages == ["fi", "hi", "sw", "tr"]


def test_languages_prepared_one_by_one_and_merged_are_the_same(
    corpus: Path, finished: Path, tiny_tokenizer: Path, tmp_path: Path
) -> None:
    output = tmp_path / "shards"
    assert run(corpus, tiny_tokenizer, output, "sw") == ["hi", "tr"]
    with pytest.raises(DataError, match="not finished are hi, tr"):
        write_manifest(output)
    write_manifest(output, allow_partial=True)
    assert ShardSet(output).languages == ["sw"]
    assert run(corpus, tiny_tokenizer, output, "tr") == ["hi"]
    assert run(corpus, tiny_tokenizer, output, "hi") == []
    assert content(output) == content(finished)


def test_outputs_of_several_machines_are_merged_into_one(
    corpus: Path, finished: Path, tiny_tokenizer: Path, tmp_path: Path
) -> None:
    for language, name in (("hi", "hi.txt"), ("tr", "tr.txt.xz")):
        run([str(corpus / name)], tiny_tokenizer, tmp_path / language, language)  # type: ignore[arg-type]
    run([str(corpus / "hi.txt")], tiny_tokenizer, tmp_path / "other", "hi", shard_tokens=99)  # type: ignore[arg-type]
    assert import_languages(tmp_path / "all", tmp_path / "hi") == ["hi"]
    assert import_languages(tmp_path / "all", tmp_path / "tr") == ["tr"]
    assert import_languages(tmp_path / "all", tmp_path / "hi") == []
    (tmp_path / "hi.txt").write_text("something else\n")
    run([str(tmp_path / "hi.txt")], tiny_tokenizer, tmp_path / "changed")  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"hi is in both .* and differs"):
        import_languages(tmp_path / "all", tmp_path / "changed")
    with pytest.raises(DataError, match="another option: shard_tokens"):
        import_languages(tmp_path / "all", tmp_path / "other")
    write_manifest(tmp_path / "all")
    assert verify(tmp_path / "all") == []
    assert content(tmp_path / "all" / "hi") == content(finished / "hi")


def test_temporary_files_of_killed_runs_are_removed(
    corpus: Path, finished: Path, tiny_tokenizer: Path, tmp_path: Path
) -> None:
    output = shutil.copytree(finished, tmp_path / "out")
    (output / "manifest.json").unlink()
    for name in ("manifest.json", "prepare.json"):
        unique_name(output / name, ".tmp").write_text("{")
    assert run(corpus, tiny_tokenizer, output) == []
    assert content(output) == content(finished)


def test_two_runs_cannot_work_on_one_language(corpus: Path, tiny_tokenizer: Path, begun: Path) -> None:
    with Journal(begun / "tr").locked(), pytest.raises(DataError, match="tr: Another run is preparing"):
        run(corpus, tiny_tokenizer, begun)
    assert run(corpus, tiny_tokenizer, begun) == []


def test_deduplication_survives_an_interruption(corpus: Path, tiny_tokenizer: Path, tmp_path: Path) -> None:
    options = {"clean": CleanOptions(dedup="documents", dedup_memory_mb=1)}
    run(corpus, tiny_tokenizer, tmp_path / "complete", **options)
    assert len(ShardSet(tmp_path / "complete").shards("tr")) < 15  # one of six copies is left
    counts = ShardSet(tmp_path / "complete").manifest["languages"]["tr"]["counts"]
    assert counts["documents_repeated"] > 700
    begun = shutil.copytree(tmp_path / "complete", tmp_path / "begun")
    (begun / "manifest.json").unlink()
    journal = begun / "tr" / "journal.jsonl"
    journal.write_bytes(b"".join(journal.read_bytes().splitlines(keepends=True)[:1]))
    run(corpus, tiny_tokenizer, begun, num_workers=2, **options)
    assert content(begun) == content(tmp_path / "complete")


def test_a_directory_that_is_no_output_is_not_overwritten(corpus: Path, tiny_tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(DataError, match="not empty and not an output of prepare"):
        run(corpus, tiny_tokenizer, tmp_path)
    assert content(tmp_path) == {"thesis.txt": b"years of work"}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "does not exist"),
        (lambda path: path.mkdir(), "holds none of sentencepiece.bpe.model"),
        (lambda path: path.write_bytes(b"no model"), "is not a SentencePiece model"),
    ],
)
def test_an_invalid_tokenizer_is_named(corpus: Path, tmp_path: Path, make: object, message: str) -> None:
    make(tmp_path / "tokenizer")  # type: ignore[operator]
    with pytest.raises(DataError, match=message):
        run(corpus, tmp_path / "tokenizer", tmp_path / "shards")
    assert not (tmp_path / "shards").exists()


def test_a_model_with_other_special_ids_is_rejected(corpus: Path, tmp_path: Path) -> None:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter((corpus / "hi.txt").read_text().split("\n")),
        model_prefix=str(tmp_path / "t5"),
        vocab_size=400,
        pad_id=0,
        unk_id=2,
        eos_id=1,
        bos_id=-1,
        minloglevel=2,
    )
    with pytest.raises(DataError, match=r"numbers <unk>, <s>, </s> as \(2, -1, 1\)"):
        run(corpus, tmp_path / "t5.model", tmp_path / "shards")
