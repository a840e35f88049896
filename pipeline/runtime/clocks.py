"""One deadline for all ranks, independent of differences between their clocks.

In: `SLURM_JOB_END_TIME` (seconds since the epoch) and the wall clock of every rank at the start. Out: the seconds left, the
same on all ranks, and a warning where the clocks differ. After that each rank counts with its monotonic clock.
"""

from __future__ import annotations

import math
import os
import socket
import time
from collections.abc import Sequence

from pipeline.errors import UserError

LARGEST_DIFFERENCE_S = 120.0  # a clock that is a minute off gets no warning
ClockReport = tuple[str, float, float]  # host, seconds since the epoch, end of the job


def my_clock() -> ClockReport:
    """This rank's report for `agree`."""
    return socket.gethostname(), time.time(), job_end_s()


def job_end_s() -> float:
    """The end of the job in seconds since the epoch; infinite where there is none."""
    text = os.environ.get("SLURM_JOB_END_TIME") or "inf"
    try:
        end_s = float(text)
    except ValueError:
        end_s = math.nan
    if math.isnan(end_s):
        raise UserError(
            f"SLURM_JOB_END_TIME is {text[:40]!r}, not seconds since the epoch; correct it, or `unset SLURM_JOB_END_TIME`"
        )
    return end_s if end_s > 0 else math.inf


def agree(reports: Sequence[ClockReport]) -> tuple[float, list[str]]:
    """Agree on the time left.

    Rank 0's clock decides. By a correct clock a running job has not ended. If it has ended by rank 0's clock, the clock of
    another rank decides. If it has ended by every clock, there is no deadline: otherwise each start would stop after its
    first step and be started again, indefinitely.

    Args:
        reports: what `my_clock` returned on each rank, in rank order
    Returns:
        seconds to the end of the job (infinite: no deadline), and warnings for the console
    """
    warnings = []
    main_host, main_s, _ = reports[0]
    furthest = max(reports, key=lambda report: abs(report[1] - main_s))
    if abs(difference_s := furthest[1] - main_s) > LARGEST_DIFFERENCE_S:
        warnings.append(
            f"the clock of {furthest[0]} is {abs(difference_s):.0f} s {'ahead of' if difference_s > 0 else 'behind'} that of "
            f"{main_host}, which runs rank 0. Correct them (chronyc makestep); the deadline follows rank 0's"
        )
    end_s = min(report[2] for report in reports)
    if math.isinf(end_s):
        return math.inf, warnings
    left_s = [end_s - clock_s for _, clock_s, _ in reports]
    if left_s[0] > 0:
        return left_s[0], warnings
    clocks = ", ".join(
        sorted({f"{host}: {time.strftime('%F %T', time.gmtime(at_s))} UTC" for host, at_s, _ in reports})
    )
    if max(left_s) > 0:
        warnings.append(f"by rank 0's clock the job has ended already; another rank's is used instead ({clocks})")
        return max(left_s), warnings
    warnings.append(
        f"SLURM_JOB_END_TIME ({time.strftime('%F %T', time.gmtime(end_s))} UTC) is in the past by every clock ({clocks}): "
        "this start has no deadline. Signals and a STOP file still save and stop it"
    )
    return math.inf, warnings
