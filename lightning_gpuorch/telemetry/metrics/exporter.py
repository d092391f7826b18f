"""One Prometheus endpoint per node that outlives any of its ranks.

1. Every rank writes its metrics to a file of its own, atomically, once per second.
2. Every rank tries to bind an abstract Unix socket named after the directory. The kernel lets one process of the node
   have it and takes it back the moment that process dies: the bind is the election.
3. Who has it serves the merge of all files on the port. If the serving rank dies, another is elected within a second or
   so and binds the same port; the counts of the dead one are in its file.
4. If a foreign process has the port, the next free one is taken; the log says so, and ``<directory>/endpoint`` says
   where the metrics are.

Nothing here raises into the run: failures are counted as observer ``metrics``.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import json
import logging
import os
import socket
import socketserver
import threading
import time
import weakref
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any

from prometheus_client import CollectorRegistry

from lightning_gpuorch.checked_files import parse_object, read_file
from lightning_gpuorch.paths import local_path
from lightning_gpuorch.telemetry.atomic_file import replace_file
from lightning_gpuorch.telemetry.failures import FailureTally, observer_failures
from lightning_gpuorch.telemetry.metrics.exposition import CONTENT_TYPE, merge_directory, snapshot_name, write_text

log = logging.getLogger(__name__)

ENDPOINT_FILE = "endpoint"
_PORTS_TO_TRY = 32


class MetricsExporter:
    """Writes one rank's metrics and, if elected, serves those of all ranks of the node.

    Args:
        registry: This rank's metrics.
        directory: Shared by the ranks of a run on this node; use another one for each node and run.
        rank: Global rank.
        generation: How often this rank was started before.
        port: Port to serve on; the next free one if a foreign process has it; 0 takes any; None serves nothing.
        address: Interface to serve on.
        textfile: File to which the elected rank writes the merge as well, for node_exporter's textfile collector: the
            way for batch jobs that may end between two scrapes. Its name must end in ``.prom``.
        interval_seconds: Time between two snapshots.
        stale_after_seconds: A rank whose snapshot is older counts as down.
        before_snapshot: Called in the exporting thread before each snapshot, to set gauges.
        failures: Where failures are counted.
    """

    def __init__(
        self,
        registry: CollectorRegistry,
        directory: str | os.PathLike[str],
        *,
        rank: int,
        generation: int = 0,
        port: int | None = 9400,
        address: str = "127.0.0.1",
        textfile: str | os.PathLike[str] | None = None,
        interval_seconds: float = 1.0,
        stale_after_seconds: float = 15.0,
        before_snapshot: Callable[[], None] | None = None,
        failures: FailureTally = observer_failures,
    ):
        self.directory = local_path(directory, "directory")
        self._registry, self._rank, self._port, self._address = registry, rank, port, address
        self._path = self.directory / snapshot_name(rank, generation)
        self._textfile = local_path(textfile, "textfile") if textfile is not None else None
        self._interval_seconds, self._stale_after_seconds = interval_seconds, stale_after_seconds
        self._before_snapshot, self._failures = before_snapshot, failures
        self._election: socket.socket | None = None
        self._server: ThreadingHTTPServer | None = None
        self._stop = threading.Event()
        self._ended = self._announced = False
        _exporters.add(self)
        self._thread = threading.Thread(target=self._run, name="gpuorch-metrics", daemon=True)
        self._thread.start()

    @property
    def endpoint(self) -> tuple[str, int] | None:
        """Address and port on which this rank serves, or None if it does not."""
        server = self._server
        return (self._address, server.server_address[1]) if server is not None else None

    def close(self, timeout_seconds: float = 5.0) -> None:
        """Write the last snapshot and stop; safe to call again. A disk that hangs is left behind after the timeout."""
        self._stop.set()
        self._thread.join(timeout_seconds)
        if self._thread.is_alive():
            self._failures.add("metrics", TimeoutError(f"{self._path} could not be written in {timeout_seconds} s"))

    def __enter__(self) -> MetricsExporter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _run(self) -> None:
        while not self._ended:
            self._ended = self._stop.is_set()
            for action in (self._call_back, self._snapshot, self._serve, self._write_textfile):
                try:
                    action()
                except Exception as error:  # noqa: BLE001 - an observer never ends the run
                    self._failures.add("metrics", error)
            if not self._ended:
                self._stop.wait(self._interval_seconds)
        try:
            self._see_to_textfile()
        except OSError as error:
            self._failures.add("metrics", error)
        self._step_down()

    def _call_back(self) -> None:
        if self._before_snapshot is not None:
            self._before_snapshot()

    def _snapshot(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        replace_file(self._path, write_text(self._registry, ended=self._ended))

    def _serve(self) -> None:
        if self._port is None and self._textfile is None:
            return
        if self._election is None:
            self._election = _elect(self.directory)
        if self._election is not None and self._server is None and self._port is not None and not self._stop.is_set():
            self._server = self._bind(self._port)
            self._log_port(self._server.server_address[1])
            threading.Thread(
                target=self._server.serve_forever, args=(0.1,), name="gpuorch-metrics-http", daemon=True
            ).start()
        if self._server is not None and not self._announced:
            self._announce(self._server.server_address[1])

    def _bind(self, wanted: int) -> ThreadingHTTPServer:
        directory, stale, failures = self.directory, self._stale_after_seconds, self._failures

        handler = functools.partial(
            _Handler,
            merged=lambda: merge_directory(directory, stale),
            failed=lambda error: failures.add("metrics", error),
        )
        last = min(wanted + _PORTS_TO_TRY, 65536) if wanted else 1
        for port in range(wanted, last):
            try:
                return _Server((self._address, port), handler)
            except OSError as error:
                if error.errno != errno.EADDRINUSE or port == last - 1:
                    raise
        raise AssertionError("the loop returns or raises")

    def _log_port(self, port: int) -> None:
        if self._port not in (0, port):
            log.warning("port %d is taken by another process; metrics are served on port %d", self._port, port)
        else:
            log.info("metrics of this node are served on port %d", port)

    def _announce(self, port: int) -> None:
        said = {
            "host": socket.gethostname(),
            "address": self._address,
            "port": port,
            "pid": os.getpid(),
            "rank": self._rank,
        }
        replace_file(self.directory / ENDPOINT_FILE, json.dumps(said).encode() + b"\n")
        self._announced = True

    def _write_textfile(self) -> None:
        if self._textfile is not None and self._election is not None:
            self._textfile.parent.mkdir(parents=True, exist_ok=True)
            replace_file(self._textfile, merge_directory(self.directory, self._stale_after_seconds))

    def _see_to_textfile(self) -> None:
        """At the end of a rank that was not elected: its last figures must get into the text file.

        Either the elected rank goes on and merges again, twice to be sure that it began after our last snapshot, or it
        ends as well, and we are elected.
        """
        if self._textfile is None or self._election is not None:
            return
        deadline = time.monotonic() + 2 * self._interval_seconds + 1
        versions = {_version(self._textfile)}
        while time.monotonic() < deadline and len(versions) < 3:
            self._election = _elect(self.directory)
            if self._election is not None:
                self._write_textfile()
                return
            time.sleep(0.02)
            versions.add(_version(self._textfile))

    def _step_down(self) -> None:
        server, self._server = self._server, None
        if server is not None:
            server.shutdown()
            server.server_close()
        election, self._election = self._election, None
        if election is not None:
            election.close()


_exporters: weakref.WeakSet[MetricsExporter] = weakref.WeakSet()


def _leave_sockets_to_parent() -> None:
    """In a forked child (a DataLoader worker): it must not hold the port and the election when its parent dies."""
    for exporter in _exporters:
        if exporter._server is not None:
            exporter._server.socket.close()
        if exporter._election is not None:
            exporter._election.close()


os.register_at_fork(after_in_child=_leave_sockets_to_parent)


def read_endpoint(directory: str | os.PathLike[str]) -> dict[str, Any] | None:
    """Where the metrics of a directory are served, or None if that is not recorded: ``host``, ``port``, ``pid``, ..."""
    try:
        return parse_object(read_file(Path(directory) / ENDPOINT_FILE))
    except (OSError, ValueError):
        return None


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def server_bind(self) -> None:
        """Bind; without the base class's look-up of the host's name, which may wait for a name server."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away in the middle is no event; the default prints a traceback."""


class _Handler(BaseHTTPRequestHandler):
    timeout = 5

    def __init__(self, *connection: Any, merged: Callable[[], bytes], failed: Callable[[Exception], None]):
        self._merged, self._failed = merged, failed
        super().__init__(*connection)  # which answers the request

    def do_GET(self) -> None:
        if self.path.partition("?")[0] not in ("/", "/metrics"):
            self.send_error(404)
            return
        try:
            body = self._merged()
        except Exception as error:  # noqa: BLE001 - a scrape that fails must show as failed, and harm nothing
            self._failed(error)
            self.send_error(503)
            return
        self.send_response(200)
        self.send_header("Content-Type", CONTENT_TYPE)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class's name
        """Scrapes are no news."""


def _elect(directory: Path) -> socket.socket | None:
    """Try to become the serving process of a directory on this node; hold the socket for as long as you serve."""
    name = b"\0gpuorch-metrics-" + hashlib.sha256(os.fsencode(os.path.realpath(directory))).hexdigest()[:32].encode()
    election = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        election.bind(name)
    except OSError as error:
        election.close()
        if error.errno == errno.EADDRINUSE:
            return None
        raise
    return election


def _version(path: Path) -> int | None:
    return path.stat().st_mtime_ns if path.exists() else None
