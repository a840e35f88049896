"""Retrieval of documents in BEIR's layout: how high the relevant documents of a query are ranked by cosine.

In: encoders and directories with `corpus.jsonl`, `queries.jsonl` and `qrels/SPLIT.tsv`. Out: nDCG@10, recall@100, MRR@10 and
MAP@100 per data set and their means, for each pooling. Every query is compared with every document.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from pipeline.errors import UserError
from pipeline.evaluation.beir_data import Collection, read_collection
from pipeline.evaluation.encoder import POOLINGS, Encoder, sentence_vectors
from pipeline.evaluation.ranking_metrics import DEPTH, MEASURES, measures_of
from pipeline.evaluation.tables import markdown_table
from pipeline.evaluation.task import OnHub, Panel, Results, Task
from pipeline.recipe.ranges import LARGEST_BATCH, LARGEST_INT, LONGEST_ROW, check_ranges
from pipeline.runtime.text_tables import text_table

QUERIES_AT_ONCE = 64  # their similarities to all documents are in memory together


@dataclass
class BeirConfig:
    """Which data sets are searched, and how their texts are encoded."""

    data: list[str] = field(default_factory=list)  # directories with corpus.jsonl, queries.jsonl and qrels/
    split: str = "test"  # the judgements: qrels/SPLIT.tsv
    max_queries: int | None = None  # at most this many queries of each data set, from its start; None: all
    max_length: int = 256  # tokens; longer texts are cut
    batch_size: int = 32  # texts per forward
    query_prefix: str = ""  # put before every query, for encoders that were trained with one ("query: ")
    document_prefix: str = ""  # put before every document ("passage: ")

    def __post_init__(self) -> None:
        limits = {"max_length": (3, LONGEST_ROW), "batch_size": (1, LARGEST_BATCH), "max_queries": (1, LARGEST_INT)}
        check_ranges(self, "beir", limits)


def read_all(config: BeirConfig) -> dict[str, Collection]:
    """Read all data sets: name of the directory -> its documents, queries and judgements."""
    if not config.data:
        raise UserError(
            "the task beir needs data sets: --set 'beir.data=[scifact]' (directories with corpus.jsonl, queries.jsonl and "
            "qrels/test.tsv)"
        )
    names = [Path(directory).resolve().name for directory in config.data]
    if len(set(names)) < len(names):
        raise UserError(f"beir.data has directories of the same name: {', '.join(config.data)}. Rename one of them.")
    return {
        name: read_collection(Path(directory), config.split, config.max_queries)
        for name, directory in zip(names, config.data, strict=True)
    }


def evaluate_beir(encoders: list[Encoder], config: BeirConfig) -> Results:
    """Per model: the measures per data set and pooling as shares of 1, and their means over the data sets."""
    collections = read_all(config)
    results: Results = {}
    for encoder in encoders:
        encoder.check_max_length(config.max_length, "beir.max_length")
        found = {name: search(encoder, collection, config) for name, collection in collections.items()}
        results[encoder.name] = {
            "mean": {p: sum(of[p]["ndcg@10"] for of in found.values()) / len(found) for p in POOLINGS},
            "per_collection": found,
            "num_queries": {name: len(of.queries) for name, of in collections.items()},
            "num_documents": {name: len(of.documents) for name, of in collections.items()},
            "values_layer": encoder.values_layer,
            "sentence_pooling": encoder.pooling.name,
        }
    return results


def search(encoder: Encoder, collection: Collection, config: BeirConfig) -> dict[str, dict[str, float]]:
    """Pooling -> the measures, means over the queries. A document with a query's own id is not a result (BEIR's rule)."""
    size, length = config.batch_size, config.max_length
    documents, _ = sentence_vectors(
        encoder, [config.document_prefix + text for text in collection.documents.values()], length, size
    )
    queries, _ = sentence_vectors(
        encoder, [config.query_prefix + text for text in collection.queries.values()], length, size
    )
    found = {}
    for pooling in POOLINGS:
        rankings = rank(queries[pooling], documents[pooling], list(collection.queries), list(collection.documents))
        each = [measures_of(rankings[query], judged) for query, judged in collection.judgements.items()]
        found[pooling] = {measure: sum(one[measure] for one in each) / len(each) for measure in MEASURES}
    return found


def rank(
    queries: torch.Tensor, documents: torch.Tensor, query_ids: list[str], document_ids: list[str]
) -> dict[str, list[str]]:
    """Query -> its best `DEPTH` documents, best first.

    Of documents with the same similarity the one with the greater id is first, as in trec_eval.

    Args:
        queries, documents: unit vectors, `[text, width]`
    """
    by_id = sorted(range(len(document_ids)), key=document_ids.__getitem__, reverse=True)
    names = [document_ids[number] for number in by_id]
    documents = documents[by_id]
    found = {}
    for start in range(0, len(query_ids), QUERIES_AT_ONCE):
        cosines = queries[start : start + QUERIES_AT_ONCE] @ documents.T
        least = cosines.topk(min(DEPTH + 1, len(names)), dim=1).values[:, -1]
        for query, row, limit in zip(query_ids[start:], cosines, least, strict=False):
            candidates = torch.nonzero(row >= limit)[:, 0]  # more than DEPTH + 1 only where similarities are equal
            best = candidates[torch.argsort(row[candidates], descending=True, stable=True)].tolist()
            found[query] = [name for number in best if (name := names[number]) != query][:DEPTH]
    return found


def beir_table(results: Results) -> str:
    """One row per model, pooling and measure: the figure per data set and the mean."""
    header, rows = _figures(results)
    return text_table(
        "retrieval of documents (BEIR)", ["model", *header], rows, ["<12", "<11", *[">12"] * (len(header) - 2)]
    )


def _card(results: Results) -> str:
    (_, *header), rows = _figures(results)
    return markdown_table(
        ["model, pooled from", *header], [[f"{name}, {pooling}", *rest] for name, pooling, *rest in rows]
    )


def _figures(results: Results) -> tuple[list[str], list[list[str]]]:
    """Header without the first column, and rows of model, pooling, measure, one figure per data set, and the mean."""
    collections = list(next(iter(results.values()))["per_collection"])
    rows = []
    for name, result in results.items():
        for pooling in result["mean"]:
            for measure, title in MEASURES.items():
                figures = [result["per_collection"][x][pooling][measure] for x in collections]
                shown = [f"{figure:.3f}" for figure in (*figures, sum(figures) / len(figures))]
                rows.append([name, pooling, title, *shown])
    return ["pooled from", "measure", *collections, "mean"], rows


def _panels(results: Results) -> list[Panel]:
    def of(result: dict[str, Any]) -> dict[str, float]:
        return {
            f"{name}: {pooling}": measures["ndcg@10"]
            for name, poolings in result["per_collection"].items()
            for pooling, measures in poolings.items()
        }

    return [Panel("retrieval of documents (BEIR), nDCG@10", {model: of(result) for model, result in results.items()})]


TASK = Task(
    name="beir",
    settings=BeirConfig,
    check=read_all,
    evaluate=lambda encoders, settings, ranks, directory: evaluate_beir(encoders, settings),
    table=beir_table,
    panels=_panels,
    card=_card,
    on_hub=OnHub("text-retrieval", "Document retrieval", {"output": "ndcg_at_10"}),
    place=25,
)
