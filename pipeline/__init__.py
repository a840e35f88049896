"""From token shards to a student: MiniLMv2 distillation of multilingual encoders."""

import os

# Set before torch loads OpenMP: idle threads sleep instead of spinning. On a shared machine, spinning threads take the cores
# of those that compute (two cores, two runs: 3 to 4 times slower; docs/log.md).
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
