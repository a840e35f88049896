"""A small retrieval data set in BEIR's layout. Each query is the text of its relevant document."""

from __future__ import annotations

import json
from pathlib import Path

from tests.unit.evaluation.labelled_pairs import FILLER


def write_collection(directory: Path) -> Path:
    """Twelve documents and six queries, of which four have a relevant document and one has no judgement."""
    (directory / "qrels").mkdir(parents=True)
    texts = [f"{' '.join(FILLER[number : number + 5])}" for number in range(12)]
    corpus = [{"_id": f"d{n}", "title": "title 0" if n == 0 else "", "text": text} for n, text in enumerate(texts)]
    queries = [{"_id": f"q{n}", "text": f"title 0 {text}" if n == 0 else text} for n, text in enumerate(texts[:6])]
    for name, rows in (("corpus", corpus), ("queries", queries)):
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    judgements = ["q0\td0\t2", "q0\td1\t0", "q1\td1\t1", "q2\td2\t1", "q3\td3\t1", "q4\td0\t0"]
    (directory / "qrels" / "test.tsv").write_text("\n".join(["query-id\tcorpus-id\tscore", *judgements]) + "\n")
    return directory
