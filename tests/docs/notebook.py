"""Runs examples/first_student.ipynb, and writes its outputs into it.

    python -m tests.docs.notebook          run all cells as they are, and keep the outputs

In: a notebook. Out: the same with the outputs of one run, and the digest of the code that was run in its metadata.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

from tests.conftest import REPO

NOTEBOOK = REPO / "examples" / "first_student.ipynb"
SETTINGS = "parameters"  # tag of the cell that a test replaces
DIGEST = "executed_code_sha256"
TIMEOUT_S = 3600


def read() -> nbformat.NotebookNode:
    return nbformat.read(NOTEBOOK, as_version=4)


def code_cells(notebook: nbformat.NotebookNode) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def digest_of(notebook: nbformat.NotebookNode) -> str:
    """Of all code."""
    return hashlib.sha256(json.dumps([cell.source for cell in code_cells(notebook)]).encode()).hexdigest()


def execute(notebook: nbformat.NotebookNode, directory: Path) -> nbformat.NotebookNode:
    """Run all cells in place, from a directory. Raises `CellExecutionError` where one fails."""
    resources = {"metadata": {"path": str(directory)}}
    options = {"timeout": TIMEOUT_S, "record_timing": False, "coalesce_streams": True}
    NotebookClient(notebook, resources=resources, **options).execute()
    for output in (output for cell in code_cells(notebook) for output in cell.outputs if "text" in output):
        for environment in (sys.prefix, str(Path(sys.prefix).resolve())):
            output.text = output.text.replace(environment, ".venv")  # as in a checkout
    notebook.metadata = {key: notebook.metadata[key] for key in ("kernelspec", "language_info")} | {
        DIGEST: digest_of(notebook)
    }
    return notebook


def text_of(notebook: nbformat.NotebookNode) -> str:
    """All printed output."""
    return "".join(output.get("text", "") for cell in code_cells(notebook) for output in cell.outputs)


if __name__ == "__main__":
    nbformat.write(execute(read(), NOTEBOOK.parent), NOTEBOOK)
    print(f"executed: {NOTEBOOK} ({NOTEBOOK.stat().st_size / 1e3:.0f} kB)")
