"""The coordinator on a unix socket."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
import sys
import time
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from lightning_gpuorch.control import addresses
from lightning_gpuorch.control import server as control_server
from lightning_gpuorch.control.handshake import Peer
from lightning_gpuorch.control.messages.ranks import Lookup, Published
from lightning_gpuorch.control.server import ControlServer
from lightning_gpuorch.control.transport import RemoteChannel
from lightning_gpuorch.errors import AuthenticationError, ControlPlaneError

RANK = Peer("rank", 0)


class Echo:
    """Answers a lookup with its key."""

    def handle(self, request: Any) -> Future[Any]:
        answer: Future[Any] = Future()
        answer.set_result(Published(value=request.key))
        return answer


def _asked(address: str, token: str = "secret") -> Any:
    channel = RemoteChannel(address, RANK, token, connect_timeout_seconds=0.2)
    try:
        return channel.call(Lookup(key="a"), timeout_seconds=10).value
    finally:
        channel.close()


def test_it_is_served_and_removed(tmp_path: Path) -> None:
    address = addresses.unix_address(tmp_path)
    if address is None:
        pytest.skip("the temporary directory has too long a name")
    server = ControlServer(Echo(), address, token="secret")
    assert server.address == address
    assert stat.S_ISSOCK((tmp_path / "control").stat().st_mode)
    assert _asked(address) == "a"
    with pytest.raises(AuthenticationError):
        _asked(address, "guess")
    server.close()
    with pytest.raises(ControlPlaneError, match="cannot be reached"):
        _asked(address)


def test_a_path_that_is_too_long_is_no_address(tmp_path: Path) -> None:
    assert addresses.unix_address(tmp_path / ("d" * 100)) is None


CONNECTS = """
import os, socket, sys
os.setuid(12345)
connection = socket.socket(socket.AF_UNIX)
connection.settimeout(10)
connection.connect(sys.argv[1])
print(connection.recv(1))
"""


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become another user")
def test_another_user_is_refused_though_the_directory_is_open(caplog: pytest.LogCaptureFixture) -> None:
    directory = Path("/tmp") / f"gpuorch-test-{os.getpid()}"
    directory.mkdir(mode=0o777)
    server = ControlServer(Echo(), f"{addresses.UNIX}{directory / 'control'}", token="secret")
    try:
        directory.chmod(0o777)
        (directory / "control").chmod(0o777)
        done = subprocess.run(
            [sys.executable, "-c", CONNECTS, str(directory / "control")], capture_output=True, text=True, timeout=60
        )
        assert done.stdout == "b''\n", done.stderr
        assert "it is of another user, uid 12345" in caplog.text
    finally:
        server.close()
        (directory / "control").unlink(missing_ok=True)
        directory.rmdir()


def test_a_flood_is_taken_in_slowly_and_costs_the_connected_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control_server, "ACCEPTS_AT_ONCE", 20)
    monkeypatch.setattr(control_server, "ACCEPTS_PER_SECOND", 10)
    server = ControlServer(Echo(), token="secret")
    channel = RemoteChannel(server.address, RANK, "secret")
    assert channel.call(Lookup(key="a"), timeout_seconds=10).value == "a"
    flood = [socket.create_connection(("127.0.0.1", server.port), timeout=10) for _ in range(60)]
    try:
        began = time.monotonic()
        while time.monotonic() - began < 1:
            assert channel.call(Lookup(key="a"), timeout_seconds=10).value == "a"
        assert len(server._strangers) < 40, "the kernel keeps the others"
    finally:
        for connection in flood:
            connection.close()
        channel.close()
        server.close()
