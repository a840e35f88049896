"""The relation loss: `relation_kl` and its backends. `loss` reads like the paper; `reference` is the same in float64."""

from __future__ import annotations

from pipeline.distillation.relations.loss import relation_kl, relation_kl_by_row

__all__ = ["relation_kl", "relation_kl_by_row"]
