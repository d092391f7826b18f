from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lightning_gpuorch.telemetry.current import use_events, use_metrics
from lightning_gpuorch.telemetry.failures import FailureTally
from tests.support.nvml import FakeNVML, build_library, find_compiler


@pytest.fixture(scope="session")
def fake_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if find_compiler() is None:
        pytest.skip("no C compiler")
    return build_library(tmp_path_factory.mktemp("nvml"))


@pytest.fixture
def gpus(tmp_path: Path, fake_library: Path) -> Iterator[FakeNVML]:
    """Four healthy GPUs behind the real pynvml."""
    fake = FakeNVML(tmp_path, num_gpus=4, library=fake_library)
    fake.attach()
    yield fake
    fake.detach()


@pytest.fixture
def tally() -> FailureTally:
    return FailureTally()


@pytest.fixture(autouse=True)
def _clean_process() -> Iterator[None]:
    yield
    use_events(None)
    use_metrics(None)
    ours = [thread for thread in threading.enumerate() if thread.name.startswith("gpuorch-")]
    for thread in ours:
        thread.join(5)
    assert not [thread.name for thread in ours if thread.is_alive()]


def eventually(condition: Callable[[], Any], timeout_seconds: float = 15.0) -> Any:
    deadline = time.monotonic() + timeout_seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "did not come true in time"
        time.sleep(0.005)
    return found
