"""Containers, the workflow, the citation and the makefile agree with the requirements and with each other."""

from __future__ import annotations

import re
import tomllib

import yaml

from tests.conftest import REPO

DOCKERFILE = (REPO / "containers" / "Dockerfile").read_text(encoding="utf-8")
APPTAINER = (REPO / "containers" / "minilmv2.def").read_text(encoding="utf-8")
PROJECT = tomllib.loads((REPO / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def packages(text: str) -> set[str]:
    (listed,) = re.findall(r"--no-install-recommends (.+)", text)
    return {word.partition("=")[0] for word in listed.rstrip("\\ ").split()}


def test_both_images_have_the_same_content() -> None:
    (image,) = re.findall(r"^ARG BASE=(\S+)$", DOCKERFILE, re.MULTILINE)
    assert "FROM ${BASE}\n" in DOCKERFILE
    assert re.findall(r"^From: (\S+)$", APPTAINER, re.MULTILINE) == [image]
    assert packages(DOCKERFILE) == packages(APPTAINER)
    for text in (DOCKERFILE, APPTAINER):
        assert "pip install --no-cache-dir -r /opt/minilmv2/requirements.txt" in text
    assert f">={image.split(':')[1].rpartition('.')[0]}," in PROJECT["requires-python"]
    assert (REPO / ".dockerignore").read_text().split() == ["*", "!requirements.txt"], "the context holds no data"


def test_the_workflow_runs_what_the_project_runs() -> None:
    workflow = yaml.safe_load((REPO / ".github" / "workflows" / "tests.yml").read_text(encoding="utf-8"))
    steps = [step.get("run") for step in workflow["jobs"]["tests"]["steps"]]
    assert ".ci/run" in steps
    tested, of_wheel = (workflow["jobs"][job]["strategy"]["matrix"]["python"] for job in ("tests", "wheel"))
    assert tested == of_wheel
    assert PROJECT["requires-python"] == f">={tested[0]},<3.{int(tested[-1].partition('.')[2]) + 1}"


def test_the_citation_is_of_this_version() -> None:
    citation = yaml.safe_load((REPO / "CITATION.cff").read_text(encoding="utf-8"))
    assert (citation["version"], citation["license"]) == (PROJECT["version"], PROJECT["license"])
    assert citation["references"][0]["identifiers"][0]["value"] == "arXiv:2012.15828"
