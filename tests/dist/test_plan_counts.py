"""A plan against real engines on real ranks: bytes held within 15 %, operations and bytes sent within 1 %."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.bench_plan import memory_row, operations_row, run_for_real, traffic_rows
from benchmarks.plan_cases import Case, clusters, shapes

SHAPES, CLUSTERS = shapes(1), clusters(1)[:2]
HELD = SHAPES[:3]  # the benchmark runs them all; a forked engine needs one or two seconds


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    return run_for_real([*HELD, *CLUSTERS], tmp_path_factory.mktemp("real"))


@pytest.mark.parametrize("case", HELD, ids=lambda case: case.name)
def test_memory(case: Case, reports: dict[str, Any], tmp_path: Path) -> None:
    assert memory_row(case, reports[case.name], tmp_path)[-1] == pytest.approx(1, abs=0.15)


@pytest.mark.parametrize("case", SHAPES, ids=lambda case: case.name)
def test_operations(case: Case, tmp_path: Path) -> None:
    assert operations_row(case, tmp_path)[-1] == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("case", CLUSTERS, ids=lambda case: case.name)
def test_traffic(case: Case, reports: dict[str, Any], tmp_path: Path) -> None:
    rows = traffic_rows(case, reports[case.name], tmp_path)
    assert rows
    for row in rows:
        assert row[-1] == pytest.approx(1, abs=0.01), row
