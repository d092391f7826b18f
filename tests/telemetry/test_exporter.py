from __future__ import annotations

import contextlib
import http.client
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lightning_gpuorch.telemetry import FailureTally, MetricsExporter, RankMetrics, read_endpoint
from lightning_gpuorch.telemetry.metrics.exporter import _Server
from lightning_gpuorch.telemetry.metrics.exposition import snapshot_name
from tests.conftest import free_port
from tests.telemetry.test_metrics import Series, parse, value


def eventually(condition: Callable[[], Any], timeout_seconds: float = 15.0) -> Any:
    deadline = time.monotonic() + timeout_seconds
    while True:
        try:
            found = condition()
        except (OSError, http.client.HTTPException):
            found = None
        if found:
            return found
        assert time.monotonic() < deadline, "did not come true in time"
        time.sleep(0.01)


def scrape(port: int, path: str = "/metrics") -> Series:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5) as answer:
        assert answer.headers["Content-Type"].startswith("text/plain; version=0.0.4")
        return parse(answer.read())


class Ranks:
    """Ranks in processes of their own that share a directory."""

    def __init__(self, directory: Path, port: int):
        self.directory, self.port = directory, port
        self.processes: list[subprocess.Popen[str]] = []

    def start(self, rank: int, generation: int = 0) -> subprocess.Popen[str]:
        script = Path(__file__).parent / "exporting_rank.py"
        process = subprocess.Popen(
            [sys.executable, str(script), str(self.directory), str(rank), str(generation), str(self.port)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.processes.append(process)
        return process

    def tell(self, process: subprocess.Popen[str], order: str) -> None:
        assert process.stdin is not None
        process.stdin.write(order + "\n")
        process.stdin.flush()

    def hear(self, process: subprocess.Popen[str]) -> str:
        assert process.stdout is not None
        return process.stdout.readline().strip()

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait(10)
            for stream in (process.stdin, process.stdout):
                if stream is not None:
                    stream.close()


@pytest.fixture
def ranks(tmp_path: Path) -> Iterator[Ranks]:
    ranks = Ranks(tmp_path / "metrics", free_port())
    yield ranks
    ranks.close()


def test_one_endpoint_serves_all_ranks_and_outlives_the_serving_one(ranks: Ranks) -> None:
    both = [ranks.start(0), ranks.start(1)]
    for process in both:
        assert ranks.hear(process) == "begun"
        ranks.tell(process, "step 10")
        assert ranks.hear(process) == "done"

    def steps(expected: list[float]) -> bool:
        series = scrape(ranks.port)
        return [value(series, "distributed_inference_steps_total", rank=r) for r in "01"] == expected

    eventually(lambda: steps([10, 10]))
    endpoint = eventually(lambda: read_endpoint(ranks.directory))
    assert endpoint["port"] == ranks.port
    serving = endpoint["rank"]
    both[serving].send_signal(signal.SIGKILL)
    both[serving].wait(10)
    eventually(lambda: steps([10, 10]))  # the other one took over, with the counts of the dead
    assert eventually(lambda: read_endpoint(ranks.directory))["rank"] == 1 - serving
    eventually(lambda: value(scrape(ranks.port), "distributed_inference_rank_up", rank=str(serving)) == 0)
    assert value(scrape(ranks.port), "gpu_memory_usage_bytes", rank=str(serving)) is None
    again = ranks.start(serving, generation=1)
    assert ranks.hear(again) == "begun"
    ranks.tell(again, "step 5")
    assert ranks.hear(again) == "done"
    eventually(lambda: steps([15, 10] if serving == 0 else [10, 15]))
    series = scrape(ranks.port)
    assert value(series, "distributed_inference_rank_up", rank=str(serving)) == 1
    assert value(series, "gpu_memory_usage_bytes", rank=str(serving)) == 1001
    assert value(series, "distributed_inference_rank_restarts_total", rank=str(serving)) == 1


def exporter(directory: Path, tally: FailureTally, rank: int = 0, **options: Any) -> MetricsExporter:
    options = {"port": 0, "address": "127.0.0.1", "interval_seconds": 0.02, "failures": tally, **options}
    return MetricsExporter(RankMetrics(rank, failures=tally).registry, directory, rank=rank, **options)


def test_a_foreign_process_on_the_port_moves_the_endpoint_and_a_file_says_where(
    tmp_path: Path, tally: FailureTally, caplog: pytest.LogCaptureFixture
) -> None:
    with socket.socket() as foreign:
        foreign.bind(("127.0.0.1", 0))
        foreign.listen()
        taken = foreign.getsockname()[1]
        with exporter(tmp_path, tally, port=taken), exporter(tmp_path, tally, rank=1, port=taken):
            said = eventually(lambda: read_endpoint(tmp_path))
            assert taken < said["port"] <= taken + 32
            eventually(lambda: value(scrape(said["port"]), "distributed_inference_rank_up", rank="1"))
    assert f"port {taken} is taken by another process; metrics are served on port {said['port']}" in caplog.text
    assert tally.counts() == {}


def test_port_0_still_elects_one_rank(tmp_path: Path, tally: FailureTally) -> None:
    exporters = [exporter(tmp_path, tally, rank=rank) for rank in range(4)]
    try:
        eventually(lambda: any(e.endpoint for e in exporters))
        eventually(lambda: len(list(tmp_path.glob("rank*.prom"))) == 4)
        serving = [e for e in exporters if e.endpoint]
        assert len(serving) == 1
        serving[0].close()
        exporters.remove(serving[0])
        eventually(lambda: any(e.endpoint for e in exporters))
        assert sum(e.endpoint is not None for e in exporters) == 1
    finally:
        for each in exporters:
            each.close()


def test_textfile_mode_serves_nothing_and_leaves_the_final_totals(tmp_path: Path, tally: FailureTally) -> None:
    text = tmp_path / "collector" / "gpuorch.prom"
    registries = [RankMetrics(rank, failures=tally) for rank in range(2)]
    exporters = [
        MetricsExporter(
            metrics.registry, tmp_path / "metrics", rank=rank, port=None, textfile=text, interval_seconds=0.02,
            failures=tally,
        )
        for rank, metrics in enumerate(registries)
    ]  # fmt: skip
    eventually(text.exists)
    for metrics in registries:
        metrics.observe_step(0.1, 8)
    for each in exporters:
        each.close()
        assert each.endpoint is None
    series = parse(text.read_bytes())
    assert [value(series, "distributed_inference_samples_total", rank=r) for r in "01"] == [8, 8]
    assert value(series, "distributed_inference_rank_up", rank="0") is None  # ended, not dead
    assert tally.counts() == {}


@pytest.mark.parametrize("first", [0, 1])
def test_whoever_ends_last_the_text_file_has_everybodys_last_figures(
    tmp_path: Path, tally: FailureTally, first: int
) -> None:
    text = tmp_path / "job.prom"
    registries = [RankMetrics(rank, failures=tally) for rank in range(2)]
    exporters = [
        MetricsExporter(
            metrics.registry, tmp_path / "m", rank=rank, port=None, textfile=text, interval_seconds=0.2, failures=tally
        )
        for rank, metrics in enumerate(registries)
    ]
    eventually(lambda: text.exists() and len(list((tmp_path / "m").glob("rank*.prom"))) == 2)
    for metrics in registries:
        metrics.observe_step(0.1, 8)
    closing = [threading.Thread(target=each.close) for each in exporters]
    for thread in closing if first == 0 else closing[::-1]:
        thread.start()  # at the same time, in either order
    for thread in closing:
        thread.join(10)
    series = parse(text.read_bytes())
    assert [value(series, "distributed_inference_samples_total", rank=r) for r in "01"] == [8, 8]
    assert [value(series, "distributed_inference_rank_up", rank=r) for r in "01"] == [None, None]


def test_a_forked_child_does_not_keep_the_port_of_a_dead_parent(ranks: Ranks, tmp_path: Path) -> None:
    """DataLoader workers live on for seconds after their rank was killed."""
    script = tmp_path / "forking.py"
    script.write_text(
        "import os, sys, time\n"
        "from lightning_gpuorch.telemetry import MetricsExporter, RankMetrics, read_endpoint\n"
        f"MetricsExporter(RankMetrics(0).registry, {str(ranks.directory)!r}, rank=0, port={ranks.port},"
        " address='127.0.0.1', interval_seconds=0.05)\n"
        f"while read_endpoint({str(ranks.directory)!r}) is None: time.sleep(0.01)\n"
        "child = os.fork()\n"
        "if child == 0: time.sleep(60); os._exit(0)\n"
        "print(child, flush=True); time.sleep(60)\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-W", "ignore", str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    ranks.processes.append(parent)
    child = int(ranks.hear(parent))
    try:
        parent.kill()
        parent.wait(10)
        survivor = ranks.start(1)
        assert ranks.hear(survivor) == "begun"
        eventually(lambda: value(scrape(ranks.port), "distributed_inference_rank_up", rank="1") == 1)
        assert read_endpoint(ranks.directory)["rank"] == 1  # type: ignore[index]
    finally:
        os.kill(child, signal.SIGKILL)


def test_other_paths_are_not_found_and_an_unreadable_directory_is_a_failed_scrape(
    tmp_path: Path, tally: FailureTally, monkeypatch: pytest.MonkeyPatch
) -> None:
    with exporter(tmp_path / "m", tally) as serving:
        port = eventually(lambda: serving.endpoint)[1]
        with pytest.raises(urllib.error.HTTPError, match="404"):
            scrape(port, "/secret")
        monkeypatch.setattr(Path, "iterdir", lambda self: (_ for _ in ()).throw(PermissionError("no")))
        with pytest.raises(urllib.error.HTTPError, match="503"):
            scrape(port)
        monkeypatch.undo()
        assert value(scrape(port), "distributed_inference_rank_up", rank="0") == 1
    assert tally.counts() == {"metrics": 1}


@pytest.mark.parametrize("n", range(1, 25))  # set-up and the first periods
def test_every_nth_failing_call_is_counted_and_the_exporter_recovers(
    n: int, tmp_path: Path, tally: FailureTally, failing_system: Any
) -> None:
    failing_system.fail_at = n
    text = tmp_path / "text" / "job.prom"
    metrics = RankMetrics(0, failures=tally)
    exporting = MetricsExporter(
        metrics.registry, tmp_path / "metrics", rank=0, port=0, address="127.0.0.1", textfile=text,
        interval_seconds=0.01, failures=tally,
    )  # fmt: skip
    try:
        eventually(lambda: failing_system.failed)
        port = eventually(lambda: exporting.endpoint)[1]
        eventually(lambda: value(scrape(port), "distributed_inference_rank_up", rank="0"))
        eventually(lambda: text.exists() and read_endpoint(tmp_path / "metrics"))
        metrics.steps.inc()
    finally:
        exporting.close()
    assert failing_system.failed == 1
    # Making a directory that is there already may fail and harms nobody; one that was not made fails those who use it.
    assert (0 if failing_system.where == "mkdir" else 1) <= tally.count("metrics") <= 5
    last = parse((tmp_path / "metrics" / snapshot_name(0, 0)).read_bytes())
    assert value(last, "distributed_inference_steps_total", rank="0") == 1


def test_everything_failing_for_ever_is_counted_and_closing_still_works(
    tmp_path: Path, tally: FailureTally, failing_system: Any
) -> None:
    failing_system.fail_at = -1
    exporting = exporter(tmp_path / "m", tally)
    eventually(lambda: tally.count("metrics") > 5)
    exporting.close()
    assert exporting.endpoint is None


def test_slow_clients_are_dropped_and_hold_up_nobody(
    tmp_path: Path, tally: FailureTally, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_Server, "client_seconds", 1.0)
    with exporter(tmp_path, tally) as served:
        deadline = time.monotonic() + 30
        while served.endpoint is None:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        idle = [socket.create_connection(served.endpoint, timeout=10) for _ in range(200)]
        try:
            for connection in idle:
                connection.settimeout(10)
                with contextlib.suppress(OSError):  # it was one too many
                    connection.sendall(b"GET /metr")
            assert b"200 OK" in _get(served.endpoint)
            dripping = idle[-1]
            began = time.monotonic()
            with contextlib.suppress(OSError):  # reset, or a broken pipe
                while time.monotonic() - began < 30:
                    dripping.sendall(b"i")
                    time.sleep(0.1)
            assert time.monotonic() - began < 10, "each byte in time, the request never whole"
        finally:
            for connection in idle:
                connection.close()


def _get(endpoint: tuple[str, int]) -> bytes:
    with socket.create_connection(endpoint, timeout=10) as connection:
        connection.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
        return connection.recv(4096)
