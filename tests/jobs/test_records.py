"""What a job leaves beside its predictions: events, logs, profiles, traces and the report, in every way of running."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from lightning_gpuorch.telemetry import check_event, read_events
from tests.conftest import Runner


def records_of(output: Path) -> Path:
    (records,) = (output / "runs").iterdir()
    return records


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for file in sorted(path.glob("*.jsonl")) for line in file.read_text().splitlines()]


@pytest.mark.parametrize("way", ["one process", "two replicas", "torchrun"])
def test_everything_a_rank_records_is_kept_beside_the_predictions(runner: Runner, tmp_path: Path, way: str) -> None:
    output = tmp_path / "out"
    devices = 1 if way == "one process" else 2
    launcher = (
        (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
        if way == "torchrun"
        else ()
    )
    arguments = ["--devices", devices, "--output", output, "--profiling", "--step", 0.01, "--oom", 41, "--samples", 400]
    done = runner.run("observed.py", *arguments, launcher=launcher)
    assert done.result == {"right": True}
    records = records_of(output)
    events, unreadable = read_events(records / "events")
    assert unreadable == 0
    assert [line for event in events for line in check_event(event)] == []
    ranks = set(range(devices))
    assert {e["rank"] for e in events if e["kind"] == "start"} == ranks
    ends = [e for e in events if e["kind"] == "end"]
    assert {e["rank"] for e in ends if "rank" in e} == ranks
    assert sum(e["samples"] for e in ends if "rank" in e) == 400
    (whole,) = (e for e in ends if e["source"] == "supervisor")
    assert whole.get("exit_code") == 0 if way == "two replicas" else whole["complete"] is True
    (oom,) = (e for e in events if e["kind"] == "oom" and e["batch_size"] == 4)
    assert (oom["retry_batch_size"], oom["chunk"]) == (2, 5)
    assert (records / "logs" / f"rank-{oom['rank']:05d}.attempt-0.jsonl").exists()
    noted = [line for line in lines_of(records / "logs") if line["message"].startswith("out of memory with 4")]
    assert [(len(line["trace_id"]), line["chunk"]) for line in noted] == [(32, 5)]
    assert {path.name for path in (records / "profiles").iterdir()} == {
        f"rank-{rank:05d}.profile-0.json.gz" for rank in ranks
    }
    page = (records / "report.html").read_text()
    assert "Complete: all 400 samples have their prediction." in page
    assert "out of memory with batch size 4, tried again with 2" in page


def test_a_step_that_ran_out_of_memory_is_traced_as_linked_attempts(runner: Runner, tmp_path: Path) -> None:
    pytest.importorskip("opentelemetry.sdk")
    arguments = ["--devices", 1, "--output", tmp_path / "out", "--oom", 41, "--trace", "file", "--trace-every", 1000]
    assert runner.run("observed.py", *arguments).result == {"right": True}
    spans = lines_of(records_of(tmp_path / "out") / "traces")
    attempts = {s["attributes"]["gpuorch.attempt"]: s for s in spans if s["name"] == "inference.rank" and s["events"]}
    assert sorted(attempts) == [0, 1], "4 samples, then 2, then each alone"
    assert attempts[1]["links"] == [attempts[0]["trace_id"]]
    assert [event["name"] for event in attempts[0]["events"]] == ["oom"]
    assert "out of memory with 4 samples" in attempts[0]["error"]
    first = [s for s in spans if s["attributes"].get("gpuorch.step") == 0 and s["name"] == "inference.rank"]
    names = {s["name"] for s in spans if s["parent_id"] == first[0]["span_id"]}
    assert names == {"inference.fetch", "inference.transfer", "inference.forward", "inference.write"}


def test_profiles_are_kept_where_nobody_asked_to_keep_predictions(runner: Runner, tmp_path: Path) -> None:
    assert runner.run("observed.py", "--devices", 1, "--profiling", "--samples", 160).result == {"right": True}
    (profile,) = tmp_path.glob("gpuorch/*/profiles/rank-00000.profile-0.json.gz")
    assert (profile.parents[1] / "report.html").exists()
    assert not list(tmp_path.glob("gpuorch/*/predict-*"))
