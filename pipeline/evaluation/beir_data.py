"""Reads retrieval data sets in BEIR's layout, which MTEB's retrieval tasks use too.

In: a directory with `corpus.jsonl` (_id, title, text), `queries.jsonl` (_id, text) and `qrels/SPLIT.tsv` (query-id,
corpus-id, score, with a header); `.jsonl.gz` is read too. Out: the documents, and the queries that have a judgement.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zlib import error as DeflateError

from pipeline.errors import UserError
from pipeline.evaluation.finetuning.labelled_pairs import tsv_rows

JUDGEMENT_COLUMNS = ("query-id", "corpus-id", "score")


@dataclass(frozen=True)
class Collection:
    """One data set.

    Attributes:
        documents: id -> title and text
        queries: id -> text, of the queries that have a judgement above 0, in the order of their file
        judgements: query -> document -> score; not relevant at 0 or below
    """

    documents: dict[str, str]
    queries: dict[str, str]
    judgements: dict[str, dict[str, int]]


def read_collection(directory: Path, split: str, max_queries: int | None) -> Collection:
    """Read one data set.

    Args:
        split: name of the judgements' file
        max_queries: number of queries, from the start of their file; None: all

    Raises:
        UserError: a file or line is missing or cannot be read
    """
    documents = {}
    for where, row in json_lines(_file(directory, "corpus.jsonl")):
        identifier, text = _text(row, "_id", where), _text(row, "text", where)
        title = row.get("title") or ""
        if not isinstance(title, str):
            raise UserError(f"{where}: `title` is not text. Correct or delete that line.")
        if identifier in documents:
            raise UserError(f"{where}: the document {identifier!r} occurs twice. Give each its own _id.")
        documents[identifier] = f"{title} {text}".strip()
    texts = {}
    for where, row in json_lines(_file(directory, "queries.jsonl")):
        identifier, text = _text(row, "_id", where), _text(row, "text", where)
        if identifier in texts:
            raise UserError(f"{where}: the query {identifier!r} occurs twice. Give each its own _id.")
        texts[identifier] = text
    judgements = _read_judgements(_judgements_file(directory, split), documents, texts)
    chosen = [query for query in texts if max(judgements.get(query, {}).values(), default=0) > 0][:max_queries]
    if not chosen:
        raise UserError(
            f"{directory}: no query has a relevant document in qrels/{split}.tsv. Choose another split: --set beir.split=SPLIT"
        )
    return Collection(
        documents, {query: texts[query] for query in chosen}, {query: judgements[query] for query in chosen}
    )


def _file(directory: Path, name: str) -> Path:
    for path in (directory / name, directory / f"{name}.gz"):
        if path.is_file():
            return path
    raise UserError(
        f"no {name} found in {directory}. A data set in BEIR's layout has corpus.jsonl, queries.jsonl and qrels/test.tsv; name such "
        "directories: --set 'beir.data=[DIR]'"
    )


def _judgements_file(directory: Path, split: str) -> Path:
    path = directory / "qrels" / f"{split}.tsv"
    if not path.is_file():
        there = sorted(path.stem for path in directory.glob("qrels/*.tsv"))
        choose = f"it has {', '.join(there)}: --set beir.split={there[0]}" if there else "it has no qrels/*.tsv"
        raise UserError(f"no qrels/{split}.tsv found in {directory}, so no document is known to be relevant; {choose}.")
    return path


def _read_judgements(path: Path, documents: dict[str, str], queries: dict[str, str]) -> dict[str, dict[str, int]]:
    judgements: dict[str, dict[str, int]] = {}
    for where, query, document, score in tsv_rows(path, JUDGEMENT_COLUMNS):
        for kind, identifier, known in (("query", query, queries), ("document", document, documents)):
            if identifier not in known:
                file = "queries" if kind == "query" else "corpus"
                raise UserError(
                    f"{where}: the {kind} {identifier[:40]!r} is not in {file}.jsonl. Use files of the same release, or delete the line."
                )
        try:
            judgements.setdefault(query, {})[document] = int(score)
        except ValueError:
            raise UserError(
                f"{where}: the score {score[:40]!r} is not an integer. Correct or delete that line."
            ) from None
    return judgements


def json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (where, object) of every line that is not blank. A `.gz` file is decompressed."""
    opened = gzip.open if path.suffix == ".gz" else open
    number = 0
    with opened(path, "rb") as lines:
        try:
            for number, raw in enumerate(lines, start=1):
                if not raw.strip():
                    continue
                row = json.loads(raw.decode("utf-8-sig" if number == 1 else "utf-8"))
                if not isinstance(row, dict):
                    raise ValueError("not an object")
                yield f"{path}, line {number}", row
        except (EOFError, gzip.BadGzipFile, DeflateError) as error:
            raise UserError(f"{path}, after line {number}: {error}. The file is not complete; get it again.") from None
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"{path}, line {number}: no JSON object ({' '.join(str(error).split())[:120]}). Each line is one object with _id and "
                "text; correct or delete that line."
            ) from None


def _text(row: dict[str, Any], key: str, where: str) -> str:
    value = row.get(key)
    if not isinstance(value, str) or (key == "_id" and not value):
        raise UserError(
            f"{where}: `{key}` is {'missing' if value is None else 'not text'}. Correct or delete that line."
        )
    return value
