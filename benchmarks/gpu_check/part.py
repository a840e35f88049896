"""One part in a process of its own: `python -m benchmarks.gpu_check.part NAME WORK [--tiny]`. `runner` starts it.

In: the name of a part. Out: its figures in WORK/NAME.jsonl. Exit code 0, also where single rows could not be measured.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from pathlib import Path

from benchmarks.gpu_check.figures import Figures, reason_of
from benchmarks.gpu_check.parts import BY_NAME
from benchmarks.gpu_check.processes import end_all_on_term
from benchmarks.gpu_check.setting import Setting


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=sorted(BY_NAME))
    parser.add_argument("work", type=Path)
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    end_all_on_term()
    part, setting = BY_NAME[options.name], Setting(options.work, options.tiny)
    figures = Figures(setting.figures(part.name))
    try:
        module = importlib.import_module(f"benchmarks.gpu_check.{part.module}")
        getattr(module, part.function)(setting, figures)
    except Exception as error:
        note, failed = reason_of(error)
        figures.add(part.title, {"note": note}, failed)
        if failed:
            raise


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # threads of the collective library can abort the interpreter's own shutdown, as in pipeline/train.py
