from __future__ import annotations

import gzip
import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_gpuorch.errors import ConfigurationError
from lightning_gpuorch.telemetry import FailureTally
from lightning_gpuorch.telemetry.profiling import BoundedProfiler

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.*:UserWarning")


def compute(profiler: BoundedProfiler, steps: int) -> None:
    x = torch.ones(8, 8)
    for _ in range(steps):
        profiler.step()
        x = x @ x / 8
    profiler.close()


def operators(path: Path) -> list[str]:
    with gzip.open(path, "rt") as file:
        return [event["name"] for event in json.load(file)["traceEvents"] if event.get("cat") == "cpu_op"]


def test_some_steps_after_the_first_are_recorded_and_no_more(tmp_path: Path, tally: FailureTally) -> None:
    profiler = BoundedProfiler(tmp_path / "profiles", 3, skip_steps=4, num_steps=3, failures=tally)
    compute(profiler, 40)
    (path,) = profiler.recordings
    assert path.name == "rank-00003.profile-0.json.gz"
    assert operators(path).count("aten::matmul") == 3
    assert tally.counts() == {}


def test_a_run_that_ends_early_still_leaves_its_profile(tmp_path: Path, tally: FailureTally) -> None:
    profiler = BoundedProfiler(tmp_path, 0, skip_steps=1, num_steps=100, failures=tally)
    compute(profiler, 4)
    assert operators(profiler.recordings[0]).count("aten::matmul") == 3


def test_a_person_asks_for_one_by_signal_and_only_so_many_are_made(tmp_path: Path, tally: FailureTally) -> None:
    before = signal.getsignal(signal.SIGUSR2)
    profiler = BoundedProfiler(tmp_path, 0, skip_steps=None, num_steps=1, max_recordings=2, failures=tally)
    profiler.record_on_signal()
    x = torch.ones(8, 8)
    for step in range(40):
        if step % 10 == 5:
            os.kill(os.getpid(), signal.SIGUSR2)
        profiler.step()
        x = x @ x / 8
    profiler.close()
    assert [operators(path).count("aten::matmul") for path in profiler.recordings] == [1, 1]
    assert signal.getsignal(signal.SIGUSR2) == before


def test_a_signal_can_only_be_set_up_on_the_main_thread(tmp_path: Path) -> None:
    caught: list[BaseException] = []

    def attempt() -> None:
        try:
            BoundedProfiler(tmp_path, 0).record_on_signal()
        except ConfigurationError as error:
            caught.append(error)

    thread = threading.Thread(target=attempt)
    thread.start()
    thread.join(10)
    assert "main thread" in str(caught[0])


def test_a_profile_that_cannot_be_written_costs_the_run_nothing(tmp_path: Path, tally: FailureTally) -> None:
    (tmp_path / "file").write_text("in the way")
    profiler = BoundedProfiler(tmp_path / "file" / "profiles", 0, skip_steps=0, num_steps=1, failures=tally)
    compute(profiler, 5)
    assert profiler.recordings == []
    assert tally.counts() == {"profiling": 1}


def test_a_profiler_that_cannot_start_is_counted_once(
    tmp_path: Path, tally: FailureTally, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("another profiler is active")

    monkeypatch.setattr(torch.profiler, "profile", refuse)
    compute(BoundedProfiler(tmp_path, 0, skip_steps=0, failures=tally), 5)
    assert tally.counts() == {"profiling": 1}


def test_between_recordings_a_step_costs_under_a_microsecond(tmp_path: Path) -> None:
    profiler = BoundedProfiler(tmp_path, 0, skip_steps=None)
    best = float("inf")
    for _ in range(10):
        began = time.perf_counter()
        for _ in range(2000):
            profiler.step()
        best = min(best, (time.perf_counter() - began) / 2000)
    assert best < 1e-6


@pytest.mark.parametrize("options", [{"num_steps": 0}, {"skip_steps": -1}, {"max_recordings": 0}])
def test_bad_numbers_are_refused(tmp_path: Path, options: dict[str, int]) -> None:
    with pytest.raises(ConfigurationError, match="at least one step"):
        BoundedProfiler(tmp_path, 0, **options)  # type: ignore[arg-type]
