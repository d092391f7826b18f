"""Dynamic batching in jobs of several processes: the results are those of the loader's own batches, whatever happens."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest

from lightning_gpuorch import read_predictions
from lightning_gpuorch.errors import EXIT_DATA_MISSING, EXIT_RESUMABLE, MissingPredictionsError
from lightning_gpuorch.predictions import PartStore
from lightning_gpuorch.predictions.storage.fragments import numbers_of
from tests.conftest import Runner, gpuorch_run

SCRIPT = "dynamic.py"
TOLERANCE = 1e-6


def steps_in(directory: Path) -> list[list[object]]:
    return [json.loads(line) for path in directory.glob("steps-*") for line in path.read_text().splitlines()]


def _wait_for_steps(runner: Runner, process: subprocess.Popen[bytes], logs: Path, count: int) -> None:
    deadline = time.monotonic() + 90
    while len(steps_in(logs)) < count:
        assert process.poll() is None, runner.log_of(process)
        assert time.monotonic() < deadline, runner.log_of(process)
        time.sleep(0.05)


def samples_kept(out: Path) -> set[int]:
    """What is computed of chunks that are not whole, as far as it is on disk."""
    kept = set()
    for path in out.glob("unfinished-*/part-*.gpq"):
        with contextlib.suppress(MissingPredictionsError):  # its window has become whole just now
            for entry in PartStore(path.parent).header(int(path.stem.removeprefix("part-"))).entries:
                kept.update(numbers_of(entry))
    return kept - samples_durable(out)


def samples_durable(out: Path, chunk: int = 16) -> set[int]:
    firsts = [chunk * int(part.stem.removeprefix("part-")) for part in (out / "dataloader_0").glob("part-*.gpq")]
    return {sample for first in firsts for sample in range(first, first + chunk)}


def _wait_for_kept(runner: Runner, process: subprocess.Popen[bytes], out: Path) -> None:
    deadline = time.monotonic() + 90
    while not samples_kept(out):
        assert process.poll() is None, runner.log_of(process)
        assert time.monotonic() < deadline, runner.log_of(process)
        time.sleep(0.05)


def test_killed_and_resumed_with_another_number_of_devices(runner: Runner, tmp_path: Path) -> None:
    logs = tmp_path / "logs"
    logs.mkdir()
    options = ("--samples", 3000, "--log", logs / "steps", "--output", tmp_path / "out", "--tokens", 64)
    process = runner.start(SCRIPT, *options, "--devices", 2, "--slow", 0.02, "--workers", 1)
    _wait_for_steps(runner, process, logs, 60)
    workers = psutil.Process(process.pid).children(recursive=True)
    os.kill(process.pid, signal.SIGKILL)
    runner.wait(process)
    assert len(workers) >= 4, "those of the loaders as well"
    alive = psutil.wait_procs(workers, timeout=2)[1]
    assert not [w for w in alive if w.status() != psutil.STATUS_ZOMBIE], "orphans after 2 s"
    before = len(read_predictions(tmp_path / "out", allow_missing=True).missing)
    assert 0 < before < 3000, "some of it is durable"
    kept = samples_kept(tmp_path / "out")
    for path in logs.iterdir():
        path.unlink()
    result = runner.run(SCRIPT, *options, "--devices", 1).result
    assert result["equal"]
    assert result["difference"] <= TOLERANCE
    again = sum(len(index) for _, index, _ in result["steps"])
    assert again == before - len(kept), "nothing durable or kept was computed again"
    sizes = {shape[0] for _, _, shape in result["steps"]}
    assert len(sizes) > 3, "batches differ in size"


@pytest.mark.parametrize(("tp", "more"), [(1, ()), (2, ("--stream",))])
def test_sigterm_keeps_all_that_was_computed_and_does_not_wait_for_the_window(
    runner: Runner, tmp_path: Path, tp: int, more: tuple[str, ...]
) -> None:
    logs = tmp_path / "logs"
    logs.mkdir()
    options = ("--samples", 3000, "--log", logs / "steps", "--output", tmp_path / "out", "--tokens", 64)
    options = (*options, "--devices", 2, "--tp", tp, "--workers", 1, *more)
    process = runner.start(SCRIPT, *options, "--slow", 0.05)
    _wait_for_kept(runner, process, tmp_path / "out")
    process.send_signal(signal.SIGTERM)
    began = time.monotonic()
    assert runner.wait(process) == EXIT_RESUMABLE
    assert time.monotonic() - began < 10, "a window takes 15 seconds"
    computed = {sample for _, index, _ in steps_in(logs) for sample in index}
    durable = samples_durable(tmp_path / "out") & set(range(3000))  # the last chunk is a short one
    assert durable | samples_kept(tmp_path / "out") == computed
    for path in logs.iterdir():
        path.unlink()
    result = runner.run(SCRIPT, *options).result
    assert result["equal"]
    assert result["difference"] <= TOLERANCE
    again = [sample for rank, index, _ in result["steps"] if tp == 1 or rank == 0 for sample in index]
    assert sorted(again) == sorted(set(range(3000)) - computed)
    assert not list((tmp_path / "out").glob("unfinished-*"))


@pytest.mark.parametrize(("tp", "more"), [(2, ()), (1, ("--stream",))])
def test_a_killed_replica_loses_no_more_than_what_it_computed_last(
    runner: Runner, tmp_path: Path, tp: int, more: tuple[str, ...]
) -> None:
    logs = tmp_path / "logs"
    logs.mkdir()
    options = ("--samples", 2000 // tp, "--log", logs / "steps", "--output", tmp_path / "out", "--tokens", 64)
    options = (*options, "--devices", 2, "--tp", tp, *more)
    result = tmp_path / "result.json"
    process = runner.start(SCRIPT, *options, "--slow", 0.05, "--result", result, launcher=gpuorch_run())
    _wait_for_kept(runner, process, tmp_path / "out")
    worker = int(next(logs.glob("steps-*")).name.removeprefix("steps-"))
    kept = samples_kept(tmp_path / "out")
    os.kill(worker, signal.SIGKILL)
    assert runner.wait(process) == 0, runner.log_of(process)
    counts = Counter(sample for rank, index, _ in steps_in(logs) if tp == 1 or rank == 0 for sample in index)
    assert set(counts) == set(range(2000 // tp))
    assert {counts[sample] for sample in kept} == {1}
    told = json.loads(result.read_text())
    assert told["equal"]
    assert told["difference"] <= TOLERANCE
    assert not list((tmp_path / "out").glob("unfinished-*"))


def test_replicas_with_different_memory_get_different_batches(runner: Runner, tmp_path: Path) -> None:
    budgets = (160_000, 400_000)
    result = runner.run(
        SCRIPT, "--samples", 1500, "--chunk-size", 8, "--log", tmp_path / "steps", "--budgets", *budgets, "--slow", 0.01
    ).result
    assert result["equal"]
    assert result["difference"] <= TOLERANCE
    largest = [max(shape[0] * shape[1] for rank, _, shape in result["steps"] if rank == number) for number in range(2)]
    assert largest[1] > 1.5 * largest[0], largest


def test_a_poison_sample_is_found_in_a_window_of_many_chunks(runner: Runner, tmp_path: Path) -> None:
    out = tmp_path / "out"
    runner.run(SCRIPT, "--output", out, "--poison", 333, "--devices", 2, code=EXIT_DATA_MISSING, timeout=170)
    predictions = read_predictions(out, allow_missing=True)
    assert list(predictions.missing) == [333]
    assert [i for batch in predictions for i in batch["index"]] == [i for i in range(600) if i != 333]


@pytest.mark.parametrize("stream", [False, True])
def test_a_tensor_parallel_group_forms_the_same_batches(runner: Runner, tmp_path: Path, stream: bool) -> None:
    options = ("--stream",) if stream else ()
    result = runner.run(SCRIPT, "--devices", 2, "--tp", 2, "--log", tmp_path / "steps", *options).result
    assert result["equal"]
    assert result["difference"] <= TOLERANCE
    by_rank = [[index for rank, index, _ in result["steps"] if rank == number] for number in range(2)]
    assert by_rank[0] == by_rank[1]
    assert len(by_rank[0]) > 5


def test_a_tensor_parallel_group_learns_from_the_rank_with_least_memory(runner: Runner, tmp_path: Path) -> None:
    largest = []
    for name, budgets in (("alike", (900_000, 900_000)), ("uneven", (900_000, 300_000))):
        options = ("--samples", 600, "--chunk-size", 8, "--devices", 2, "--tp", 2, "--log", tmp_path / name)
        run = runner.run(SCRIPT, *options, "--budgets", *budgets)
        assert run.result["equal"]
        assert run.result["difference"] <= TOLERANCE
        assert "restart" not in run.output
        steps = run.result["steps"]
        by_rank = [[index for rank, index, _ in steps if rank == number] for number in range(2)]
        assert by_rank[0] == by_rank[1]
        largest.append(max(shape[0] * shape[1] for _, _, shape in steps))
    # A token takes 512 bytes here, its row of the table with and without the mask, and the weights 32 KiB.
    assert 250 < largest[1] <= (300_000 - 32 * 2**10) / 512
    assert largest[0] > 2 * largest[1]
