"""Tables of the `datasets` library for evaluation: rows of data files, never a script and nothing that is unpickled.

The library runs no script of a data set since its version 4; older ones asked or ran it, and its tar reader unpickles
tensors. So a table is loaded by one of the readers named here, or refused.
"""

from __future__ import annotations

from typing import Any

from pipeline.errors import UserError

READERS = ("arrow", "csv", "json", "parquet", "text")


def load_table(name: str, config: str | None, split: str) -> Any:
    """One split. `OSError` and `ValueError` are the library's own; scripts and other readers are a `UserError`."""
    import datasets  # slow to import, and only this way of reading needs it

    try:
        builder = datasets.load_dataset_builder(name, config)
    except RuntimeError as error:  # "Dataset scripts are no longer supported"
        raise UserError(
            f"{name} cannot be read by the datasets library ({error}); take one that consists of data files"
        ) from None
    reader = type(builder).__module__.split(".")[-1]
    if not type(builder).__module__.startswith("datasets.packaged_modules.") or reader not in READERS:
        raise UserError(
            f"{name} is read by `{reader}` of the datasets library; only {', '.join(READERS)} are taken here, which run no code and "
            "unpickle nothing. Save it as one of these"
        )
    builder.download_and_prepare()
    return builder.as_dataset(split=split)
