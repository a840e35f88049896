"""Engine, checkpoints, metrics: what turns the method into a run."""
