"""The relation loss: `relation_kl`, the loss of each row, and the backends that compute them.

`loss` follows the paper, `reference` computes the same in float64, `selection` chooses a backend on the first batch.
Every module of this package is imported, so that a file with a `@relation_backend` function adds a backend. Modules with
a leading underscore are not: they import packages that may be missing.
"""

from __future__ import annotations

import importlib
import pkgutil

from pipeline.distillation.relations.loss import relation_kl, relation_kl_by_row

__all__ = ["relation_kl", "relation_kl_by_row"]

for _module in pkgutil.iter_modules(__path__):  # sorted by name: the table has the same order on every rank
    if not _module.name.startswith("_"):
        importlib.import_module(f"{__name__}.{_module.name}")
