"""How much disk the shards will need.

In: the sources of a language. Out: bytes, estimated from the start of its largest file before anything is written.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from data_prep.clean import CleanOptions
from data_prep.encode import encode_block
from data_prep.shards import DataError
from data_prep.sources import Source, long_start
from data_prep.tokenizer import Tokenizer

PROBE_TEXT_BYTES = 1 << 20  # decompressed, for the ratio of text to file
PROBE_TOKEN_BYTES = 1 << 15  # tokenised, for the ratio of tokens to text
SAFETY = 1.05
BYTES_PER_TOKEN = 4.05


def estimated_bytes(sources: list[Source], tokenizer: Tokenizer) -> int:
    """Estimated size of the shards of one language. All its files are taken to be like the start of the largest one."""
    largest = max(sources, key=lambda source: source.stamp()["bytes"])
    file_bytes = sum(source.stamp()["bytes"] for source in sources)
    try:
        text = next(long_start(largest.chunks(), PROBE_TEXT_BYTES), b"")
    except DataError:
        return 0  # the language's own job reports what is wrong with it
    read = max(1, min(largest.position, largest.stamp()["bytes"]))
    sample = text[:PROBE_TOKEN_BYTES]
    tokens = len(encode_block(tokenizer, sample, largest.language, CleanOptions()).tokens) / 4
    return int(file_bytes * len(text) / read * tokens / max(1, len(sample)) * BYTES_PER_TOKEN * SAFETY)


def check_free_space(output: Path, needed: int) -> int:
    """Free bytes at `output`. Raises `DataError` if there are fewer than `needed`."""
    free = shutil.disk_usage(output).free
    if needed > free:
        raise DataError(
            f"{output} has {free / 1e9:.2f} GB free; the shards still to be made need about {needed / 1e9:.2f} GB. Free some "
            "space, choose another --output, or prepare fewer languages (--language xx)."
        )
    return free
