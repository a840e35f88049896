"""The names of all files in a run directory, in one place.

In: the run directory. Out: the path of each file. The files themselves are described in docs/reliability.md.
"""

from __future__ import annotations

from pathlib import Path

from pipeline.runtime.restarts import restarts_file


class RunPaths:
    """The files of one run. `RunPaths(run_dir)` makes nothing; it only names."""

    def __init__(self, directory: Path):
        self.directory = directory
        # What the run is, written before its first step; `export` reads these four.
        self.description = directory / "run.json"  # versions, commit, ranks, data, teacher
        self.recipe = directory / "recipe.yaml"  # with the overrides of --set
        self.deepspeed = directory / "deepspeed.json"  # the effective config
        self.student_config = directory / "student_config.json"  # in Hugging Face's format
        # What the run leaves.
        self.checkpoints = directory / "checkpoints"  # step-N/, see runtime/checkpoint.py
        self.metrics = directory / "metrics.jsonl"  # one JSON object per logged step
        self.tensorboard = directory / "tensorboard"
        self.logs = directory / "logs"
        self.spikes = directory / "spikes.jsonl"  # losses far above the ones before them, with their rows
        self.bad_batch = directory / "bad_batch.json"  # rows of the non-finite step that ended the run
        # Markers: STOP comes from the user, the others say how the last start ended. FAILED comes from slurm/.
        self.stop = directory / "STOP"
        self.done = directory / "DONE"
        self.preempted = directory / "PREEMPTED"
        self.failed = directory / "FAILED"

    @property
    def restarts(self) -> Path:
        """One entry per start: `restarts.json`, or `lives.json` in a run that an earlier version began."""
        return restarts_file(self.directory)

    @property
    def needed_by_export(self) -> tuple[Path, ...]:
        """The files that describe the run."""
        return self.description, self.recipe, self.deepspeed, self.student_config

    @property
    def end_markers(self) -> tuple[Path, ...]:
        """At most one of them exists, once a start has ended."""
        return self.done, self.preempted, self.failed

    def log(self, rank: int) -> Path:
        """Everything that this rank printed, over all starts."""
        return self.logs / f"rank{rank}.log"

    def stacks(self, rank: int, is_dry_run: bool = False) -> Path:
        """The stacks of this rank's threads, where it hung. A dry run leaves those of earlier starts alone."""
        return self.logs / f"{'dry-run-' if is_dry_run else ''}stacks-rank{rank}.txt"
