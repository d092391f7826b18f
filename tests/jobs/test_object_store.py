"""Whole jobs whose predictions go to a real S3 server: the same bits as in a directory, whatever dies on the way."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lightning_gpuorch import read_predictions
from lightning_gpuorch.errors import MissingPredictionsError
from lightning_gpuorch.paths import ObjectPath, location
from lightning_gpuorch.predictions import PartStore
from lightning_gpuorch.predictions.storage.working_copy import working_copy
from lightning_gpuorch.telemetry.events.log import read_events
from lightning_gpuorch.testing.checks import compare_outputs
from tests.conftest import gpuorch_run
from tests.support.object_store import FaultyProxy, S3Server, bucket, environment_of, one_bucket, proxy, s3_server

__all__ = ["bucket", "one_bucket", "proxy", "s3_server"]

pytest.importorskip("obstore")

SLOW = "slow_predict.py"


def place(url: str, endpoint: str) -> ObjectPath:
    options = {"endpoint": endpoint, "access_key_id": "any", "secret_access_key": "any", "region": "us-east-1"}
    found = location(url, "url", options)
    assert isinstance(found, ObjectPath)
    return found


def num_parts(root: ObjectPath) -> int:
    return len(PartStore(root / "dataloader_0").done())


def wait_for_parts(root: ObjectPath, count: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 120
    while num_parts(root) < count:
        assert process.poll() is None, "it has ended too early"
        assert time.monotonic() < deadline
        time.sleep(0.05)


def computed(notes: Path) -> list[int]:
    return [int(line.split()[3]) for line in notes.read_text().splitlines()]


def records_of(runs: ObjectPath) -> list[dict[str, Any]]:
    """The events of all runs."""
    with working_copy(runs) as copy:
        return [event for run in sorted(copy.iterdir()) for event in read_events(run / "events")[0]]


def test_the_bits_are_those_of_a_directory_though_a_rank_dies_and_answers_get_lost(
    runner: Any, tmp_path: Path, bucket: str, proxy: FaultyProxy
) -> None:
    dice = random.Random(0)

    def rule(method: str, path: str) -> str | None:
        harmed = "part-" in path or method in ("GET", "HEAD")
        return dice.choice(["500", "500 after", "lost", "dead", "503"]) if harmed and dice.random() < 0.3 else None

    common = (SLOW, "--samples", 120, "--step", 0.02)
    assert runner.run(*common, "--output", "out", launcher=gpuorch_run()).result["right"]
    proxy.rule = rule
    stored = runner.run(
        *common, "--output", f"{bucket}/out", "--harm", "kill", "--victim", 1,
        launcher=gpuorch_run(), environment=environment_of(proxy.endpoint),
    )  # fmt: skip
    proxy.rule = lambda method, path: None
    assert stored.result["right"]
    assert "restarting replica 1" in stored.output
    assert len(proxy.done) > 5
    root = place(f"{bucket}/out", proxy.endpoint)
    assert compare_outputs(tmp_path / "out", root) == []
    assert f"the report of this run is {root}/runs/" in stored.output


def test_a_killed_supervisor_costs_what_was_not_durable(
    runner: Any, tmp_path: Path, bucket: str, s3_server: S3Server
) -> None:
    root = place(f"{bucket}/out", s3_server.endpoint)
    command = (SLOW, "--output", str(root), "--samples", 200, "--step", 0.05)
    environment = environment_of(s3_server.endpoint)
    process = runner.start(*command, launcher=gpuorch_run(), environment=environment)
    wait_for_parts(root, 5, process)
    os.kill(process.pid, signal.SIGKILL)
    process.wait(30)
    with pytest.raises(MissingPredictionsError):
        read_predictions(root)
    time.sleep(2)  # workers are gone by then, as docs/guarantees.md says
    before, durable = len(computed(tmp_path / "notes.txt")), num_parts(root)
    finished = runner.run(*command, launcher=gpuorch_run(), environment=environment)
    assert finished.result["right"]
    assert "chunks are already there" in finished.output
    assert len(computed(tmp_path / "notes.txt")) - before == 50 - 2 * durable, "what was durable is not computed again"


@pytest.fixture
def server_of_its_own() -> Iterator[S3Server]:
    """A server that may be killed."""
    directory = Path(tempfile.mkdtemp(prefix="s3-"))
    server = S3Server(directory)
    yield server
    server.kill()
    shutil.rmtree(directory, ignore_errors=True)


def test_a_server_that_dies_and_comes_back_is_waited_for(runner: Any, server_of_its_own: S3Server) -> None:
    server = server_of_its_own
    root = place(f"{server.make_bucket('bucket')}/out", server.endpoint)
    process = runner.start(
        SLOW, "--output", str(root), "--samples", 160, "--step", 0.1, "--result", "result.json",
        launcher=gpuorch_run(), environment=environment_of(server.endpoint),
    )  # fmt: skip
    wait_for_parts(root, 4, process)
    server.kill()
    time.sleep(3)
    assert process.poll() is None
    server.start()
    assert runner.wait(process, 120) == 0
    assert "restarting replica" not in runner.log_of(process)
    assert [float(v) for batch in read_predictions(root) for v in batch[:, 0]] == [2.0 * i for i in range(160)]


def test_of_two_jobs_on_one_prefix_each_part_has_one_winner(
    runner: Any, tmp_path: Path, bucket: str, s3_server: S3Server
) -> None:
    root = place(f"{bucket}/out", s3_server.endpoint)
    processes = [
        runner.start(
            SLOW, "--output", str(root), "--samples", 80, "--step", 0.05, "--devices", 1, "--notes", f"notes-{n}.txt",
            environment=environment_of(s3_server.endpoint),
        )
        for n in range(2)
    ]  # fmt: skip
    assert [runner.wait(process, 120) for process in processes] == [0, 0]
    assert [float(v) for batch in read_predictions(root) for v in batch[:, 0]] == [2.0 * i for i in range(80)]
    won = sorted(event["chunk"] for event in records_of(root / "runs") if event["kind"] == "chunk" and event["won"])
    assert won == list(range(10)), "both have computed, and one has won each"


def test_memory_is_refused_by_name_where_there_are_several_processes(runner: Any) -> None:
    finished = runner.run(SLOW, "--output", "memory://x/out", launcher=gpuorch_run(), code=78)
    assert "memory://x/out is the memory of one process, and this job has several" in finished.output


def test_a_missing_bucket_and_a_wrong_prefix_end_the_job_before_work(
    runner: Any, tmp_path: Path, bucket: str, s3_server: S3Server
) -> None:
    environment = environment_of(s3_server.endpoint)
    missing = runner.run(
        SLOW, "--output", "s3://there-is-none/x", launcher=gpuorch_run(), environment=environment, code=74
    )
    assert "s3://there-is-none/x: there is no such bucket" in missing.output
    assert not (tmp_path / "notes.txt").exists()
    for samples, code in ((16, 0), (24, 78)):
        ended = runner.run(
            SLOW, "--output", f"{bucket}/out", "--samples", samples, "--devices", 1, environment=environment, code=None
        )
        assert (ended.code == 0) == (code == 0)
    assert "holds the predictions of another job" in ended.output
