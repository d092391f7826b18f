"""The wire and the collectives, with real sockets and threads."""

import collections
import contextlib
import enum
import math
import re
import socket
import struct
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor

import msgspec
import pytest

from lightning_gpuorch.control import handshake, transport
from lightning_gpuorch.control import server as control_server
from lightning_gpuorch.control.codec import decode_answer
from lightning_gpuorch.control.collectives import ControlCollectives
from lightning_gpuorch.control.coordinator import Coordinator
from lightning_gpuorch.control.handshake import PROTOCOL_VERSION, Greeting, Introduction, Peer
from lightning_gpuorch.control.messages.base import Sender
from lightning_gpuorch.control.messages.collectives import Gather, Gathered
from lightning_gpuorch.control.messages.ranks import Lookup, Publish, Published, RegisterRank
from lightning_gpuorch.control.server import ControlServer
from lightning_gpuorch.control.transport import LocalChannel, RemoteChannel
from lightning_gpuorch.errors import (
    EXIT_CONFIGURATION,
    EXIT_RESUMABLE,
    AuthenticationError,
    CollectiveMismatchError,
    ConfigurationError,
    ControlPlaneError,
    ControlPlaneTimeoutError,
    OtherJobError,
    ProtocolError,
    ProtocolVersionError,
)
from tests.support.listener import listener

RANK = Peer("rank", 0)


class Echo:
    """Answers at once, later, or never."""

    def __init__(self):
        self.release = threading.Event()

    def handle(self, request):
        future = Future()
        if isinstance(request, Gather):
            future.set_result(Gathered(payloads={request.rank: request.payload[::-1]}))
        elif isinstance(request, Lookup) and request.key == "later":
            answer = Published(value="é\n")
            threading.Thread(target=lambda: (self.release.wait(10), future.set_result(answer))).start()
        return future


def _echo(channel, payload=b"xy"):
    request = Gather(number=0, kind="echo", rank=0, payload=payload)
    return channel.call(request, timeout_seconds=10).payloads[0]


@pytest.fixture
def server():
    echo = Echo()
    server = ControlServer(echo, token="secret")
    server.echo = echo
    yield server
    echo.release.set()
    server.close()


def test_payloads_of_every_size_come_back(server):
    channel = RemoteChannel(server.address, RANK, "secret")
    for size in (0, 1, 65_537, 5 * 2**20):
        payload = bytes(range(256)) * (size // 256 + 1)
        assert _echo(channel, payload[:size]) == payload[:size][::-1]
    channel.close()


def test_a_waiting_request_holds_up_nobody(server):
    channel = RemoteChannel(server.address, RANK, "secret")
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(channel.call, Lookup(key="later"), timeout_seconds=10)
        for _ in range(50):
            assert _echo(channel) == b"yx"
        assert not waiting.done()
        server.echo.release.set()
        assert waiting.result(5).value == "é\n"
    channel.close()


def test_no_answer_is_a_timeout_that_names_the_request(server):
    channel = RemoteChannel(server.address, RANK, "secret")
    with pytest.raises(ControlPlaneTimeoutError, match="Lookup was not answered .* within 0.2 s"):
        channel.call(Lookup(key="never"), timeout_seconds=0.2)
    assert _echo(channel) == b"yx"
    channel.close()


def test_a_stranger_is_not_served(server):
    channel = RemoteChannel(server.address, RANK, "guess")
    with pytest.raises(
        AuthenticationError, match=r"this process does not, says coordinator 0 at 127\.0\.0\.1:\d+\. Set GPUORCH_TOKEN"
    ) as error:
        _echo(channel)
    assert error.value.exit_code == EXIT_CONFIGURATION


def test_a_request_survives_the_loss_of_its_connection():
    coordinator = Coordinator(1)
    server = ControlServer(coordinator)
    channel = RemoteChannel(server.address, RANK, connect_timeout_seconds=10)
    channel.call(Publish(key="a", value=1), timeout_seconds=5)
    port = server.port
    server.close()
    again = threading.Timer(0.5, lambda: servers.append(ControlServer(coordinator, port=port)))
    servers = []
    again.start()
    assert channel.call(Lookup(key="a"), timeout_seconds=10).value == 1
    again.join()
    servers[0].close()
    channel.close()


def test_an_unreachable_head_is_named():
    channel = RemoteChannel("127.0.0.1:9", RANK, connect_timeout_seconds=0.2)
    with pytest.raises(ControlPlaneError, match="coordinator at 127.0.0.1:9 cannot be reached"):
        channel.call(Lookup(key="a"), timeout_seconds=5)


def _ranks(count, work, coordinator=None):
    """Run ``work(collectives, rank)`` on threads, one per rank, over real sockets."""
    coordinator = coordinator or Coordinator(count)
    server = ControlServer(coordinator)
    channels = [RemoteChannel(server.address, Peer("rank", rank)) for rank in range(count)]

    def one(rank):
        return work(ControlCollectives(channels[rank], rank, 5.0), rank)

    try:
        with ThreadPoolExecutor(count) as pool:
            return list(pool.map(one, range(count)))
    finally:
        for channel in channels:
            channel.close()
        server.close()


def test_collectives_agree_on_all_ranks():
    def work(collectives, rank):
        collectives.barrier("begin")
        return collectives.broadcast_object({"from": rank}, src_rank=2), collectives.all_gather_object(rank * 10)

    assert _ranks(4, work) == [({"from": 2}, [0, 10, 20, 30])] * 4


def test_what_is_data_travels_as_data_and_everything_comes_back_as_it_was():
    endless: list = []
    endless.append(endless)
    data = [None, True, 7, -(2**63), 2**64 - 1, 0.1, math.inf, "é\0", b"\xff", [], {"a": [1, {"b": None}]}]
    others = [(1, 2), {1: 2}, 2**64, "\ud800", {"a": (1,)}, collections.OrderedDict(a=1), Color.RED, endless]
    channel = _Recording(Coordinator(1))
    collectives = ControlCollectives(channel, 0, 1.0)
    for number, value in enumerate(data + others):
        (found,) = collectives.all_gather_object(value)
        assert type(found) is type(value)
        assert found == value if value is not endless else found[0] is found
        assert channel.payloads[-1][:1] == (b"d" if number < len(data) else b"p"), value


class Color(enum.Enum):
    RED = 1


class _Recording(LocalChannel):
    def __init__(self, coordinator):
        super().__init__(coordinator)
        self.payloads = []

    def call(self, request, **options):
        if isinstance(request, Gather):
            self.payloads.append(request.payload)
        return super().call(request, **options)


def test_a_restarted_rank_replays_what_was_decided():
    coordinator = Coordinator(2)
    first = _ranks(2, lambda c, r: [c.all_gather_object((r, i)) for i in range(5)], coordinator)
    channel = LocalChannel(coordinator)
    again = ControlCollectives(channel, 1, 1.0)
    assert [again.all_gather_object("something else now") for _ in range(5)] == first[1]


def test_different_calls_are_named():
    def work(collectives, rank):
        try:
            collectives.barrier() if rank else collectives.broadcast_object(1)
        except CollectiveMismatchError as error:
            return str(error)
        except ControlPlaneTimeoutError:
            return "timeout"
        return None

    said = [text for text in _ranks(2, lambda c, r: work(c, r)) if text and "calls" in text]
    assert said
    assert "calls barrier" in said[0]
    assert "calls broadcast(src=0)" in said[0]


def test_missing_ranks_are_named():
    coordinator = Coordinator(3)
    collectives = ControlCollectives(LocalChannel(coordinator), 0, 0.1)
    with pytest.raises(
        ControlPlaneTimeoutError, match=r"rank 0 waited 0.1 s in collective #0 \(barrier\) for ranks \[1, 2\]"
    ):
        collectives.barrier()


def test_a_retired_rank_is_no_longer_waited_for():
    coordinator = Coordinator(2)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(ControlCollectives(LocalChannel(coordinator), 0, 5.0).all_gather_object, "here")
        while coordinator.collectives.missing(0) != [1]:
            time.sleep(0.001)
        coordinator.collectives.retire([1])
        assert waiting.result(5) == ["here"]


def test_a_rank_that_has_left_is_named():
    coordinator = Coordinator(2)
    coordinator.collectives.leave(1, "has ended")
    with pytest.raises(CollectiveMismatchError, match="needs rank 1, which has ended"):
        ControlCollectives(LocalChannel(coordinator), 0, 5.0).barrier()


def test_a_rank_that_has_left_and_runs_again_is_waited_for():
    coordinator = Coordinator(2)
    coordinator.collectives.leave(1, "has ended")
    channel = LocalChannel(coordinator)
    again = RegisterRank(sender=Sender(rank=1, replica=0, generation=1), tensor_parallel_size=2)
    channel.call(again, timeout_seconds=1)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(ControlCollectives(channel, 0, 5.0).all_gather_object, "first")
        while coordinator.collectives.missing(0) != [1]:
            time.sleep(0.001)
        assert ControlCollectives(channel, 1, 5.0).all_gather_object("again") == ["first", "again"]
        assert waiting.result(5) == ["first", "again"]


def test_ranks_must_agree_on_the_tensor_parallel_size():
    channel = LocalChannel(Coordinator(4))

    def register(rank, size):
        sender = Sender(rank=rank, replica=rank // size, generation=0)
        channel.call(RegisterRank(sender=sender, tensor_parallel_size=size), timeout_seconds=1)

    register(0, 2)
    with pytest.raises(ConfigurationError, match="rank 3 uses tensor_parallel_size=4, the others use 2"):
        register(3, 4)


# Strangers and other versions


def _connect(server):
    host, port = server.address.split(":")
    connection = socket.create_connection((host, int(port)), timeout=10)
    connection.settimeout(10)
    return connection


def _received(connection):
    """All that comes until the other side closes."""
    data = b""
    with contextlib.suppress(ConnectionResetError):  # it closes although more was sent
        while piece := connection.recv(4096):
            data += piece
    return data


@pytest.mark.parametrize(
    ("garbage", "text"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", r"not a gpuorch handshake: it begins with b'GET / HTTP/1'"),
        (b"gpuorch\n\xff\xff\xff\xff", r"a gpuorch handshake of 4294967295 bytes is longer than 4096"),
        (b"gpuorch\n\0\0\0\x02{}", r"a malformed gpuorch handshake: Object missing required field `peer`"),
        (b"gpuorch\n\0\0\0\x04\xff\xfe{}", r"a malformed gpuorch handshake"),
    ],
)
def test_who_sends_garbage_is_refused_in_one_line_and_others_are_served(server, caplog, garbage, text):
    with _connect(server) as connection:
        connection.sendall(garbage)
        assert _received(connection) == b""
    (record,) = [record for record in caplog.records if record.levelname == "WARNING"]
    assert re.search(text, record.getMessage())
    assert "\n" not in record.getMessage()
    channel = RemoteChannel(server.address, RANK, "secret")
    assert _echo(channel) == b"yx"
    channel.close()


def test_a_malformed_request_is_refused_and_the_connection_goes_on(server, caplog):
    channel = RemoteChannel(server.address, RANK, "secret")
    connection = channel._connect(time.monotonic() + 10)
    for number, body in enumerate([msgspec.msgpack.encode({"type": "Gathering"}), b"\xc1"]):
        connection.sendall(struct.pack("!IQ", number, len(body)) + body)
        answer = channel._receive(connection, number, time.monotonic() + 10)
        with pytest.raises(ProtocolError, match="a malformed request"):
            decode_answer(answer, Lookup(key="a"))
    assert "rank 0 is refused: a malformed request was received: Gathering.type: Invalid value" in caplog.text
    channel._idle.append(connection)
    assert _echo(channel) == b"yx"
    channel.close()


def test_a_peer_of_another_version_is_refused_by_name_on_both_sides(server, caplog, monkeypatch):
    theirs = handshake.frame(Greeting(peer=Peer("node", 3), port=server.port, protocol=99, release="9.9.9"))
    with _connect(server) as connection:
        connection.sendall(theirs)
        answer = _received(connection)
    (record,) = [record for record in caplog.records if record.levelname == "ERROR"]
    said = record.getMessage()
    assert "node 3 at 127.0.0.1" in said
    assert f"speaks control protocol 99 (lightning_gpuorch 9.9.9), this process speaks {PROTOCOL_VERSION}" in said
    assert "\n" not in said
    # What it reads of the answer, if it does as we do.
    monkeypatch.setattr(handshake, "PROTOCOL_VERSION", 99)
    with pytest.raises(
        ProtocolVersionError, match=rf"coordinator 0 at here speaks control protocol {PROTOCOL_VERSION} .* speaks 99 "
    ) as error:
        handshake.read(Introduction, answer[handshake.PREAMBLE.size :], "here")
    assert error.value.exit_code == EXIT_CONFIGURATION


def test_a_version_is_read_of_a_handshake_with_fields_that_are_not_known(server, caplog):
    data = b'{"peer":{"role":"node","rank":1,"rack":4},"protocol":99,"release":"3.0","key":{"proof":[1]}}'
    with _connect(server) as connection:
        connection.sendall(handshake.PREAMBLE.pack(handshake.MAGIC, len(data)) + data)
        assert _received(connection).startswith(handshake.MAGIC)
    assert "node 1 at" in caplog.text
    assert "protocol 99" in caplog.text


def test_a_coordinator_of_another_version_is_not_asked_again():
    welcome = handshake.frame(Introduction(peer=handshake.COORDINATOR, protocol=7, release="7.0"))
    with listener(welcome) as address:
        channel = RemoteChannel(address, RANK, "secret")
        with pytest.raises(ProtocolVersionError, match=rf"coordinator 0 at {address} speaks control protocol 7 .*7\.0"):
            channel.call(Lookup(key="a"), timeout_seconds=10)


def test_what_is_no_coordinator_is_named():
    with listener(b"HTTP/1.1 400 Bad Request\r\n\r\n") as address:
        channel = RemoteChannel(address, RANK, "secret")
        with pytest.raises(ProtocolError, match=rf"no gpuorch coordinator listens on {address}: .* b'HTTP/1.1 400'"):
            channel.call(Lookup(key="a"), timeout_seconds=10)


def test_a_message_that_is_too_large_is_refused_where_it_is_sent(server, monkeypatch):
    monkeypatch.setattr(transport, "MAX_MESSAGE_BYTES", 1000)
    channel = RemoteChannel(server.address, RANK, "secret")
    with pytest.raises(ProtocolError, match="exceeds the limit of 1000"):
        _echo(channel, b"x" * 1001)
    channel.close()


def test_a_coordinator_that_does_not_know_the_token_is_not_served():
    server = ControlServer(Echo(), token="another")
    try:
        with pytest.raises(AuthenticationError):
            _echo(RemoteChannel(server.address, RANK, "secret"))
    finally:
        server.close()


def test_neither_the_token_nor_a_proof_that_can_be_used_again_travels(server):
    said = bytearray()

    def proof_for(nonce):
        ours = Greeting(peer=RANK, port=server.port, nonce=nonce)
        with _connect(server) as connection:
            connection.sendall(handshake.frame(ours))
            theirs = handshake.read(Greeting, _one_frame(connection), "here")
            shown = handshake.proof("secret", ours, theirs)
            said.extend(handshake.frame(shown))
            return shown

    shown = proof_for("n" * 32)
    assert b"secret" not in said
    ours = Greeting(peer=RANK, port=server.port, nonce="n" * 32)
    with _connect(server) as connection:  # the same words again, to another nonce of the coordinator's
        connection.sendall(handshake.frame(ours))
        _one_frame(connection)
        connection.sendall(handshake.frame(shown))
        assert handshake.read_proof(_one_frame(connection)) == handshake.Proof("")
        assert not connection.recv(1)


def test_a_process_in_between_cannot_pass_the_proofs_on(server, caplog):
    """Who can write to torchrun's store could send a rank to a port of theirs, and speak to the coordinator in its name."""
    with socket.create_server(("127.0.0.1", 0)) as theirs, ThreadPoolExecutor(1) as pool:
        channel = RemoteChannel(f"127.0.0.1:{theirs.getsockname()[1]}", RANK, "secret")
        calling = pool.submit(_echo, channel)
        rank, _ = theirs.accept()
        with rank, _connect(server) as coordinator:
            for sender, receiver in ((rank, coordinator), (coordinator, rank), (rank, coordinator)):
                data = _one_frame(sender)
                receiver.sendall(handshake.PREAMBLE.pack(handshake.MAGIC, len(data)) + data)
            assert handshake.read_proof(_one_frame(coordinator)) == handshake.Proof("")
            assert not coordinator.recv(1)
        theirs.close()
        with pytest.raises(ControlPlaneError):
            calling.result(60)
    assert "something in between passes the connection on" in caplog.text


def test_idle_strangers_neither_stay_nor_keep_others_out(server, monkeypatch, caplog):
    monkeypatch.setattr(control_server, "MAX_STRANGERS", 8)
    monkeypatch.setattr(control_server, "HANDSHAKE_SECONDS", 0.5)
    idle = [_connect(server) for _ in range(100)]
    try:
        channel = RemoteChannel(server.address, RANK, "secret")
        assert _echo(channel) == b"yx"
        channel.close()
        for connection in idle:
            connection.settimeout(10)
            try:
                assert connection.recv(1) == b"", "closed within the time for a handshake"
            except ConnectionResetError:
                continue
        (said,) = [record.getMessage() for record in caplog.records if "is refused" in record.getMessage()]
        assert said.startswith("the connection from 127.0.0.1:")
    finally:
        for connection in idle:
            connection.close()


def test_what_a_stranger_sends_is_not_kept(server):
    with _connect(server) as connection:
        connection.settimeout(5)
        sent = 0
        with contextlib.suppress(ConnectionError, TimeoutError):
            while sent < 64 * 2**20:
                sent += connection.send(b"\0" * 65536)
        assert sent < 16 * 2**20, "what the kernel's buffers take"


def _one_frame(connection):
    connection.settimeout(10)
    data = b""
    while len(data) < handshake.PREAMBLE.size:
        data += connection.recv(handshake.PREAMBLE.size - len(data))
    length, body = handshake.length_of(data), b""
    while len(body) < length:
        body += connection.recv(length - len(body))
    return body


def test_a_coordinator_that_was_started_again_is_told_from_the_one_that_was_joined(caplog):
    server = ControlServer(Echo(), token="secret", job="run-2")
    try:
        for job in ("", "run-2"):
            channel = RemoteChannel(server.address, RANK, "secret", job=job)
            assert _echo(channel) == b"yx"
            channel.close()
        with pytest.raises(
            OtherJobError, match=r"coordinator 0 at .* belongs to run-2, and this process to run-1"
        ) as error:
            _echo(RemoteChannel(server.address, RANK, "secret", job="run-1"))
        assert error.value.exit_code == EXIT_RESUMABLE
        with pytest.raises(AuthenticationError):  # who does not know the token is told nothing of jobs
            _echo(RemoteChannel(server.address, RANK, "guess", job="run-1"))
    finally:
        server.close()
    assert re.search(r"rank 0 at .* belongs to run-1, and this process to run-2", caplog.text)


def test_a_closed_server_cancels_no_request_of_a_coordinator():
    coordinator = Coordinator(1)
    server = ControlServer(coordinator)
    channel = RemoteChannel(server.address, RANK, connect_timeout_seconds=0.1)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(channel.call, Lookup(key="a"), timeout_seconds=10)
        deadline = time.monotonic() + 10
        while not coordinator._key_values._lookups:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        server.close()
        coordinator.handle(Publish(key="a", value=1)).result(0)
        with pytest.raises(ControlPlaneError, match="cannot be reached"):
            waiting.result(10)
