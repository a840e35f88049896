"""Compares Python and the installed packages with the versions that are tested and with those that are supported.

In: `pyproject.toml`, whose ranges are supported (of an installed wheel: its metadata); the pins of `requirements.txt`, of
a checkout, and the rows of `tested_versions.json` that passed, which are tested. Out: a list of `Finding`.
"""

from __future__ import annotations

import json
import platform
import tomllib
from collections import defaultdict
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.version import Version

from data_prep.command_line import DISTRIBUTION, module_command
from pipeline.doctor.machine import Finding
from pipeline.installed import ROOT

TESTED = Path(__file__).with_name("tested_versions.json")
HUB_INPUTS = "hub"  # the extra
OPTIONAL = {"datasets": "for `hf:` inputs alone"}  # package -> when it is required; all others are always required
PYTHON_OF_THE_PINS = "3.11"
REQUIRED_PARTS = {"unit", "dist"}  # directories of tests without which an environment is not tested
Tested = dict[str, set[str]]  # package, or `python` -> versions


def read_results(path: Path = TESTED) -> list[dict[str, Any]]:
    """The results of `make test-versions`, one entry per environment."""
    results: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
    return results


def passed(result: dict[str, Any]) -> bool:
    """Whether the required parts of the tests ran in this environment, and no test of any part failed."""
    return result["parts"].keys() >= REQUIRED_PARTS and not any(part["exit_code"] for part in result["parts"].values())


def tested_versions(requirements: Path, results: Path) -> Tested:
    """The pins of `requirements.txt`, and the versions of every environment that passed, as `_key` has them."""
    tested: Tested = defaultdict(set, python={PYTHON_OF_THE_PINS})
    pins = requirements.read_text(encoding="utf-8") if requirements.is_file() else ""
    for line in pins.splitlines():
        if "==" in line:
            name, pinned = line.split("#")[0].strip().split("==")
            tested[name].add(pinned)
    for result in filter(passed, read_results(results)):
        for name, version in {"python": result["python"], **result["packages"]}.items():
            tested[name].add(_key(name, version))
    return tested


def version_findings(root: Path = ROOT, results: Path = TESTED) -> list[Finding]:
    """One finding for all tested versions, one for those that are only supported, and one per problem.

    Args:
        root: directory of `pyproject.toml` and `requirements.txt`; without them, of an installed wheel
    """
    tested = tested_versions(root / "requirements.txt", results)
    found, in_tested, only_supported = [], [], []
    for requirement in supported_versions(root / "pyproject.toml"):
        installed, known = installed_version(requirement.name), tested[requirement.name]
        shown = f"{requirement.name} {installed}"
        if installed is None or not requirement.specifier.contains(installed, prereleases=True):
            found.append(problem(requirement, installed, known))
        elif _key(requirement.name, installed) in known:
            in_tested.append(shown)
        else:
            only_supported.append(f"{shown} (tested: {', '.join(sorted(known, key=Version)) or 'none'})")
    if only_supported:
        found.append(Finding("ok", "versions", f"supported, but not tested: {', '.join(only_supported)}"))
    if in_tested:
        found.append(Finding("ok", "versions", f"tested: {', '.join(in_tested)}"))
    return found


def supported_versions(project_file: Path) -> list[Requirement]:
    """The ranges of Python and of the packages, those for `hf:` inputs included."""
    if project_file.is_file():
        project = tomllib.loads(project_file.read_text(encoding="utf-8"))["project"]
        lines = [*project["dependencies"], *project["optional-dependencies"][HUB_INPUTS]]
        return [Requirement(line) for line in [f"python{project['requires-python']}", *lines]]
    wheel = metadata.distribution(DISTRIBUTION)
    ranges = [Requirement(f"python{wheel.metadata['Requires-Python']}"), *map(Requirement, wheel.requires or [])]
    return [found for found in ranges if found.marker is None or found.marker.evaluate({"extra": HUB_INPUTS})]


def installed_version(name: str) -> str | None:
    """The version of a package, or of `python`; None where it is not installed."""
    if name == "python":
        return platform.python_version()
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def problem(requirement: Requirement, installed: str | None, known: set[str]) -> Finding:
    """What is wrong with a package that is missing or outside its range. Only a missing one stops every run."""
    name = requirement.name
    newest = max(known, key=Version, default=None)
    if name == "python":
        what = f"Python {installed} is not supported ({requirement.specifier})"
        return Finding("fail", "python", what, f"make venv PYTHON=python{newest or '3.11'}")
    fix = module_command("pip", "install", f"{name}=={newest}" if newest else requirement)
    if installed is not None:
        what = f"{name} {installed} is not supported ({requirement.specifier})"
        return Finding("warn", "versions", what, fix)
    if name in OPTIONAL:
        return Finding("warn", "versions", f"{name} is not installed; it is required {OPTIONAL[name]}", fix)
    return Finding("fail", "versions", f"{name} is not installed", fix)


def _key(name: str, version: str) -> str:
    """What two versions are compared by: without the build (`+cpu`), and Python without its last number."""
    public = Version(version).public
    return public.rpartition(".")[0] if name == "python" else public
