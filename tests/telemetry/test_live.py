from __future__ import annotations

import io
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from lightning_gpuorch.telemetry import EventLog, read_events
from lightning_gpuorch.telemetry.events.json_lines import encode_line
from lightning_gpuorch.telemetry.report.live import EventTail, LiveView, snapshot, watch
from tests.telemetry.synthetic_run import BEGIN, write_run


def shown(renderable: Any) -> str:
    console = Console(file=io.StringIO(), width=130)
    console.print(renderable)
    return console.file.getvalue()  # type: ignore[attr-defined,no-any-return]


@pytest.fixture(scope="module")
def events(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    run = write_run(tmp_path_factory.mktemp("run") / "run", num_ranks=8)
    return read_events(run / "events")[0]


def test_it_shows_the_job_at_a_glance(events: list[dict[str, Any]]) -> None:
    text = shown(snapshot(events, BEGIN + 150))
    lines = text.splitlines()
    assert lines[0] == "gpuorch run embed_text.py --devices 4"
    assert "of 516,000 samples, 2," in lines[1]  # three replicas of 800 per second; the fourth is retired
    assert "6 of 8 ranks at work" in text
    assert "2 out of memory, 1 steps repeated, 1 restarts, 1 retired" in " ".join(text.split())
    by_rank = {line.split()[0]: line for line in lines if line.strip() and line.split()[0].isdigit()}
    assert by_rank["7"].rstrip().endswith("retired")
    assert "device degraded" in by_rank["3"]
    assert "/79 GiB" in by_rank["0"]
    assert "out of memory with batch size 64, tried again with 32" in text
    assert "2:15  replica 3  retired: xid_79: GPU has fallen off the bus" in text


def test_a_rank_that_says_nothing_is_shown_as_silent(events: list[dict[str, Any]]) -> None:
    # Replica 1 is killed after 72 seconds and back after 85.
    text = shown(snapshot([e for e in events if e.get("replica") != 1 or e["ts"] < BEGIN + 72], BEGIN + 100))
    (line,) = [line for line in text.splitlines() if line.split()[:2] == ["2", "1"]]
    assert "silent for" in line
    assert line.split()[3] == "0"  # and its rate is not what it was


def test_nothing_yet_is_said() -> None:
    assert "waiting for the first rank" in shown(LiveView().render())


def test_the_end_is_shown(events: list[dict[str, Any]]) -> None:
    assert "ended with exit code 65" in shown(snapshot(events, BEGIN + 1000))


@given(st.lists(st.integers(1, 120), max_size=12))
def test_a_tail_gives_every_event_once_however_the_file_grows(cuts: list[int]) -> None:
    import tempfile

    data = b"".join(encode_line({"ts": float(i), "kind": "drain", "seq": i}) for i in range(12))
    with tempfile.TemporaryDirectory() as directory:
        tail, seen, at = EventTail(directory), [], 0
        with open(Path(directory) / "rank.jsonl", "ab", buffering=0) as file:
            for cut in [*cuts, len(data)]:
                file.write(data[at : at + cut])
                at += cut
                seen += tail.poll()
        assert [event["seq"] for event in seen] == list(range(12))
        assert tail.poll() == []


def test_a_directory_that_is_not_there_yet_has_no_events(tmp_path: Path) -> None:
    assert EventTail(tmp_path / "events").poll() == []


def test_watching_ends_with_the_run_and_returns_its_code(tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), width=120)
    codes: list[int | None] = []
    watching = threading.Thread(
        target=lambda: codes.append(watch(tmp_path, console, refresh_seconds=0.01)), name="watching", daemon=True
    )
    watching.start()
    with EventLog(tmp_path / "events", "supervisor") as log:
        log.record("run", world_size=1, tensor_parallel_size=1)
        log.record("end", exit_code=75)
    watching.join(20)
    assert codes == [75]


def test_watching_can_be_ended(tmp_path: Path) -> None:
    assert watch(tmp_path, Console(file=io.StringIO()), refresh_seconds=0.01, is_over=lambda: True) is None


def test_what_an_earlier_run_has_done_counts_and_several_calls_add_up() -> None:
    layout = {"unit": "sample", "num_units": 1000, "chunk_size": 100, "batch_size": 10}
    view = LiveView()
    view.add([
        {"ts": 1.0, "kind": "run", "world_size": 1, "tensor_parallel_size": 1},
        {"ts": 2.0, "kind": "job", "job": 0, "loaders": [layout], "resumed_chunks": 4},
        {"ts": 2.5, "kind": "job", "job": 1, "loaders": [layout], "resumed_chunks": 0},
        {"ts": 3.0, "kind": "start", "rank": 0, "generation": 0},
        {"ts": 4.0, "kind": "steps", "rank": 0, "steps": 10, "samples": 100, "busy_seconds": 1.0, "begin": 3.0},
    ])  # fmt: skip
    text = " ".join(shown(view.render(4.0)).split())
    assert "500 of 2,000 samples, 100/s, about 400 of them from an earlier run, about 15 s left" in text
