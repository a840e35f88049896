"""Versions of Python and packages: what `doctor` says of them, and that ranges, rows, results and docs/versions.md agree."""

from __future__ import annotations

import json
import platform
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from data_prep.command_line import module_command
from pipeline.doctor.machine import Finding
from pipeline.doctor.versions import read_results, version_findings
from pipeline.runtime.engine import device_precisions
from tests.conftest import REPO
from tests.versions.__main__ import counts, merged, table
from tests.versions.environments import NotBuiltError, Row, build, find_python, name_of, pins_of, read_rows

PROJECT = tomllib.loads((REPO / "pyproject.toml").read_text(encoding="utf-8"))["project"]
RANGES = {r.name: r for r in map(Requirement, [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["hub"]])}
NUMPY = metadata.version("numpy")


@pytest.fixture
def look(tmp_path: Path):
    """The findings in a project with these ranges, pins and results."""

    def findings(
        *ranges: str, python: str = ">=3.11", optional: str = "[]", pins: str = "", results: object = ()
    ) -> list[Finding]:
        (tmp_path / "pyproject.toml").write_text(
            f'[project]\nrequires-python = "{python}"\ndependencies = {json.dumps(ranges)}\n'
            f"optional-dependencies.hub = {optional}\n"
        )
        (tmp_path / "requirements.txt").write_text(pins)
        (tmp_path / "results.json").write_text(json.dumps(results))
        return version_findings(tmp_path, tmp_path / "results.json")

    return findings


def result(numpy: str, exit_code: int, python: str = "3.99.1") -> dict:
    return {
        "name": "x",
        "python": python,
        "packages": {"numpy": numpy},
        "parts": {"unit": {"exit_code": 0}, "dist": {"exit_code": exit_code}},
    }


def test_tested_by_the_pins_or_by_a_row_that_passed(look) -> None:
    of_pins = look("numpy>=1", pins=f"# why\nnumpy=={NUMPY}  # arrays\n")
    of_row = look("numpy>=1", results=[result(NUMPY, exit_code=0)])
    of_build = look("numpy>=1", results=[result(f"{NUMPY}+cpu", exit_code=0)])
    for findings in (of_pins, of_row, of_build):
        assert findings[-1].what.startswith("tested: ")
        assert findings[-1].what.endswith(f"numpy {NUMPY}")
    only_unit = {**result(NUMPY, exit_code=0), "parts": {"unit": {"exit_code": 0}}}
    for not_passed in (result(NUMPY, exit_code=1), only_unit, {**only_unit, "parts": {}, "not_run": "why"}):
        supported = look("numpy>=1", results=[not_passed])[0]
        assert supported.status == "ok"
        assert supported.what.startswith("supported, but not tested: ")
        assert supported.what.endswith(f"numpy {NUMPY} (tested: none)")


def test_supported_but_not_tested(look) -> None:
    only = look("numpy>=1", pins="numpy==1.0.0\n", results=[result("1.5.0+cpu", exit_code=0)])[0]
    assert (only.status, only.fix) == ("ok", "")
    assert f"numpy {NUMPY} (tested: 1.0.0, 1.5.0)" in only.what
    same_python = [result("1.0", exit_code=0, python=platform.python_version())]
    assert look(results=same_python)[-1].what == f"tested: python {platform.python_version()}"


def test_not_supported_or_not_installed(look) -> None:
    old, missing, other = look(
        "numpy<1", "no-such-package>=3", "no-such-either", pins="numpy==0.9\nno-such-package==3.2\n"
    )[:3]
    assert (old.status, old.fix) == ("warn", module_command("pip", "install", "numpy==0.9"))
    assert old.what == f"numpy {NUMPY} is not supported (<1)"
    assert (missing.status, missing.fix) == ("fail", module_command("pip", "install", "no-such-package==3.2"))
    assert (other.status, other.fix) == ("fail", module_command("pip", "install", "no-such-either"))
    python = look(python=">=3.98", results=[result("1.0", exit_code=0)])[0]
    assert (python.status, python.subject, python.fix) == ("fail", "python", "make venv PYTHON=python3.99")


def test_an_optional_package_is_not_required(look, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(version_findings.__globals__["OPTIONAL"], "no-such-package", "for one kind of input")
    missing = look(optional='["no-such-package>=1"]')[0]
    assert (missing.status, missing.what) == (
        "warn",
        "no-such-package is not installed; it is required for one kind of input",
    )


@pytest.mark.skipif(not Path("/proc/cpuinfo").is_file(), reason="Linux only")
def test_bf16_of_the_cpu_is_the_same_without_the_function_of_newer_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch 2.8 has no `torch.cpu.get_capabilities`; there the flags of the system are read."""
    reported = device_precisions(torch.device("cpu"))
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert device_precisions(torch.device("cpu")) == reported
    for flags, fast in (("avx512f avx512_bf16", True), ("amx_tile amx_bf16", True), ("avx2 avx512f", False)):
        monkeypatch.setattr(Path, "read_text", lambda _, flags=flags: f"flags\t\t: fpu {flags}\n")
        assert device_precisions(torch.device("cpu")).bf16_fast is fast


# -- ranges, rows, results, document


def test_pins_and_rows_are_within_the_ranges_and_the_oldest_is_their_lower_bound() -> None:
    rows = {row.name: dict(pin.split("==") for pin in row.pins) for row in read_rows()}
    rows["requirements.txt"] = dict(pin.split("==") for pin in pins_of(REPO / "requirements.txt").values())
    for name, pins in rows.items():
        assert set(pins) == set(RANGES), f"{name} pins other packages than pyproject.toml names"
        for package, version in pins.items():
            assert RANGES[package].specifier.contains(version), f"{name}: {package} {version}"
    for package, version in rows["oldest"].items():
        lower = next(bound.version for bound in RANGES[package].specifier if bound.operator == ">=")
        assert Version(version) == Version(lower), package
    pythons = {row.python for row in read_rows()}
    assert all(SpecifierSet(PROJECT["requires-python"]).contains(python) for python in pythons)
    assert pythons == {"3.11", "3.12", "3.13"}


def test_results_are_of_the_rows_and_the_document_has_their_table() -> None:
    results, rows = read_results(), {row.name: row for row in read_rows()}
    assert [done["name"] for done in results] == list(rows)
    for done in results:
        assert done["python"].startswith(rows[done["name"]].python)
        pins = {name_of(pin): pin.partition("==")[2] for pin in rows[done["name"]].pins}
        assert "not_run" in done or {n: Version(v).public for n, v in done["packages"].items()} == pins
    assert table(results) in (REPO / "docs" / "versions.md").read_text(encoding="utf-8"), (
        "python -m tests.versions --table"
    )


def test_counts_of_a_report() -> None:
    report = (
        '<testsuites><testsuite tests="4"><testcase classname="a.b" name="t1"/>'
        '<testcase classname="a.b" name="t2"><failure message="x"/></testcase>'
        '<testcase classname="a.b" name="t3"><error message="x"/></testcase>'
        '<testcase classname="a.b" name="t4"><skipped message="x"/></testcase></testsuite></testsuites>'
    )
    assert counts(report) == {"passed": 1, "failed": ["a.b.t2", "a.b.t3"], "skipped": 1}


def test_results_of_parts_are_kept_while_the_versions_are_the_same() -> None:
    stored, not_run = (
        result("1.0", exit_code=0),
        {"name": "x", "python": "3.99", "packages": {}, "parts": {}, "not_run": "y"},
    )
    other_part = {**stored, "parts": {"dist": {"exit_code": 1}}}
    assert merged(stored, other_part)["parts"] == {"unit": {"exit_code": 0}, "dist": {"exit_code": 1}}
    assert merged(result("2.0", exit_code=0), other_part) == other_part
    assert merged(stored, not_run) == stored, "a machine without this Python does not remove another's result"
    assert merged(None, not_run) == not_run
    assert "not run: y" in table([not_run])


def test_a_row_without_its_python_is_not_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.versions.environments.ENVIRONMENTS", tmp_path)
    with pytest.raises(NotBuiltError, match=r"no Python 3\.99 on this machine"):
        build(Row("row", "3.99", ()))
    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / "python3.99").symlink_to("/bin/false")  # such as a pyenv shim without that version
    with pytest.raises(NotBuiltError):
        find_python("3.99")
