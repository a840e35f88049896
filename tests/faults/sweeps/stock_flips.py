"""Rank program: save with DeepSpeed, flip one bit in a copy, load. Counts the loads that succeed silently.

stock_flips.py CHECKPOINTS NUMBER REPORT.json
"""

from __future__ import annotations

import json
import random
import shutil
import sys
from pathlib import Path

from pipeline.runtime import dist
from tests.dist.engine_worker import batch, make_engine


def main(directory: Path, number: int, report: Path) -> None:
    launch = dist.read_launch()
    dist.init_process_group(launch, 120)
    engine = make_engine({"stage": 2, "precision": "fp32"}, launch.world_size)
    for step in range(3):
        engine.backward(engine(*batch(step, launch)))
        engine.step(1e-2)
    engine.deepspeed_engine.save_checkpoint(str(directory / "good"), tag="step3")
    choice, silent, problems = random.Random(3), 0, []
    for _ in range(number):
        copy = directory / "flipped"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(directory / "good", copy)
        _flip_one_bit(copy / "step3", choice)
        try:
            path, _ = engine.deepspeed_engine.load_checkpoint(str(copy))
            silent += path is not None
        except Exception as error:
            problems.append(f"{type(error).__name__}: {str(error)[:100]}")
    report.write_text(json.dumps({"silent": silent, "problems": problems}))
    dist.shut_down()


def _flip_one_bit(directory: Path, choice: random.Random) -> None:
    """In a random byte of all files: large files are hit more often."""
    files = sorted(directory.iterdir())
    (victim,) = choice.choices(files, [file.stat().st_size for file in files])
    content = bytearray(victim.read_bytes())
    content[choice.randrange(len(content))] ^= 1 << choice.randrange(8)
    victim.write_bytes(content)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
