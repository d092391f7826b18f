from __future__ import annotations

import json
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_gpuorch.telemetry import EVENT_SCHEMA, EventLog, FailureTally, check_event, emit, read_events, use_events
from lightning_gpuorch.telemetry.events.json_lines import encode_line, read_lines


def test_events_of_all_sources_are_merged_by_time(tmp_path: Path) -> None:
    now = iter([10.0, 12.0, 14.0])
    later = iter([11.0, 13.0])
    with (
        EventLog(tmp_path, "supervisor", clock=lambda: next(now)) as supervisor,
        EventLog(
            tmp_path, "rank-00001.attempt-0", common={"rank": 1, "generation": 0}, clock=lambda: next(later)
        ) as rank,
    ):
        supervisor.record("run", world_size=2, tensor_parallel_size=1)
        rank.record("start", rank=1)
        supervisor.record("restart", replica=1, reason="killed")
        rank.record("chunk", loader=0, chunk=3, samples=64)
        supervisor.record("end", exit_code=0)
    events, unreadable = read_events(tmp_path)
    assert unreadable == 0
    assert [(e["ts"], e["kind"], e["source"]) for e in events] == [
        (10.0, "run", "supervisor"),
        (11.0, "start", "rank-00001.attempt-0"),
        (12.0, "restart", "supervisor"),
        (13.0, "chunk", "rank-00001.attempt-0"),
        (14.0, "end", "supervisor"),
    ]
    assert events[3]["rank"] == 1
    assert [line for event in events for line in check_event(event)] == []


def test_an_urgent_event_is_on_disk_long_before_the_flush_interval(tmp_path: Path) -> None:
    log = EventLog(tmp_path, "rank", flush_interval_seconds=3600)
    log.record("steps", steps=1, samples=2, busy_seconds=0.5, begin=1.0)
    log.record("oom", batch_size=64)
    deadline = time.monotonic() + 10
    while not log.path.exists() or log.path.read_bytes().count(b"\n") < 2:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    log.close()


def test_a_torn_last_line_is_counted_and_a_later_process_of_the_same_name_appends_whole_lines(tmp_path: Path) -> None:
    with EventLog(tmp_path, "supervisor") as log:
        log.record("end", exit_code=0)
    with open(log.path, "ab") as file:
        file.write(b'{"ts": 1.0, "kind": "res')
    assert read_events(tmp_path)[1] == 1
    with EventLog(tmp_path, "supervisor") as log:
        log.record("retire", replica=0, reason="x")
    events, unreadable = read_events(tmp_path)
    assert ([e["kind"] for e in events], unreadable) == (["end", "retire"], 1)


@given(st.binary(max_size=200), st.integers(0, 400))
def test_a_file_cut_or_overwritten_anywhere_is_read_as_far_as_possible(garbage: bytes, cut: int) -> None:
    path = Path(os.environ.get("TMPDIR", "/tmp")) / f"gpuorch-lines-{os.getpid()}"
    lines = [encode_line({"ts": float(i), "kind": "drain", "seq": i}) for i in range(4)]
    data = b"".join(lines)
    try:
        path.write_bytes(data[:cut] + garbage + b"\n" + data)
        records, unreadable = read_lines(path)
        assert records[-4:] == [json.loads(line) for line in lines]
        assert len(records) + unreadable <= (data[:cut] + garbage + b"\n" + data).count(b"\n")
    finally:
        path.unlink()


awkward_text = st.text(st.sampled_from('ab\u00e9\n\r\x00"\\\u2028\ud800\U0001f600'), max_size=8)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | awkward_text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(awkward_text, inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(awkward_text, json_values, max_size=4))
def test_every_record_is_one_line_of_strict_json(fields: dict[str, Any]) -> None:
    line = encode_line(fields)
    assert line.endswith(b"\n")
    assert line.count(b"\n") == 1

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    assert json.loads(line, parse_constant=refuse).keys() == fields.keys()


def test_recording_costs_under_five_microseconds(tmp_path: Path) -> None:
    with EventLog(tmp_path, "rank", flush_interval_seconds=3600) as log:
        best = float("inf")
        for _ in range(8):
            began = time.perf_counter()
            for i in range(1000):
                log.record("steps", steps=i, samples=32, busy_seconds=0.01, begin=0.0)
            best = min(best, (time.perf_counter() - began) / 1000)
        assert best < 5e-6


def test_a_disk_that_fails_for_a_while_loses_nothing(tmp_path: Path, tally: FailureTally) -> None:
    blocked = tmp_path / "events"
    blocked.write_text("a file where the directory should be")
    log = EventLog(blocked, "rank", failures=tally, flush_interval_seconds=3600)
    log.record("chunk", loader=0, chunk=1)
    log.flush()
    log.flush()
    assert tally.counts() == {"events": 2}
    blocked.unlink()
    log.record("chunk", loader=0, chunk=2)
    log.close()
    assert [e["chunk"] for e in read_events(blocked)[0]] == [1, 2]


def test_memory_stays_bounded_when_the_disk_never_returns(tmp_path: Path, tally: FailureTally) -> None:
    (tmp_path / "file").write_text("")
    log = EventLog(tmp_path / "file", "rank", failures=tally, flush_interval_seconds=3600)
    for _ in range(3):
        for i in range(12_000):
            log.record("chunk", loader=0, chunk=i)
        log.flush()
    assert len(log._unwritten) < 10_000 * 200
    assert tally.count("events") > 6_000
    log.close()


def test_a_value_that_cannot_be_written_costs_its_fields_not_the_event(tmp_path: Path, tally: FailureTally) -> None:
    class Hostile:
        def __str__(self) -> str:
            raise RuntimeError("no text")

    with EventLog(tmp_path, "rank", failures=tally) as log:
        log.record("drain", reason=Hostile())
        log.record("drain", reason="SIGTERM")
    assert [e.get("reason") for e in read_events(tmp_path)[0]] == [None, "SIGTERM"]
    assert tally.count("events") == 1


def test_every_nth_failing_call_leaves_the_recorder_untouched(
    tmp_path: Path, tally: FailureTally, failing_system: Any
) -> None:
    failing_system.thread = threading.current_thread()
    n = 0
    while True:
        n += 1
        failing_system.calls = failing_system.failed = 0
        counted = tally.count("events")
        failing_system.fail_at = n
        log = EventLog(tmp_path / str(n) / "events", "rank", failures=tally, flush_interval_seconds=3600)
        for chunk in range(3):
            log.record("chunk", loader=0, chunk=chunk)
            log.flush()
        log.close()
        failing_system.fail_at = 0
        assert tally.count("events") - counted == failing_system.failed
        events = read_events(tmp_path / str(n) / "events")[0] if log.path.exists() else []
        chunks = [e["chunk"] for e in events]
        if not failing_system.failed:
            assert chunks == [0, 1, 2]
            break
        # Only a failure of the very last write can cost an event: there is nobody left to try again.
        assert chunks in ([0, 1, 2], [0, 1])
    assert n > 5


def test_emit_without_a_log_does_nothing_and_with_one_records(tmp_path: Path) -> None:
    emit("drain", reason="nobody listens")
    with EventLog(tmp_path, "rank") as log:
        use_events(log)
        emit("drain", reason="heard")
    assert [e["reason"] for e in read_events(tmp_path)[0]] == ["heard"]


@pytest.mark.parametrize("source", ["", "../x", ".hidden", "a/b", "a b"])
def test_a_source_must_be_a_plain_file_name(tmp_path: Path, source: str) -> None:
    with pytest.raises(ValueError, match="plain file name"):
        EventLog(tmp_path, source)


def test_the_schema_explains_every_kind_and_field() -> None:
    for name, kind in EVENT_SCHEMA.items():
        assert kind.meaning.endswith("."), name
        assert all({**kind.fields, **kind.optional}.values()), name
        assert not kind.fields.keys() & kind.optional.keys(), name
    assert check_event({"kind": "oom"}) == ["oom: field 'batch_size' is missing"]
    assert check_event({"kind": "drain", "colour": 1}) == ["drain: unknown field 'colour'"]
    assert check_event({"kind": "party"}) == ["unknown kind 'party'"]
