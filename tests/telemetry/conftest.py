from __future__ import annotations

import errno
import os
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lightning_gpuorch.telemetry.current import use_events, use_metrics
from lightning_gpuorch.telemetry.failures import FailureTally
from lightning_gpuorch.telemetry.logs import reset_logging


@pytest.fixture
def tally() -> FailureTally:
    return FailureTally()


@pytest.fixture(autouse=True)
def _clean_process() -> Iterator[None]:
    yield
    reset_logging()
    use_events(None)
    use_metrics(None)
    ours = [thread for thread in threading.enumerate() if thread.name.startswith("gpuorch-")]
    for thread in ours:
        thread.join(5)
    assert not [thread.name for thread in ours if thread.is_alive()]


class FailingSystem:
    """Makes the Nth call into the operating system fail with "no space left", counted over all functions below."""

    FUNCTIONS = (
        (os, "open"),
        (os, "write"),
        (os, "close"),
        (os, "replace"),
        (os, "mkdir"),
        (Path, "write_bytes"),
        (Path, "read_text"),
        (Path, "iterdir"),
        (socket.socket, "bind"),
    )

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.fail_at = 0
        self.calls = 0
        self.failed = 0
        self.where = ""
        self._lock = threading.Lock()
        for owner, name in self.FUNCTIONS:
            monkeypatch.setattr(owner, name, self._guard(name, getattr(owner, name)))

    def _guard(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if threading.current_thread().name.startswith("gpuorch-") or threading.current_thread() is self.thread:
                with self._lock:
                    self.calls += 1
                    fails = self.calls == self.fail_at or (self.fail_at < 0 and self.calls >= -self.fail_at)
                    self.failed += fails
                if fails:
                    self.where = name
                    if name == "close":  # a close that fails has closed
                        real(*args, **kwargs)
                    raise OSError(errno.ENOSPC, f"injected into {name}")
            return real(*args, **kwargs)

        return call

    thread: threading.Thread | None = None


@pytest.fixture
def failing_system(monkeypatch: pytest.MonkeyPatch) -> FailingSystem:
    return FailingSystem(monkeypatch)
