"""Shards to student: MiniLMv2 distillation of multilingual encoders."""

import os

# Before torch loads OpenMP: idle threads sleep instead of spinning. On a machine that others use too, spinning threads
# take the cores from the ones that compute (two cores, two runs: 3 to 4 times slower; docs/log.md).
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
