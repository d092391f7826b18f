from __future__ import annotations

import random
import re
import time
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_gpuorch.telemetry import EventLog, StepRecorder, check_event, read_events, summarize, write_report
from lightning_gpuorch.telemetry.report.charts import duration, nice_ticks, thin
from lightning_gpuorch.telemetry.report.report import render
from lightning_gpuorch.telemetry.report.run_summary import total_samples
from tests.support.examples import examples
from tests.telemetry.steps import step_record
from tests.telemetry.synthetic_run import write_run

VOID = {"meta"}


class Page(HTMLParser):
    """Checks that every tag is closed, and gathers what a reader sees and what a browser would load."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.loads: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loads += [str(value) for name, value in attrs if name in ("src", "href", "xlink:href", "action", "data")]
        assert not [name for name, _ in attrs if name.startswith("on")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def test_the_report_says_what_happened_and_loads_nothing(tmp_path: Path) -> None:
    target = write_report(write_run(tmp_path / "run"), tmp_path / "report.html")
    text = target.read_text(encoding="utf-8")
    page = Page(text)
    assert "script" not in page.tags
    assert page.loads == []
    assert "http" not in text
    assert "url(" not in text
    assert "prefers-color-scheme:dark" in text
    for said in (
        "Failed with exit code 65. Samples are missing.",
        "1234 to 1235",
        "the process died three times on this chunk",
        "2 out-of-memory recoveries",
        "1 restarts",
        "out of memory with batch size 64, tried again with 32",
        "device degraded: temperature: 87 degrees Celsius, slowdown at 87",
        "Stragglers: rank 1 (others wait up to",
        "4 ranks, tensor-parallel size 2",
        "1 lines of the event files could not be read",
        "Failures of observers, which the run survived: metrics 2.",
        "torch 2.13.0",
    ):
        assert said in page.text, said
    assert list(tmp_path.glob(".report*")) == []


def test_the_synthetic_run_obeys_the_event_schema(tmp_path: Path) -> None:
    events, _ = read_events(write_run(tmp_path / "run", num_ranks=8) / "events")
    assert [line for event in events for line in check_event(event)] == []


def test_the_figures_add_up(tmp_path: Path) -> None:
    events, _ = read_events(write_run(tmp_path / "run") / "events")
    summary = summarize(events)
    assert summary.samples == sum(e["samples"] for e in events if e["kind"] == "steps")
    assert summary.seconds == pytest.approx(180)
    assert sorted(summary.ranks) == [0, 1, 2, 3]
    assert [summary.ranks[r].replica for r in range(4)] == [0, 0, 1, 1]
    straggler, waiting = summary.ranks[1], summary.ranks[0]
    assert straggler.waiting_seconds == 0
    assert waiting.waiting_seconds == pytest.approx(waiting.communication_seconds - straggler.communication_seconds)
    assert summary.ranks[0].ooms == 2
    assert summary.ranks[3].verdict == "degraded"
    assert [e["seconds"] for e in summary.slowest_chunks] == sorted(
        (e["seconds"] for e in events if e["kind"] == "chunk"), reverse=True
    )[:10]
    assert (summary.lost, summary.missing, summary.exit_code) == (
        [(1234, 1236, "the process died three times on this chunk")], "1234-1235", 65,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("event", "total"),
    [
        ({"kind": "job", "num_samples": 12}, 12),
        ({"kind": "job", "loaders": [{"unit": "sample", "num_units": 7}, {"unit": "sample", "num_units": 5}]}, 12),
        ({"kind": "job", "loaders": [{"unit": "sample", "num_units": 7}, {"unit": "batch", "num_units": 5}]}, None),
        ({"kind": "job", "loaders": [{"unit": "sample", "num_units": None}]}, None),
        ({"kind": "job", "loaders": []}, None),
        ({"kind": "run"}, None),
        ({"kind": "start", "num_samples": 12}, None),
    ],
)
def test_the_size_of_a_job_is_known_or_not_guessed(event: dict[str, Any], total: int | None) -> None:
    assert total_samples(event) == total


def test_64_ranks_stay_readable_and_small(tmp_path: Path) -> None:
    target = write_report(write_run(tmp_path / "run", num_ranks=64, tensor_parallel_size=4), tmp_path / "report.html")
    page = Page(target.read_text(encoding="utf-8"))
    assert target.stat().st_size < 200_000
    assert "64 ranks in 16 replicas" in page.text
    assert "highest peak: rank 3" in page.text  # the hot one, by name, among 64
    assert page.tags.count("details") == 2  # long lists are folded


def test_an_hour_of_eight_ranks_is_drawn_in_seconds(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", num_ranks=8, seconds=3600)
    began = time.perf_counter()
    target = write_report(run, tmp_path / "report.html")
    assert time.perf_counter() - began < 20
    assert target.stat().st_size < 300_000


@pytest.mark.parametrize(
    ("end", "outcome"),
    [
        ({"exit_code": 0}, "Complete: all 9 samples have their prediction."),
        ({"exit_code": 75}, "Stopped on request; the same command goes on where this run stopped."),
        ({"exit_code": 1}, "Failed with exit code 1."),
        (None, "No end was recorded: the run is still going on, or its supervisor was killed."),
    ],
)
def test_the_outcome_is_said_first(tmp_path: Path, end: dict[str, Any] | None, outcome: str) -> None:
    with EventLog(tmp_path / "events", "supervisor") as log:
        log.record("run", world_size=1, tensor_parallel_size=1, num_samples=9)
        if end is not None:
            log.record("end", **end)
    assert outcome in Page(write_report(tmp_path, tmp_path / "r.html").read_text()).text


def test_text_of_the_run_cannot_become_markup(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>\"'&"
    with EventLog(tmp_path / "events", "supervisor") as log:
        log.record("run", world_size=1, tensor_parallel_size=1, command=evil, host=evil, versions={evil: evil})
        log.record("failure", rank=0, reason=evil)
        log.record("verdict", rank=0, verdict=evil, evidence=[evil])
        log.record("quarantine", start=1, stop=2, reason=evil)
        log.record("end", exit_code=65, missing_samples=evil, observer_failures={evil: 1})
    page = Page(write_report(tmp_path, tmp_path / "r.html").read_text())
    assert "script" not in page.tags
    assert page.text.count("<script>alert(1)</script>") >= 6


def test_a_directory_without_events_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"events holds no events"):
        write_report(tmp_path, tmp_path / "r.html")
    assert list(tmp_path.iterdir()) == []


def test_a_report_that_cannot_be_written_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    run = write_run(tmp_path / "run")
    target = tmp_path / "r.html"
    target.write_text("old")

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        write_report(run, target)
    assert target.read_text() == "old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["r.html", "run"]


@pytest.fixture(scope="module")
def all_events(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], list[dict[str, Any]]]:
    run = write_run(tmp_path_factory.mktemp("run") / "run", num_ranks=6, seconds=40)
    events = read_events(run / "events")[0]
    return lambda: events  # hypothesis prints arguments


@given(seed=st.integers(0, 2**32), keep=st.floats(0.01, 1))
@examples(40)
def test_any_part_of_a_run_makes_a_whole_page(
    all_events: Callable[[], list[dict[str, Any]]], seed: int, keep: float
) -> None:
    """Whatever was killed, whenever; and events of a version that knew fewer fields."""
    chance = random.Random(seed)
    events = [dict(event) for event in all_events() if chance.random() < keep] or all_events()[:1]
    for event in events:
        for name in list(event):
            if name not in ("ts", "kind", "source", "seq", "chunk", "exit_code") and chance.random() < 0.1:
                del event[name]
    Page(render(summarize(events)))


def test_a_recorder_counts_every_step_while_events_are_made(tmp_path: Path) -> None:
    with EventLog(tmp_path, "rank", common={"rank": 0}, flush_interval_seconds=0.005) as log:
        steps = StepRecorder(log)
        for i in range(2000):
            steps.observe_step(step_record(3, 0.001))
            steps.observe_communication(0.0004)
            if i % 500 == 0:
                time.sleep(0.02)
    events, _ = read_events(tmp_path)
    assert [line for event in events for line in check_event(event)] == []
    assert sum(e["steps"] for e in events) == 2000
    assert sum(e["samples"] for e in events) == 6000
    assert sum(e["busy_seconds"] for e in events) == pytest.approx(2.0, abs=1e-3)
    assert sum(e["comm_seconds"] for e in events) == pytest.approx(0.8, abs=1e-3)
    assert events[-1]["step"] == 1999


def test_a_rank_that_does_not_count_samples_records_none(tmp_path: Path) -> None:
    with EventLog(tmp_path, "rank") as log:
        StepRecorder(log, counts_samples=False).observe_step(step_record())
    assert [(e["steps"], e["samples"]) for e in read_events(tmp_path)[0]] == [(1, 0)]


@given(st.floats(1e-3, 1e7), st.integers(2, 12), st.booleans())
def test_ticks_are_few_and_inside(span: float, most: int, of_time: bool) -> None:
    ticks = nice_ticks(span, most, time=of_time)
    assert ticks[0] == 0
    assert len(ticks) <= most + 1
    assert all(tick <= span * (1 + 1e-6) for tick in ticks)


@given(st.lists(st.floats(-1e9, 1e9), min_size=1, max_size=3000))
@examples(25)
def test_thinning_keeps_the_peaks(values: list[float]) -> None:
    points = [(float(i), value) for i, value in enumerate(values)]
    kept = thin(points)
    assert len(kept) <= max(300, 0)
    assert {max(values), min(values)} <= {value for _, value in kept}
    assert kept == sorted(kept)


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.25, "0.25 s"), (12, "12 s"), (150, "2.5 min"), (3600, "60 min"), (7500, "2 h 5 min")]
)
def test_durations_are_written_for_people(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_the_page_holds_no_unknown_style_class(tmp_path: Path) -> None:
    text = write_report(write_run(tmp_path / "run"), tmp_path / "r.html").read_text()
    style, body = text.split("</style>", 1)
    used = {name for value in re.findall(r'class="?([\w -]+)', body) for name in value.split()}
    assert {name for name in used if f".{name}" not in style} == set()
