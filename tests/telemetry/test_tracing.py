from __future__ import annotations

import builtins
import http.server
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lightning_gpuorch.errors import ConfigurationError
from lightning_gpuorch.telemetry import FailureTally
from lightning_gpuorch.telemetry.events.json_lines import read_lines
from lightning_gpuorch.telemetry.tracing import StepFault, StepPart, StepTracer, make_tracer_provider

BEGIN = 1_790_000_000_000_000_000


def phases(*names: str) -> list[StepPart]:
    return [StepPart(name, BEGIN + i * 1000, BEGIN + (i + 1) * 1000) for i, name in enumerate(names)]


def test_without_opentelemetry_nothing_is_sampled_and_nothing_fails(
    monkeypatch: pytest.MonkeyPatch, tally: FailureTally
) -> None:
    real = builtins.__import__

    def no_opentelemetry(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("opentelemetry"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", no_opentelemetry)
    tracer = StepTracer("run", 0, every=1, failures=tally)
    assert not tracer.is_sampled(0)
    tracer.record_step(0, phases("forward"))
    with pytest.raises(ConfigurationError, match=r"lightning_gpuorch\[otel\]"):
        make_tracer_provider(file="x")
    assert tally.counts() == {}


def test_ranks_agree_on_traces_and_replicas_attempts_and_runs_do_not() -> None:
    ids = [
        StepTracer(run, rank, replica=replica).trace_id(step, attempt)
        for run, rank, replica, step, attempt in (
            ("a", 0, 0, 7, 0), ("a", 1, 0, 7, 0), ("a", 2, 1, 7, 0), ("a", 0, 0, 8, 0), ("a", 0, 0, 7, 1), ("b", 0, 0, 7, 0),
        )
    ]  # fmt: skip
    assert ids[0] == ids[1]
    assert len(set(ids)) == 5
    assert all(len(i) == 32 and int(i, 16) for i in ids)


def test_bad_sampling_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="every=0"):
        StepTracer("run", 0, every=0)


def test_a_step_that_is_not_sampled_costs_under_a_microsecond() -> None:
    tracer = StepTracer("run", 0, every=10**9)
    best = float("inf")
    for _ in range(10):
        began = time.perf_counter()
        for step in range(1, 2001):
            tracer.is_sampled(step)
        best = min(best, (time.perf_counter() - began) / 2000)
    assert best < 1e-6


def spans_of(file: Path) -> list[dict[str, Any]]:
    return read_lines(file)[0]


def test_the_spans_of_all_ranks_form_one_tree(tmp_path: Path, tally: FailureTally) -> None:
    pytest.importorskip("opentelemetry.sdk")
    for rank in range(2):
        provider = make_tracer_provider(file=tmp_path / f"spans-{rank}.jsonl", rank=rank, failures=tally)
        tracer = StepTracer("run", rank, is_leader=rank == 0, every=10, provider=provider, failures=tally)
        assert [step for step in range(25) if tracer.is_sampled(step)] == [0, 10, 20]
        tracer.record_step(
            10, phases("fetch", "transfer", "forward", "communication", "write"), attributes={"batch_size": 8}
        )
        provider.shutdown()
    spans = spans_of(tmp_path / "spans-0.jsonl") + spans_of(tmp_path / "spans-1.jsonl")
    assert {span["trace_id"] for span in spans} == {StepTracer("run", 5).trace_id(10)}
    (root,) = [span for span in spans if span["parent_id"] is None]
    assert (root["name"], root["begin_ns"], root["end_ns"]) == ("inference.step", BEGIN, BEGIN + 5000)
    by_rank = [span for span in spans if span["name"] == "inference.rank"]
    assert [span["parent_id"] for span in by_rank] == [root["span_id"]] * 2
    assert [span["attributes"]["gpuorch.rank"] for span in by_rank] == [0, 1]
    for parent in by_rank:
        children = [span["name"] for span in spans if span["parent_id"] == parent["span_id"]]
        assert children == [f"inference.{p}" for p in ("fetch", "transfer", "forward", "communication", "write")]
    assert len({span["span_id"] for span in spans}) == len(spans) == 13
    assert tally.counts() == {}


def test_faults_are_shown_and_a_retry_is_linked_to_what_it_repeats(tmp_path: Path, tally: FailureTally) -> None:
    pytest.importorskip("opentelemetry.sdk")
    provider = make_tracer_provider(file=tmp_path / "spans.jsonl", failures=tally)
    tracer = StepTracer("run", 0, provider=provider, failures=tally)
    tracer.record_step(0, phases("forward"), faults=[StepFault("oom", BEGIN + 5, "batch 64")], error="out of memory")
    tracer.record_step(0, phases("forward"), attempt=1, retry_of=0)
    provider.shutdown()
    first, second = (span for span in spans_of(tmp_path / "spans.jsonl") if span["name"] == "inference.rank")
    assert (first["error"], first["events"]) == (
        "out of memory", [{"name": "oom", "ts_ns": BEGIN + 5, "exception.message": "batch 64"}],
    )  # fmt: skip
    assert (second["error"], second["links"]) == (None, [first["trace_id"]])
    assert tally.counts() == {}


def test_a_file_that_cannot_be_written_and_a_broken_tracer_are_counted(tmp_path: Path, tally: FailureTally) -> None:
    pytest.importorskip("opentelemetry.sdk")
    (tmp_path / "file").write_text("")
    provider = make_tracer_provider(file=tmp_path / "file" / "spans.jsonl", failures=tally)
    tracer = StepTracer("run", 0, provider=provider, failures=tally)
    tracer.record_step(0, phases("forward"))
    provider.shutdown()
    assert tally.count("tracing") == 1
    tracer.record_step(0, phases("forward"), attributes={"x": 1}, faults=[None])  # type: ignore[list-item]
    assert tally.count("tracing") == 2


@pytest.fixture
def collector() -> Iterator[tuple[str, list[Any]]]:
    """Receives OTLP over HTTP and decodes it with OpenTelemetry's own protocol classes."""
    service = pytest.importorskip("opentelemetry.proto.collector.trace.v1.trace_service_pb2")
    received: list[Any] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            import gzip

            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.headers.get("Content-Encoding") == "gzip":
                body = gzip.decompress(body)
            request = service.ExportTraceServiceRequest()
            request.ParseFromString(body)
            received.append(request)
            self.send_response(200)
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class's name
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}/v1/traces", received
    server.shutdown()
    thread.join(5)
    server.server_close()


def test_spans_reach_an_otlp_collector(collector: tuple[str, list[Any]], tally: FailureTally) -> None:
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http")
    endpoint, received = collector
    provider = make_tracer_provider(endpoint=endpoint, rank=3, failures=tally)
    StepTracer("run", 3, provider=provider, failures=tally).record_step(0, phases("forward"))
    provider.shutdown()
    spans = [
        span
        for request in received
        for resource in request.resource_spans
        for scope in resource.scope_spans
        for span in scope.spans
    ]
    assert [span.name for span in spans] == ["inference.step", "inference.forward", "inference.rank"]
    assert {span.trace_id.hex() for span in spans} == {StepTracer("run", 0).trace_id(0)}
    attributes = {a.key: a.value.string_value for a in received[0].resource_spans[0].resource.attributes}
    assert attributes["service.instance.id"] == "3"
