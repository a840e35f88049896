"""Loads tables through the `datasets` library without running a script and without unpickling.

Versions of the library before 4 ask about a data set's script or run it, and its tar reader unpickles tensors. So only
the readers that `prepare` accepts too are used.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from data_prep.command_line import module_command
from data_prep.records import check_safe_reader
from data_prep.shards import Explained
from pipeline.errors import UserError


@contextlib.contextmanager
def library_errors(name: str, otherwise: str) -> Iterator[None]:
    """Turn the library's own errors, and that it is not installed, into a `UserError`.

    `otherwise`: what to do without the library
    """
    try:
        yield
    except ImportError as error:
        if error.name != "datasets":
            raise
        raise UserError(
            f"{name} is read by the package datasets, which is not installed. Install it: {module_command('pip', 'install', 'datasets>=4.8.5,<6')}; or "
            f"{otherwise}"
        ) from None
    except Explained:
        raise
    except (OSError, ValueError) as error:
        raise UserError(
            f"{name} cannot be read by the datasets library ({' '.join(str(error).split())[:300]}). It needs the network "
            f"once; or {otherwise}"
        ) from None


def load_table(name: str, config: str | None, split: str) -> Any:
    """Load one split.

    Raises:
        UserError, DataError: the data set has a script or needs another reader
        OSError, ValueError: the library's own errors (`library_errors`)
    """
    import datasets  # slow to import, and only needed here

    try:
        builder = datasets.load_dataset_builder(name, config)
    except RuntimeError as error:  # "Dataset scripts are no longer supported"
        raise UserError(
            f"{name} cannot be read by the datasets library ({error}). Name a data set that consists of data files"
        ) from None
    check_safe_reader(name, builder)
    builder.download_and_prepare()
    return builder.as_dataset(split=split)
