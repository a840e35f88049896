"""Fuzz: input files of `pipeline evaluate`: sentence pairs, scored pairs, XNLI, PAWS-X, SQuAD and MLQA, tagged words, BEIR."""

from __future__ import annotations

from pathlib import Path

from pipeline.evaluation.beir_data import read_collection
from pipeline.evaluation.finetuning.pawsx import PawsxConfig
from pipeline.evaluation.finetuning.pawsx import read as read_pawsx
from pipeline.evaluation.finetuning.squad_data import read_squad
from pipeline.evaluation.finetuning.tagging_files import read_columns, read_conllu
from pipeline.evaluation.finetuning.xnli_data import read_xnli
from pipeline.evaluation.retrieval import RetrievalConfig, read_pairs
from pipeline.evaluation.sts import read_scored_pairs
from pipeline.evaluation.tatoeba import read_line_pairs
from tests.conftest import REPO
from tests.fuzz.mutations import mutated_bytes, mutated_json
from tests.fuzz.trials import fuzz, rejected_or_done
from tests.unit.evaluation.collections import write_collection
from tests.unit.evaluation.labelled_pairs import write_pawsx
from tests.unit.evaluation.tagged_words import CONLLU

SQUAD = {"version": "1.1", "data": [{"title": "t", "paragraphs": [{"context": "The cat sat on the mat.", "qas": [
    {"id": "1", "question": "Who sat?", "answers": [{"text": "The cat", "answer_start": 0}]},
    {"id": "2", "question": "Where?", "answers": [{"text": "on the mat", "answer_start": 12}]}]}]}]}  # fmt: skip
SCORED = b"sentence1,sentence2,score\n" + b"".join(b'"one, %d",two,%d.5\n' % (n, n % 5) for n in range(8))
XNLI = b"language\tgold_label\tsentence1\tsentence2\n" + b"".join(
    b"%s\t%s\tone %d\ttwo\n" % (language, label, n)
    for n, (language, label) in enumerate([(b"en", b"neutral"), (b"de", b"entailment"), (b"en", b"contradiction")] * 2)
)
MNLI = b"premise\thypo\tlabel\n" + b"one\ttwo\tneutral\nthree\tfour\tcontradictory\nfive\tsix\tentailment\n"

COLUMNS = {"uner": b"# x\n1\tin\tO\t-\t-\n2\ta\tB-LOC\t-\tx\n3\tb\tI-LOC\t-\tx\n\n1\tc\tO\t-\t-\n"}
COLUMNS |= {
    "conll": b"-DOCSTART- O\n\nEU NNP I-ORG\nsays VBZ O\n\nA NNP B-PER\n",
    "wikiann": b"en:a\tB-X\nen:b\tI-X\n\nen:c\tO\n",
}


def test_sentence_pairs(tmp_path: Path) -> None:
    content = next(iter(sorted((REPO / "samples" / "parallel").glob("en-*.tsv")))).read_bytes()[:4000]
    (tmp_path / "pairs").mkdir()
    lines = tmp_path / "tatoeba.deu-eng.deu", tmp_path / "tatoeba.deu-eng.eng"

    def trial(seed: int, times: int) -> None:
        (tmp_path / "pairs" / "en-de.tsv").write_bytes(mutated_bytes(content, seed, times))
        rejected_or_done(lambda: read_pairs(RetrievalConfig(pairs=str(tmp_path / "pairs"))))
        for number, path in enumerate(lines):
            path.write_bytes(mutated_bytes(b"one\ntwo\nthree\nfour\n", seed + number, times))
        rejected_or_done(lambda: read_line_pairs(*lines, 100))

    fuzz("sentence pairs", trial)


def test_scored_pairs(tmp_path: Path) -> None:
    def trial(seed: int, times: int) -> None:
        path = tmp_path / ("sts.csv" if seed % 2 else "sts.tsv")
        path.write_bytes(mutated_bytes(SCORED if seed % 2 else SCORED.replace(b",", b"\t"), seed, times))
        rejected_or_done(lambda: read_scored_pairs(path, ["sentence1", "sentence2", "score"]))

    fuzz("scored pairs", trial)


def test_xnli(tmp_path: Path) -> None:
    def trial(seed: int, times: int) -> None:
        for number, name in enumerate(("multinli.train.en.tsv", "xnli.dev.tsv", "xnli.test.tsv")):
            (tmp_path / name).write_bytes(mutated_bytes(XNLI if number else MNLI, seed + number, times - 1))
        rejected_or_done(lambda: read_xnli(str(tmp_path), "en", None, None, None))

    fuzz("XNLI", trial, kept=[(749, 2), (298487, 2)])


def test_squad(tmp_path: Path) -> None:
    path = tmp_path / "train-v1.1.json"

    def trial(seed: int, times: int) -> None:
        path.write_bytes(mutated_json(SQUAD, seed, times))
        rejected_or_done(lambda: read_squad(path))

    fuzz("SQuAD", trial, kept=[(160, 1), (4982, 2)])


def test_tagged_words(tmp_path: Path) -> None:
    path = tmp_path / "en" / "x"
    path.parent.mkdir()

    def trial(seed: int, times: int) -> None:
        path.write_bytes(mutated_bytes(CONLLU.encode(), seed, times))
        rejected_or_done(lambda: read_conllu(path, None))
        for layout, content in COLUMNS.items():
            path.write_bytes(mutated_bytes(content, seed, times))
            rejected_or_done(lambda: read_columns(path, None, layout, lenient=seed % 2 == 0))  # noqa: B023

    fuzz("tagged words", trial)


def test_collections(tmp_path: Path) -> None:
    directory = write_collection(tmp_path / "collection")
    names = ("corpus.jsonl", "queries.jsonl", "qrels/test.tsv")
    contents = [(directory / name).read_bytes() for name in names]

    def trial(seed: int, times: int) -> None:
        for number, name in enumerate(names):
            changed = mutated_bytes(contents[number], seed, times) if seed % 3 == number else contents[number]
            (directory / name).write_bytes(changed)
        rejected_or_done(lambda: read_collection(directory, "test", None))

    fuzz("collections", trial)


def test_pawsx(tmp_path: Path) -> None:
    files = {path: path.read_bytes() for path in write_pawsx(tmp_path / "x", train=4, evaluation=4).rglob("*.tsv")}

    def trial(seed: int, times: int) -> None:
        for number, (path, content) in enumerate(files.items()):
            path.write_bytes(mutated_bytes(content, seed + number, times - 1))
        rejected_or_done(lambda: read_pawsx(PawsxConfig(data=str(tmp_path / "x"))))

    fuzz("PAWS-X", trial)
