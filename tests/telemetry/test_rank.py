from __future__ import annotations

import json
import logging
import time
from pathlib import Path

import pytest

from lightning_gpuorch.telemetry import (
    CONTEXT,
    FailureTally,
    RankMetrics,
    RankTelemetry,
    check_event,
    emit,
    read_events,
    use_metrics,
    write_report,
)
from tests.telemetry.steps import step_record


def test_one_object_records_all_a_rank_has_to_say(tmp_path: Path, tally: FailureTally) -> None:
    metrics = RankMetrics(3, failures=tally)
    use_metrics(metrics)
    with RankTelemetry(tmp_path, rank=3, replica=1, generation=1, start={"device": "cpu"}, failures=tally) as telemetry:
        for step in range(5):
            telemetry.begin_step(step, chunk=7)
            telemetry.observe_collective("all_reduce", 0.001)
            telemetry.observe_step(step_record(step=step))
        telemetry.observe_oom(64, 32, step=4)
        logging.getLogger("lightning_gpuorch.x").warning("seen")
        emit("drain", reason="by whoever knows")
    events, _ = read_events(tmp_path / "events")
    assert [line for event in events for line in check_event(event)] == []
    assert {(e["rank"], e["replica"], e["generation"]) for e in events} == {(3, 1, 1)}
    assert [e["kind"] for e in events if e["kind"] != "steps"] == ["start", "oom", "drain", "end"]
    assert sum(e["steps"] for e in events if e["kind"] == "steps") == 5
    assert (events[-1]["steps"], events[-1]["samples"], events[-1]["observer_failures"]) == (5, 40, {})
    (line,) = (tmp_path / "logs" / "rank-00003.attempt-1.jsonl").read_text().splitlines()
    assert (json.loads(line)["step"], json.loads(line)["chunk"]) == (4, 7)
    assert CONTEXT == {}
    assert metrics.oom_events._value.get() == 1
    assert (metrics.steps._value.get(), metrics.samples._value.get()) == (5, 40)
    assert metrics.step_seconds._sum.get() == pytest.approx(0.5)
    assert sum(e["busy_seconds"] for e in events if e["kind"] == "steps") == pytest.approx(0.5)
    write_report(tmp_path, tmp_path / "report.html")


def test_an_exception_is_the_reason_of_the_end(tmp_path: Path, tally: FailureTally) -> None:
    with pytest.raises(ValueError, match="boom"), RankTelemetry(tmp_path, rank=0, replica=0, failures=tally):
        raise ValueError("boom")
    assert read_events(tmp_path / "events")[0][-1]["reason"] == "ValueError: boom"


def test_without_a_directory_nothing_is_recorded_and_nothing_fails(tally: FailureTally) -> None:
    with RankTelemetry(None, rank=0, replica=0, failures=tally) as telemetry:
        telemetry.begin_step(0)
        telemetry.observe_collective("all_reduce", 0.1)
        telemetry.observe_oom(4)
        telemetry.observe_step(step_record(4))
    assert telemetry.events is None
    assert tally.counts() == {}


def test_a_directory_that_cannot_be_written_costs_the_run_nothing(tmp_path: Path, tally: FailureTally) -> None:
    (tmp_path / "file").write_text("")
    with RankTelemetry(tmp_path / "file", rank=0, replica=0, failures=tally) as telemetry:
        telemetry.begin_step(0)
        telemetry.observe_step(step_record(4))
    assert tally.count("events") >= 1


def test_a_step_costs_under_five_microseconds(tmp_path: Path, tally: FailureTally) -> None:
    with RankTelemetry(tmp_path, rank=0, replica=0, failures=tally) as telemetry:
        best = float("inf")
        for _ in range(20):
            began = time.perf_counter()
            for step in range(500):
                telemetry.begin_step(step, chunk=1)
                telemetry.observe_step(step_record(step=step))
            best = min(best, (time.perf_counter() - began) / 500)
    print(f"RankTelemetry: {best * 1e6:.2f} us per step")
    assert best < 5e-6
