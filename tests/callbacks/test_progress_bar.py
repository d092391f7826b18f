"""The lines that tell of a job's progress where there is no terminal."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest

from lightning_gpuorch.callbacks import JobProgressBar, progress_bar


class Clock:
    """Time passes only while somebody waits; the last wait is told to stop."""

    def __init__(self, waits: int):
        self.now, self.waits = 100.0, waits

    def monotonic(self) -> float:
        return self.now

    def wait(self, seconds: float) -> bool:
        self.now += seconds
        self.waits -= 1
        return self.waits < 0


def test_the_time_left_follows_the_rate_of_this_run(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    clock = Clock(waits=3)
    began = clock.now

    def progress() -> dict[str, Any]:
        """One run has left 40 of 200 chunks to this one, which makes two a second."""
        computed = 40 + int(2 * (clock.now - began))
        return {"chunks": 200, "chunks_done": 0, "chunks_computed": computed, "restarts": 0}

    monkeypatch.setattr(progress_bar, "time", clock)
    bar: Any = JobProgressBar(log_seconds=10.0)
    bar._stop = clock
    with caplog.at_level(logging.INFO, progress_bar.__name__):
        bar._show_lines(SimpleNamespace(job=SimpleNamespace(progress=progress)))
    assert caplog.messages == [
        "60 of 200 chunks after 10 s",
        "80 of 200 chunks after 20 s, about 60 s left",
        "100 of 200 chunks after 30 s, about 50 s left",
    ]
