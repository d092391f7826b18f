"""Ranks that vanish where no supervisor watches, with a real server and real connections."""

import time

import pytest

from lightning_gpuorch.control import disconnects
from lightning_gpuorch.control.coordinator import Coordinator
from lightning_gpuorch.control.disconnects import Disconnects
from lightning_gpuorch.control.handshake import Peer
from lightning_gpuorch.control.messages.base import Sender
from lightning_gpuorch.control.messages.ranks import RegisterRank, UnregisterRank
from lightning_gpuorch.control.server import ControlServer
from lightning_gpuorch.control.transport import RemoteChannel


@pytest.fixture
def job(monkeypatch):
    monkeypatch.setattr(disconnects, "GONE_SECONDS", 0.5)
    coordinator = Coordinator(3)
    server = ControlServer(coordinator, token="secret")
    channels = {rank: RemoteChannel(server.address, Peer("rank", rank), "secret") for rank in (1, 2)}
    for rank, channel in channels.items():
        sender = Sender(rank=rank, replica=rank, generation=0)
        channel.call(RegisterRank(sender=sender, tensor_parallel_size=1), timeout_seconds=10)
    watch = Disconnects(coordinator, server.connected_ranks, give_up_seconds=1.0)
    yield coordinator, server, channels, watch
    watch.close()
    for channel in channels.values():
        channel.close()
    server.close()


def test_who_is_connected_is_waited_for_and_who_is_gone_is_not(job):
    _, server, channels, watch = job
    assert server.connected_ranks() == {1, 2}
    assert watch._left(0.5) == [1, 2]
    channels[1].close()
    channels[2].call(UnregisterRank(rank=2), timeout_seconds=10)
    began = time.monotonic()
    assert watch.outlive_the_others(timeout_seconds=30) == []
    assert time.monotonic() - began < 10


def test_a_living_rank_is_waited_for_until_the_time_is_over(job):
    _, _, channels, watch = job
    channels[1].close()
    assert watch.outlive_the_others(timeout_seconds=2.0) == [2]


def test_a_rank_that_is_gone_for_long_is_given_up_and_others_are_not(job):
    coordinator, _, channels, _ = job
    channels[2].close()
    deadline = time.monotonic() + 20
    while not coordinator.retired:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert coordinator.retired == {2}
