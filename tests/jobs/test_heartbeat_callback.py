"""HeartbeatMonitor with Lightning's own ddp: a hang becomes an error with a stack."""

import pytest


@pytest.mark.parametrize("kind", ["gil", "python"])
def test_a_hang_under_ddp_is_shown_and_ends_the_job(runner, kind):
    finished = runner.run("ddp_hang.py", "--kind", kind, code=None, timeout=90)
    assert finished.code != 0
    assert "rank 1 is stuck" in finished.output
    assert "in hang" in finished.output


def test_without_a_hang_nothing_happens(runner):
    finished = runner.run("ddp_hang.py", timeout=90)
    assert "stuck" not in finished.output
