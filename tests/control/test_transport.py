"""The wire and the collectives, with real sockets and threads."""

import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from lightning_gpuorch.control.collectives import ControlCollectives
from lightning_gpuorch.control.coordinator import Coordinator
from lightning_gpuorch.control.transport import ControlServer, LocalChannel, Message, RemoteChannel
from lightning_gpuorch.errors import (
    CollectiveMismatchError,
    ConfigurationError,
    ControlPlaneError,
    ControlPlaneTimeoutError,
)


class Echo:
    """Answers at once, later, or never."""

    def __init__(self):
        self.release = threading.Event()

    def handle(self, request):
        future = Future()
        if request.header["op"] == "echo":
            future.set_result(Message({"said": request.header["text"]}, request.payload[::-1]))
        elif request.header["op"] == "later":
            threading.Thread(target=lambda: (self.release.wait(10), future.set_result(Message({})))).start()
        return future


@pytest.fixture
def server():
    echo = Echo()
    server = ControlServer(echo, token="secret")
    server.echo = echo
    yield server
    echo.release.set()
    server.close()


def test_payloads_of_every_size_come_back(server):
    channel = RemoteChannel(server.address, "secret")
    for size in (0, 1, 65_537, 5 * 2**20):
        payload = bytes(range(256)) * (size // 256 + 1)
        answer = channel.call({"op": "echo", "text": "é\n"}, payload[:size], timeout_seconds=10)
        assert answer.header["said"] == "é\n"
        assert answer.payload == payload[:size][::-1]
    channel.close()


def test_a_waiting_request_holds_up_nobody(server):
    channel = RemoteChannel(server.address, "secret")
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(channel.call, {"op": "later"}, timeout_seconds=10)
        for _ in range(50):
            assert channel.call({"op": "echo", "text": "x"}, timeout_seconds=5).header["said"] == "x"
        assert not waiting.done()
        server.echo.release.set()
        waiting.result(5)
    channel.close()


def test_no_answer_is_a_timeout_that_names_the_request(server):
    channel = RemoteChannel(server.address, "secret")
    with pytest.raises(ControlPlaneTimeoutError, match="'never' was not answered .* within 0.2 s"):
        channel.call({"op": "never"}, timeout_seconds=0.2)
    assert channel.call({"op": "echo", "text": "still"}, timeout_seconds=5).header["said"] == "still"
    channel.close()


def test_a_stranger_is_not_served(server):
    channel = RemoteChannel(server.address, "guess", connect_timeout_seconds=0.3)
    with pytest.raises(ControlPlaneError, match="cannot be reached"):
        channel.call({"op": "echo", "text": "x"}, timeout_seconds=2)


def test_a_request_survives_the_loss_of_its_connection():
    coordinator = Coordinator(1)
    server = ControlServer(coordinator)
    channel = RemoteChannel(server.address, connect_timeout_seconds=10)
    channel.call({"op": "publish", "key": "a", "value": 1}, timeout_seconds=5)
    port = server.port
    server.close()
    again = threading.Timer(0.5, lambda: servers.append(ControlServer(coordinator, port=port)))
    servers = []
    again.start()
    assert channel.call({"op": "lookup", "key": "a"}, timeout_seconds=10).header["value"] == 1
    again.join()
    servers[0].close()
    channel.close()


def test_an_unreachable_head_is_named():
    channel = RemoteChannel("127.0.0.1:9", connect_timeout_seconds=0.2)
    with pytest.raises(ControlPlaneError, match="coordinator at 127.0.0.1:9 cannot be reached"):
        channel.call({"op": "echo"}, timeout_seconds=5)


def _ranks(count, work, coordinator=None):
    """Run ``work(collectives, rank)`` on threads, one per rank, over real sockets."""
    coordinator = coordinator or Coordinator(count)
    server = ControlServer(coordinator)
    channels = [RemoteChannel(server.address) for _ in range(count)]

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
        while coordinator.ledger.missing(0) != [1]:
            time.sleep(0.001)
        coordinator.ledger.retire([1])
        assert waiting.result(5) == ["here"]


def test_a_rank_that_has_left_is_named():
    coordinator = Coordinator(2)
    coordinator.ledger.leave(1, "has ended")
    with pytest.raises(CollectiveMismatchError, match="needs rank 1, which has ended"):
        ControlCollectives(LocalChannel(coordinator), 0, 5.0).barrier()


def test_ranks_must_agree_on_the_tensor_parallel_size():
    channel = LocalChannel(Coordinator(4))
    hello = {"op": "hello", "generation": 0}
    channel.call({**hello, "rank": 0, "tensor_parallel_size": 2}, timeout_seconds=1)
    with pytest.raises(ConfigurationError, match="rank 3 uses tensor_parallel_size=4, the others use 2"):
        channel.call({**hello, "rank": 3, "tensor_parallel_size": 4}, timeout_seconds=1)
