"""What several unit tests read and is made once."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def evaluated(tiny_teacher: Path, tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Output directory of a real `pipeline evaluate` with every task: the tiny teacher at its last layer and at layer 2."""
    from tests.unit.evaluation.all_tasks import evaluate_everything  # brings torch, which most tests can do without

    models = [str(tiny_teacher), f"{tiny_teacher}@2"]
    return evaluate_everything(models, tiny_teacher, tiny_shards, tmp_path_factory.mktemp("evaluated"))
