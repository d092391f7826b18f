"""The exit code of a job, from those of its ranks."""

from __future__ import annotations

import pytest

from lightning_gpuorch.control.coordinator import Coordinator
from lightning_gpuorch.supervisor.outcome import decide_outcome


@pytest.mark.parametrize(
    ("codes", "stopped", "exit_code"),
    [
        ([0, 0], False, 0),
        ([0, 0], True, 0),
        ([75, 75], True, 75),
        ([0, 75], True, 75),
        ([0, 1], False, 1),
        ([65, 65], False, 65),
        # The others were asked to stop because of what the one reports.
        ([74, 75], True, 74),
        ([75, 78], True, 78),
        ([74, 78, 75], True, 78),
        ([0, 74], False, 74),
    ],
)
def test_what_a_rank_reports_outlives_the_drain_that_follows(codes: list[int], stopped: bool, exit_code: int) -> None:
    outcome = decide_outcome(Coordinator(len(codes)), codes, stopped)
    assert outcome.exit_code == exit_code
    assert outcome.by_failure == (exit_code not in (0, 75))
