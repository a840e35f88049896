"""The on-disk shard format, in one place. (The error type comes first: `pipeline` builds on it too.)"""

from __future__ import annotations


class DataError(ValueError):
    """Something about text, tokenizer or shards that the user can mend: what is wrong, where, how to mend it."""
