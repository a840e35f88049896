"""A port where the ranks of a test may meet.

Below the kernel's own range (32768 and up): between the look and the launcher's bind nobody is handed it by chance. Also
clear of the ports that a run under Slurm computes (15000 and up).
"""

from __future__ import annotations

import random
import socket

PORTS = range(10_000, 15_000)


def free_port() -> int:
    draw = random.SystemRandom()  # parallel tests must not draw the same port, whatever seed they set
    while True:
        with socket.socket() as probe:
            port = draw.choice(PORTS)
            try:
                probe.bind(("", port))
            except OSError:
                continue
            return port
