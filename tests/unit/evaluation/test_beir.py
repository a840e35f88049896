"""Retrieval in BEIR's layout: measures by hand and by trec_eval, the ranking, and every kind of bad input."""

from __future__ import annotations

import gzip
import json
import math
import random
from pathlib import Path

import pytest
import torch

from pipeline.errors import UserError
from pipeline.evaluation.beir import TASK, BeirConfig, evaluate_beir, rank, read_all
from pipeline.evaluation.beir_data import read_collection
from pipeline.evaluation.encoder import load_encoder
from pipeline.evaluation.ranking_metrics import measures_of
from tests.unit.evaluation.collections import write_collection


@pytest.fixture
def collection(tmp_path: Path) -> Path:
    return write_collection(tmp_path / "tiny")


# -- measures


def test_measures_by_hand() -> None:
    """Gains 0, 2, 0, 1 at ranks 1 to 4; ideal 3, 2, 1, of which the document with 3 is not found."""
    found = measures_of(["x", "b", "y", "c"], {"a": 3, "b": 2, "c": 1, "x": 0, "y": -1})
    gain = 2 / math.log2(3) + 1 / math.log2(5)
    ideal = 3 + 2 / math.log2(3) + 1 / 2
    expected = {"ndcg@10": gain / ideal, "recall@100": 2 / 3, "mrr@10": 1 / 2, "map@100": (1 / 2 + 2 / 4) / 3}
    assert found == pytest.approx(expected)
    assert set(measures_of(["x"], {"a": 1}).values()) == {0.0}
    assert measures_of([*map(str, range(10)), "a"], {"a": 1}) == pytest.approx(
        {"ndcg@10": 0, "recall@100": 1, "mrr@10": 0, "map@100": 1 / 11}
    )


def test_measures_are_those_of_trec_eval() -> None:
    """With ties, which trec_eval orders by id."""
    pytrec_eval = pytest.importorskip("pytrec_eval", reason="pip install pytrec-eval-terrier")
    draw = random.Random(0)
    documents = [f"d{number}" for number in range(150)]
    judged = {f"q{q}": {d: draw.randrange(-1, 4) for d in draw.sample(documents, 30)} for q in range(20)}
    scores = {query: {document: draw.randrange(40) / 8 for document in documents} for query in judged}
    expected = pytrec_eval.RelevanceEvaluator(judged, {"ndcg_cut.10", "recall.100", "map_cut.100"}).evaluate(scores)
    similarities = torch.tensor([list(of.values()) for of in scores.values()])
    rankings = rank(similarities, torch.eye(150), list(scores), documents)
    for query, of in expected.items():
        found = measures_of(rankings[query], judged[query])
        assert found["ndcg@10"] == pytest.approx(of["ndcg_cut_10"])
        assert found["recall@100"] == pytest.approx(of["recall_100"])
        assert found["map@100"] == pytest.approx(of["map_cut_100"])


def test_ranking_of_ties_and_of_a_query_that_is_a_document() -> None:
    documents = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.6, 0.8]])
    found = rank(torch.tensor([[1.0, 0.0]]), documents, ["q"], ["a", "b", "c", "d"])
    assert found == {"q": ["c", "a", "d", "b"]}
    assert rank(torch.tensor([[1.0, 0.0]]), documents, ["c"], ["a", "b", "c", "d"]) == {"c": ["a", "d", "b"]}
    many = rank(torch.ones(70, 1), torch.ones(250, 1), [f"q{n}" for n in range(70)], [f"{n:03d}" for n in range(250)])
    assert many["q69"] == [f"{n:03d}" for n in range(249, 149, -1)], (
        "of equal documents the greater ids, and 100 of them"
    )


# -- the task


def test_a_query_finds_the_document_with_its_text(tiny_teacher: Path, collection: Path) -> None:
    encoder = load_encoder(str(tiny_teacher))
    config = BeirConfig(data=[str(collection)], max_length=32)
    results = evaluate_beir([encoder], config)
    (result,) = results.values()
    assert result["per_collection"]["tiny"]["output"]["mrr@10"] == 1.0
    assert (result["num_queries"], result["num_documents"]) == ({"tiny": 4}, {"tiny": 12})
    assert result["mean"]["values"] == result["per_collection"]["tiny"]["values"]["ndcg@10"]
    row = next(line for line in TASK.table(results).splitlines() if "nDCG@10" in line)
    assert row.split()[-3:] == ["nDCG@10", f"{result['mean']['output']:.3f}", f"{result['mean']['output']:.3f}"]
    prefixed = evaluate_beir([encoder], BeirConfig(data=[str(collection)], max_length=32, document_prefix="of the "))
    assert prefixed != results


def test_what_is_read(collection: Path) -> None:
    found = read_collection(collection, "test", None)
    assert found.documents["d0"].startswith("title 0 "), "title and text"
    assert list(found.queries) == ["q0", "q1", "q2", "q3"], "q4 has no relevant document, q5 no judgement"
    assert found.judgements["q0"] == {"d0": 2, "d1": 0}
    assert list(read_collection(collection, "test", 2).queries) == ["q0", "q1"]
    path = collection / "corpus.jsonl"
    path.with_name("corpus.jsonl.gz").write_bytes(gzip.compress(path.read_bytes()))
    path.unlink()
    assert read_collection(collection, "test", None) == found


@pytest.mark.parametrize(
    ("name", "old", "new", "message"),
    [
        ("corpus.jsonl", '"d3"', '"d2"', r"corpus\.jsonl, line 4: the document 'd2' occurs twice"),
        ("corpus.jsonl", '"text"', '"body"', r"corpus\.jsonl, line 1: `text` is missing"),
        ("corpus.jsonl", '"title": "title 0"', '"title": 7', r"corpus\.jsonl, line 1: `title` is not text"),
        ("corpus.jsonl", "{", "", r"corpus\.jsonl, line 1: no JSON object"),
        ("corpus.jsonl", '{"_id": "d0"', '[{"_id": "d0"', r"corpus\.jsonl, line 1: no JSON object"),
        ("queries.jsonl", '"q1"', '""', r"queries\.jsonl, line 2: `_id` is not text"),
        ("queries.jsonl", '"q1"', '"q0"', r"queries\.jsonl, line 2: the query 'q0' occurs twice"),
        ("qrels/test.tsv", "query-id", "query", r"test\.tsv, line 1: the header lacks query-id"),
        ("qrels/test.tsv", "q0\td0", "q9\td0", r"test\.tsv, line 2: the query 'q9' is not in queries\.jsonl"),
        ("qrels/test.tsv", "q0\td0", "q0\td99", r"test\.tsv, line 2: the document 'd99' is not in corpus\.jsonl"),
        ("qrels/test.tsv", "q0\td0\t2", "q0\td0\tyes", r"test\.tsv, line 2: the score 'yes' is not an integer"),
        ("qrels/test.tsv", "q0\td0\t2", "q0\td0", r"test\.tsv, line 2: 2 columns"),
    ],
)
def test_a_bad_line_is_named(collection: Path, name: str, old: str, new: str, message: str) -> None:
    path = collection / name
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(UserError, match=message):
        read_all(BeirConfig(data=[str(collection)]))


def test_missing_files(collection: Path, tmp_path: Path) -> None:
    def read(**settings: object) -> None:
        read_all(BeirConfig(**{"data": [str(collection)], **settings}))

    with pytest.raises(UserError, match=r"the task beir needs data sets"):
        read(data=[])
    with pytest.raises(UserError, match=r"no qrels/dev\.tsv .*so no document is known to be relevant; it has test"):
        read(split="dev")
    other = write_collection(tmp_path / "other" / "tiny")
    with pytest.raises(UserError, match="directories of the same name"):
        read(data=[str(collection), str(other)])
    (other / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq0\td0\t0\n")
    with pytest.raises(UserError, match=r"no query has a relevant document"):
        read(data=[str(other)])
    (other / "qrels" / "test.tsv").unlink()
    with pytest.raises(UserError, match=r"it has no qrels/\*\.tsv"):
        read(data=[str(other)])
    (other / "queries.jsonl").unlink()
    with pytest.raises(UserError, match=r"no queries\.jsonl found in"):
        read(data=[str(other)])


def test_a_compressed_file_that_is_cut(collection: Path) -> None:
    packed = gzip.compress("".join(json.dumps({"_id": f"{n}", "text": f"{n}"}) + "\n" for n in range(9)).encode())
    (collection / "corpus.jsonl").unlink()
    (collection / "corpus.jsonl.gz").write_bytes(packed[:-9])
    with pytest.raises(UserError, match="The file is not complete; get it again"):
        read_collection(collection, "test", None)
