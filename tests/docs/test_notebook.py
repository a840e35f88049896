"""The notebook: it runs with a small teacher, and the outputs in it are those of its code."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest

pytest.importorskip("nbclient", reason="pip install -r requirements-dev.txt")

from tests.conftest import REPO
from tests.docs.notebook import DIGEST, NOTEBOOK, SETTINGS, code_cells, digest_of, execute, read, text_of

MOST_BYTES = 300_000
PNG = b"\x89PNG\r\n\x1a\n"
AGAIN = "run it again: .venv/bin/python -m tests.docs.notebook"


def pictures_of(notebook) -> list[bytes]:
    data = [output.get("data", {}) for cell in code_cells(notebook) for output in cell.outputs]
    return [base64.b64decode(one["image/png"]) for one in data if "image/png" in one]


def test_the_outputs_are_those_of_the_code() -> None:
    notebook = read()
    assert notebook.metadata.get(DIGEST) == digest_of(notebook), f"the code has changed since it was run; {AGAIN}"
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert len(pictures_of(notebook)) == 2
    assert "retrieval accuracy" in text_of(notebook)
    assert not [output for cell in cells for output in cell.outputs if output.output_type == "error"]


def test_it_can_be_read_on_a_repositorys_page() -> None:
    text = NOTEBOOK.read_text(encoding="utf-8")
    assert len(text.encode()) < MOST_BYTES
    for place in ("/tmp/", "/home/", "/root/", "/work/", str(REPO)):
        assert place not in text, f"a path of the machine that ran it; {AGAIN}"


@pytest.mark.timeout(900)
def test_it_runs(tiny_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All cells but the settings, from the directory in which a notebook server starts them.

    A CPU with instructions for fp16 skips the first steps, until the loss scale fits.
    """
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    notebook = read()
    (settings,) = (cell for cell in notebook.cells if SETTINGS in cell.metadata.get("tags", []))
    settings.source = f"""
TEACHER, TEXT, RUN = {str(tiny_teacher)!r}, "samples/cc100/de.txt.xz", {str(tmp_path)!r}
STUDENT = {{"layers": 2, "hidden": 48, "heads": 4, "ffn": 96, "init": "layers", "init_layers": None}}
RELATION_HEADS, STEPS, ROWS, TOKENS, LEARNING_RATE = 12, 20, 4, 32, 3e-3
LANGUAGES, PAIRS = ["de"], 8
"""
    execute(notebook, NOTEBOOK.parent)
    assert all(picture.startswith(PNG) for picture in pictures_of(notebook))
    assert len(pictures_of(notebook)) == 2
    last = text_of(notebook).splitlines()[-6:]
    assert [float(line.split()[number]) for number, line in enumerate(last)] == [1.0] * 6, "each sentence and itself"
    points = [json.loads(line) for line in (tmp_path / "training" / "metrics.jsonl").read_text().splitlines()]
    heldout = [point["heldout/mean"] for point in points if "heldout/mean" in point]
    assert heldout[-1] < heldout[0]
    assert (tmp_path / "evaluation" / "evaluation.json").is_file()
    assert digest_of(notebook) != digest_of(read()), "the digest is of the settings too"
