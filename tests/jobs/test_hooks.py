"""Deaths in the callbacks of a batch, in real processes: no file of a prediction writer is lost, none overwrites another."""

import collections
import json
import os
import signal
import time

import pytest

from lightning_gpuorch import read_predictions
from tests.conftest import gpuorch_run

JOB = "writer_job.py"
SAMPLES = 46


def _files(tmp_path):
    return {int(path.stem): json.loads(path.read_text()) for path in tmp_path.glob("files/*.json")}


def _assert_each_file_holds_its_batch(files):
    for content in files.values():
        assert content["rows"] == [20.0 * index for index in content["indices"]]


def _assert_whole(finished):
    assert finished.result == {"values": [20.0 * index for index in range(SAMPLES)], "keys": ["y"]}


@pytest.mark.parametrize(
    "harm",
    [
        ("--die-at", 45),
        ("--die-at", 10, "--die-by", "exception"),
        ("--die-at", 21, "--tp", 2),
        # The leader is done with the batch, and has nothing to do but to make it durable.
        ("--die-at", 45, "--tp", 2, "--victim", 1, "--wait", 1),
    ],
    ids=["killed-at-the-last-batch", "raises-once", "killed-in-a-group", "killed-beside-its-leader-at-the-last-batch"],
)
def test_a_writer_that_dies_once_has_written_every_batch_in_the_end(runner, tmp_path, harm):
    finished = runner.run(JOB, "--output", "out", *harm, timeout=120, launcher=gpuorch_run())
    assert finished.output.count("restarting replica") == 1
    _assert_whole(finished)
    files = _files(tmp_path)
    assert {number: content["indices"] for number, content in files.items()} == {
        number: list(range(4 * number, min(4 * number + 4, SAMPLES))) for number in range(12)
    }
    _assert_each_file_holds_its_batch(files)


@pytest.mark.parametrize("hook", ["start", "end"])
def test_a_sample_whose_hook_always_dies_is_given_up_alone(runner, tmp_path, hook):
    finished = runner.run(
        JOB,
        "--output",
        "out",
        "--die-at",
        22,
        "--die-in",
        hook,
        "--every-time",
        code=65,
        timeout=170,
        launcher=gpuorch_run(),
    )
    assert "no prediction for 1 samples: 22" in finished.output
    found = read_predictions(tmp_path / "out", allow_missing=True)
    assert found.missing == [22]
    files = _files(tmp_path)
    _assert_each_file_holds_its_batch(files)
    written = collections.Counter(index for content in files.values() for index in content["indices"])
    assert written == {index: 1 for index in range(SAMPLES) if index != 22}, "pieces of a batch have files of their own"


def test_dynamic_batches_of_a_job_with_a_death_never_overwrite_each_others_files(runner, tmp_path):
    finished = runner.run(JOB, "--output", "out", "--die-at", 30, "--dynamic", timeout=120, launcher=gpuorch_run())
    assert finished.output.count("restarting replica") == 1
    _assert_whole(finished)
    files = _files(tmp_path)
    _assert_each_file_holds_its_batch(files)
    assert {index for content in files.values() for index in content["indices"]} == set(range(SAMPLES))
    notes = [line.split()[1] for line in (tmp_path / "notes.txt").read_text().splitlines()]
    assert len(files) == len(set(notes))


def test_a_drain_ends_after_the_callbacks_of_the_batch_in_hand(runner, tmp_path):
    command = (JOB, "--output", "out", "--samples", 400, "--chunk", 1, "--seconds", 0.05)
    process = runner.start(*command, launcher=gpuorch_run())
    notes = tmp_path / "notes.txt"
    deadline = time.monotonic() + 90
    while not notes.exists() or notes.read_text().count("\n") < 10:
        assert process.poll() is None, runner.log_of(process)
        assert time.monotonic() < deadline, "no progress"
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGTERM)
    assert runner.wait(process, 60) == 75
    assert runner.run(*command, launcher=gpuorch_run()).result["values"] == [20.0 * index for index in range(400)]
    counts = collections.Counter(line.split()[1] for line in notes.read_text().splitlines())
    assert counts == {str(number): 1 for number in range(100)}, "every batch was written once"
