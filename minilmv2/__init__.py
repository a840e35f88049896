"""MiniLMv2 distillation (arXiv 2012.15828) of multilingual encoders: the public names, documented in docs/api.md.

In: `import minilmv2`. Out: the ten names of `__all__`. Each is imported when it is first used: torch and transformers
take seconds, and `ShardSet` and `TemperatureSampler` need neither.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from data_prep.shards import ShardSet as ShardSet
    from minilmv2.commands import distil as distil
    from minilmv2.commands import evaluate as evaluate
    from minilmv2.commands import export as export
    from pipeline.data.sampler import TemperatureSampler as TemperatureSampler
    from pipeline.distillation.distiller import DistillModule as DistillModule
    from pipeline.distillation.models.student import build_student as build_student
    from pipeline.distillation.models.teacher import load_encoder as load_encoder
    from pipeline.distillation.relations import relation_kl as relation_kl
    from pipeline.distillation.tap import tap as tap

_MODULES = {
    "distil": "minilmv2.commands",
    "evaluate": "minilmv2.commands",
    "export": "minilmv2.commands",
    "relation_kl": "pipeline.distillation.relations",
    "tap": "pipeline.distillation.tap",
    "load_encoder": "pipeline.distillation.models.teacher",
    "build_student": "pipeline.distillation.models.student",
    "DistillModule": "pipeline.distillation.distiller",
    "ShardSet": "data_prep.shards",
    "TemperatureSampler": "pipeline.data.sampler",
}
__all__ = list(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'minilmv2' has no attribute {name!r}; it has: {', '.join(_MODULES)}")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_MODULES])
