"""Going on with fewer devices, and with others: real workers, real checks, devices that exist on paper."""

import os
import signal
import time

import pytest

from lightning_gpuorch import read_predictions


def _pids(tmp_path, rank):
    path = tmp_path / "notes.txt"
    lines = [line.split() for line in path.read_text().splitlines()] if path.exists() else []
    return [int(line[1]) for line in lines if len(line) == 4 and line[0] == str(rank)]


def _kill_once_it_works(runner, process, tmp_path, rank, then_bad=None):
    """Kill a rank after its first batch; ``then_bad`` devices are bad from then on."""
    deadline = time.monotonic() + 60
    while not (working := _pids(tmp_path, rank)):
        assert process.poll() is None, runner.log_of(process)
        assert time.monotonic() < deadline, f"rank {rank} does not work"
        time.sleep(0.02)
    if then_bad is not None:
        (tmp_path / "bad.txt").write_text(then_bad)
    os.kill(working[-1], signal.SIGKILL)


def _start(runner, tmp_path, devices, spares, *arguments, **environment):
    (tmp_path / "bad.txt").touch()  # empty: all are well
    return runner.start(
        "job_with_devices.py", tmp_path / "bad.txt", devices, spares, "--output", "out", *arguments,
        environment=environment,
    )  # fmt: skip


def _assert_right(tmp_path, samples):
    values = [float(value) for batch in read_predictions(tmp_path / "out") for value in batch[:, 0]]
    assert values == [2.0 * index for index in range(samples)]


def test_a_replica_moves_to_a_spare_and_is_retired_when_there_is_none(runner, tmp_path):
    (tmp_path / "bad.txt").write_text("1")
    process = _start(runner, tmp_path, "0,1", "2", "--samples", 600)
    _kill_once_it_works(runner, process, tmp_path, 1, then_bad="1 2")
    assert runner.wait(process) == 0, runner.log_of(process)
    log = runner.log_of(process)
    assert "cuda:1 (GPU-1) of rank 1 fails its check: a matrix product is wrong" in log
    assert "rank 1 moves from cuda:1 (GPU-1) to cuda:2" in log
    assert "cuda:2 (GPU-2) of rank 1 fails its check (a matrix product is wrong) and there is no spare" in log
    assert "replica 1 is retired, 1 workers go on" in log
    _assert_right(tmp_path, 600)


def test_the_healthy_device_of_a_retired_replica_serves_another(runner, tmp_path):
    process = _start(runner, tmp_path, "0,1,2,3", "-", "--tp", "2", "--samples", 800)
    _kill_once_it_works(runner, process, tmp_path, 1, then_bad="1")
    deadline = time.monotonic() + 60
    while "cuda:0 (GPU-0) can serve other replicas now" not in runner.log_of(process):
        assert time.monotonic() < deadline, runner.log_of(process)
        time.sleep(0.02)
    _kill_once_it_works(runner, process, tmp_path, 3, then_bad="1 3")
    assert runner.wait(process) == 0, runner.log_of(process)
    assert "rank 3 moves from cuda:3 (GPU-3) to cuda:0 (GPU-0)" in runner.log_of(process)
    _assert_right(tmp_path, 800)


def test_a_job_whose_devices_are_all_bad_does_not_start(runner, tmp_path):
    (tmp_path / "bad.txt").write_text("0 1")
    process = _start(runner, tmp_path, "0,1", "-", "--samples", 40)
    assert runner.wait(process) == 1
    assert "no replica is left to go on" in runner.log_of(process)
    assert not _pids(tmp_path, 0)


@pytest.mark.parametrize(("size", "bad", "left"), [(2, "0", 1), (4, "1 3", 2)])
def test_the_last_replica_goes_on_with_fewer_devices_if_that_is_allowed(runner, tmp_path, size, bad, left):
    devices = ",".join(map(str, range(size)))
    options = ("--tp", size, "--samples", 400, *(["--no-collectives"] if left == 1 else []))
    process = _start(runner, tmp_path, devices, "-", *options, GPUORCH_ALLOW_TENSOR_PARALLEL_SHRINK="1")
    _kill_once_it_works(runner, process, tmp_path, 1, then_bad=bad)
    assert runner.wait(process) == 0, runner.log_of(process)
    assert f"going on with {left} of {size} ranks" in runner.log_of(process)
    _assert_right(tmp_path, 400)
    assert len(_pids(tmp_path, left - 1)) > 0
