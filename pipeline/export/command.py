"""Export the newest whole checkpoint of a run as a Hugging Face directory.

python -m pipeline export runs/quickstart --output runs/quickstart/student
"""

from __future__ import annotations

import argparse
from pathlib import Path

from pipeline.export.hf import export_run


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="what --run-dir of the training named")
    parser.add_argument("--output", type=Path, required=True, help="directory to write; an earlier export is replaced")


def run(arguments: argparse.Namespace) -> None:
    student = export_run(arguments.run_dir, arguments.output)
    size_mb = (student / "model.safetensors").stat().st_size / 1e6
    print(f"exported: {student} ({size_mb:.0f} MB). Load it with AutoModel.from_pretrained({str(student)!r})")
