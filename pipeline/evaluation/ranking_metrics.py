"""nDCG, recall and reciprocal rank of a ranking, as trec_eval and BEIR compute them.

In: the documents of one query in the order of their scores, and the judgements. Out: the measures of that query.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

MEASURES = {"ndcg@10": "nDCG@10", "recall@100": "recall@100", "mrr@10": "MRR@10", "map@100": "MAP@100"}
DEPTH = 100  # documents of a ranking that the measures look at


def measures_of(ranking: Sequence[str], judgements: Mapping[str, int]) -> dict[str, float]:
    """The measures of one query, as shares of 1.

    Args:
        ranking: the best `DEPTH` documents, best first
        judgements: document -> score; 0 and below are not relevant. At least one is relevant
    """
    gains = [max(judgements.get(document, 0), 0) for document in ranking]
    ideal = sorted((score for score in judgements.values() if score > 0), reverse=True)
    relevant = len(ideal)
    ranks = [rank for rank, gain in enumerate(gains[:DEPTH], start=1) if gain > 0]
    return {
        "ndcg@10": discounted_gain(gains[:10]) / discounted_gain(ideal[:10]),
        "recall@100": len(ranks) / relevant,
        "mrr@10": 1 / ranks[0] if ranks and ranks[0] <= 10 else 0.0,
        "map@100": sum(number / rank for number, rank in enumerate(ranks, start=1)) / relevant,
    }


def discounted_gain(gains: Sequence[int]) -> float:
    """Discounted cumulative gain: each gain divided by log2 of its rank + 1."""
    return sum(gain / math.log2(rank + 1) for rank, gain in enumerate(gains, start=1))
