"""`stats`: what a shard directory holds, per language, and the share that training gives to it."""

from __future__ import annotations

import numpy as np

from data_prep.shards import ShardSet

DEFAULT_ALPHA = 0.3


def table(shards: ShardSet, alpha: float = DEFAULT_ALPHA) -> str:
    """Markdown: documents, tokens, megabytes of text, share of the tokens and share at temperature `alpha`."""
    tokens = np.array([shards.num_tokens(language) for language in shards.languages], dtype=np.float64)
    raw = tokens / tokens.sum()
    smoothed = raw**alpha / (raw**alpha).sum()
    lines = [
        f"| language | documents | tokens | text MB | share | share at alpha {alpha:g} |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for index, language in enumerate(shards.languages):
        lines.append(
            f"| {language} | {shards.num_documents(language):,} | {shards.num_tokens(language):,} "
            f"| {shards.num_bytes(language) / 1e6:.2f} | {raw[index]:.2%} | {smoothed[index]:.2%} |"
        )
    return "\n".join(lines)
