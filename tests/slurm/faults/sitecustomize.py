"""Put on PYTHONPATH by the Slurm tests: makes the real trainer slow, or wrong on one rank, without changing its code.

SLOW_STEP_S seconds pass before every step of the job's first SLOW_ATTEMPTS attempts; rank BUG_RANK raises at step BUG_STEP.
In the job's first attempt, rank LATE_RANK joins the other ranks LATE_S seconds late.
"""

import importlib.util
import os
import sys
import time
from importlib.abc import MetaPathFinder


def alter(stepper):
    train_step = stepper.train_step
    is_slow = int(os.environ.get("SLURM_RESTART_COUNT", "0")) < int(os.environ.get("SLOW_ATTEMPTS", "1000"))
    pause_s = float(os.environ.get("SLOW_STEP_S", "0")) if is_slow else 0.0

    def altered_step(self, step, batches):
        time.sleep(pause_s)
        if os.environ.get("RANK") == os.environ.get("BUG_RANK") and step == int(os.environ["BUG_STEP"]):
            raise RuntimeError("a bug put here on purpose")
        return train_step(self, step, batches)

    stepper.train_step = altered_step


if "RANK" in os.environ and os.environ["RANK"] == os.environ.get("LATE_RANK"):
    time.sleep(float(os.environ["LATE_S"]) if os.environ.get("SLURM_RESTART_COUNT", "0") == "0" else 0.0)


class TrainerFinder(MetaPathFinder):
    """Alters pipeline.training.trainer as soon as it has been imported."""

    def find_spec(self, name, path, target=None):
        if name != "pipeline.training.trainer":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            alter(module.Stepper)

        spec.loader.exec_module = exec_module
        return spec


sys.meta_path.insert(0, TrainerFinder())
