"""Loss spikes and non-finite steps: which are reported, which stop the run, and what names the batch."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from pipeline.errors import DivergedRunError
from pipeline.runtime.anomalies import GuardConfig, NonFiniteStepCounter, SpikeDetector

NAN = float("nan")


def test_spikes_are_found_and_do_not_hide_the_next() -> None:
    spikes = SpikeDetector(GuardConfig(spike_window=20, spike_sigmas=6))
    ordinary = [1.0 + 0.02 * (step % 5) for step in range(30)]
    assert [spikes.z_score(loss) for loss in ordinary] == [None] * 30
    first, second = spikes.z_score(3.0), spikes.z_score(3.0)
    assert first is not None
    assert first == second
    assert spikes.z_score(float("nan")) is None
    assert spikes.z_score(1.03) is None


def test_too_many_non_finite_steps_in_a_row_stop_the_run_and_name_the_batch(tmp_path: Path) -> None:
    report = tmp_path / "bad_batch.json"
    counter = NonFiniteStepCounter(GuardConfig(max_bad_steps=3), report)
    for step, loss in enumerate([NAN, NAN, 1.0, NAN, float("inf")]):
        counter.observe(step, loss, loss != 1.0, 1.0, lambda: [])
    assert not report.exists()
    with pytest.raises(DivergedRunError, match="step 5"):
        counter.observe(5, NAN, True, 1.0, lambda: [{"language": "sw", "row": 7}])
    assert json.loads(report.read_text()) == {"step": 5, "loss": "nan", "rows": [{"language": "sw", "row": 7}]}


def test_loss_scaling_may_overflow_until_its_minimum(tmp_path: Path) -> None:
    counter = NonFiniteStepCounter(GuardConfig(max_bad_steps=2), tmp_path / "bad_batch.json")
    for step in range(16):
        counter.observe(step, 1.0, True, 2.0 ** (16 - step), lambda: [])
    counter.observe(16, 1.0, True, 1.0, lambda: [])
    with pytest.raises(DivergedRunError):
        counter.observe(17, 1.0, True, 1.0, lambda: [])


def test_a_full_disk_does_not_change_the_error(tmp_path: Path) -> None:
    with pytest.raises(DivergedRunError):
        NonFiniteStepCounter(GuardConfig(max_bad_steps=1), Path("/dev/full")).observe(0, NAN, True, 1.0, lambda: [])


def test_only_one_rank_writes_the_report(tmp_path: Path) -> None:
    report = tmp_path / "bad_batch.json"
    with pytest.raises(DivergedRunError, match=str(report)):
        NonFiniteStepCounter(GuardConfig(max_bad_steps=1), report, writes=False).observe(0, NAN, True, 1.0, lambda: [])
    assert not report.exists(), "written by a rank that should not"


def test_a_step_is_skipped_above_the_loss_from_which_it_is_reported() -> None:
    """The device compares with the limit, and the host computes the z-score later: both must decide alike."""
    spikes = SpikeDetector(GuardConfig(spike_window=20, spike_sigmas=6, spikes="skip"))
    assert spikes.skip_above is None
    for number in range(20):
        assert spikes.z_score(1.0 + 0.01 * (number % 3)) is None
    limit = spikes.skip_above
    assert limit is not None
    assert spikes.z_score(math.nextafter(limit, math.inf)) is not None
    assert spikes.z_score(limit) is None
    assert SpikeDetector(GuardConfig()).skip_above is None
