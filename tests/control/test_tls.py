"""The control plane encrypted: with certificates of one authority on both sides, and with all that is wrong about them."""

from __future__ import annotations

import contextlib
import shutil
import socket
import ssl
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from lightning_gpuorch.config import OrchestratorConfig
from lightning_gpuorch.control import handshake
from lightning_gpuorch.control import server as control_server
from lightning_gpuorch.control.handshake import Peer
from lightning_gpuorch.control.messages.ranks import Lookup
from lightning_gpuorch.control.server import ControlServer
from lightning_gpuorch.control.tls import Certificates
from lightning_gpuorch.control.transport import RemoteChannel
from lightning_gpuorch.errors import AuthenticationError, ConfigurationError, ControlPlaneError
from tests.control.test_addresses import Echo
from tests.support.certificates import make_authority, make_certificate

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="certificates are made with openssl")
RANK = Peer("rank", 0)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two authorities, ``ours`` and ``theirs``, and certificates of each."""
    directory = tmp_path_factory.mktemp("certificates")
    for authority in ("ours", "theirs"):
        make_authority(directory, authority)
        for name in ("node0", "node1"):
            make_certificate(directory, authority, f"{authority}-{name}")
    return directory


def _of(directory: Path, name: str, authority: str = "ours") -> Certificates:
    return Certificates(*(str(directory / file) for file in (f"{name}.pem", f"{name}.key", f"{authority}.pem")))


@contextlib.contextmanager
def _serving(certificates: Certificates | None) -> Iterator[ControlServer]:
    server = ControlServer(Echo(), token="secret", certificates=certificates)
    try:
        yield server
    finally:
        server.close()


def _asked(address: str, certificates: Certificates | None, token: str = "secret") -> object:
    channel = RemoteChannel(address, RANK, token, 0.5, certificates=certificates)
    try:
        return channel.call(Lookup(key="a"), timeout_seconds=10).value
    finally:
        channel.close()


def test_both_sides_show_certificates_and_still_need_the_token(directory: Path) -> None:
    with _serving(_of(directory, "ours-node0")) as server:
        assert _asked(server.address, _of(directory, "ours-node1")) == "a"
        with pytest.raises(AuthenticationError, match="must know the job's token"):
            _asked(server.address, _of(directory, "ours-node1"), "guess")


def test_large_payloads_and_many_requests_come_through(directory: Path) -> None:
    with _serving(_of(directory, "ours-node0")) as server:
        channel = RemoteChannel(server.address, RANK, "secret", certificates=_of(directory, "ours-node1"))
        for key in ("x" * 5_000_000, *map(str, range(100))):
            assert channel.call(Lookup(key=key), timeout_seconds=30).value == key
        channel.close()


@pytest.mark.parametrize(
    ("coordinator", "rank", "said_here", "said_there"),
    [
        ("ours-node0", None, "the coordinator at .* uses TLS, and this process does not", "begins without TLS"),
        (None, "ours-node1", "no TLS connection with .*version", "begins with TLS, and this process does not use it"),
        ("ours-node0", "theirs-node1", "no TLS connection with", "certificate verify failed"),
        ("theirs-node0", "ours-node1", "certificate verify failed", "no TLS connection"),
    ],
)
def test_a_side_that_lacks_something_is_told_so_on_both(
    directory: Path, caplog: pytest.LogCaptureFixture, coordinator: str | None, rank: str | None, said_here: str,
    said_there: str,
) -> None:  # fmt: skip
    with _serving(_of(directory, coordinator) if coordinator else None) as server:
        with pytest.raises(AuthenticationError, match=said_here) as error:
            _asked(server.address, _of(directory, rank) if rank else None)
        assert error.value.exit_code == 78
        assert "GPUORCH_TLS_CERTIFICATE" in str(error.value)
    (said,) = [record.getMessage() for record in caplog.records if "is refused" in record.getMessage()]
    assert said_there in said


def test_a_process_in_between_of_the_same_authority_cannot_pass_the_connection_on(
    directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    node0, node1 = _of(directory, "ours-node0"), _of(directory, "ours-node1")
    with _serving(node0) as server, socket.create_server(("127.0.0.1", 0)) as theirs, ThreadPoolExecutor(1) as pool:
        port = theirs.getsockname()[1]
        server.port = port  # as on another host, where both may have the same one
        calling = pool.submit(_asked, f"127.0.0.1:{port}", node1)
        accepted, _ = theirs.accept()
        theirs.close()
        host, real_port = server.address.rsplit(":", 1)
        with (
            node1.context(server_side=True).wrap_socket(accepted, server_side=True) as rank,
            node1.context(server_side=False).wrap_socket(socket.create_connection((host, int(real_port)))) as there,
        ):
            for sender, receiver in ((rank, there), (there, rank), (rank, there)):
                receiver.sendall(_one_frame(sender))
            assert handshake.read_proof(_one_frame(there)[handshake.PREAMBLE.size :]) == handshake.Proof("")
        with pytest.raises(ControlPlaneError):
            calling.result(60)
    assert "do not see the same certificate of the coordinator" in caplog.text


def _one_frame(connection: ssl.SSLSocket) -> bytes:
    connection.settimeout(10)
    data = b""
    while len(data) < handshake.PREAMBLE.size:
        data += connection.recv(handshake.PREAMBLE.size - len(data))
    length = handshake.PREAMBLE.size + handshake.length_of(data)
    while len(data) < length:
        data += connection.recv(length - len(data))
    return data


def test_strangers_are_bounded_before_they_speak_tls(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control_server, "MAX_STRANGERS", 8)
    monkeypatch.setattr(control_server, "HANDSHAKE_SECONDS", 1.0)
    with _serving(_of(directory, "ours-node0")) as server, contextlib.ExitStack() as stack:
        host, port = server.address.rsplit(":", 1)
        idle = [stack.enter_context(socket.create_connection((host, int(port)), timeout=10)) for _ in range(50)]
        for connection in idle[::2]:
            with contextlib.suppress(OSError):  # one more closes the oldest
                connection.sendall(b"\x16\x03\x01\x02\x00")
        assert _asked(server.address, _of(directory, "ours-node1")) == "a"
        for connection in idle:
            with contextlib.suppress(ConnectionResetError):
                while connection.recv(100):
                    pass


def test_files_that_do_not_fit_are_refused_by_name(directory: Path, tmp_path: Path) -> None:
    mixed = Certificates(*(str(directory / n) for n in ("ours-node0.pem", "ours-node1.key", "ours.pem")))
    with pytest.raises(ConfigurationError, match=r"tls_key='.*ours-node1\.key'.*mismatch"):
        mixed.context(server_side=True)
    encrypted = tmp_path / "encrypted.key"
    command = ["openssl", "rsa", "-aes256", "-passout", "pass:x", "-in", str(directory / "ours-node0.key")]
    subprocess.run([*command, "-out", str(encrypted)], check=True, capture_output=True, timeout=60)
    with pytest.raises(ConfigurationError, match="the key is encrypted"):
        Certificates(str(directory / "ours-node0.pem"), str(encrypted), str(directory / "ours.pem")).context(True)
    with pytest.raises(ConfigurationError, match="tls_key and tls_ca must be set as well"):
        OrchestratorConfig(tls_certificate="a.pem")
