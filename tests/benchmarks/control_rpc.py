"""Measures one lease request over a real socket, and the memory of the coordinator.

Run as ``python -m tests.benchmarks.control_rpc [REQUESTS]``; prints one JSON line for TCP and one for a unix socket: the
median and the 99th percentile in microseconds, and the resident memory in MiB of the coordinator's process before and after.
"""

from __future__ import annotations

import json
import multiprocessing
import statistics
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory

from lightning_gpuorch.control.addresses import unix_address
from lightning_gpuorch.control.coordinator import Coordinator
from lightning_gpuorch.control.handshake import Peer
from lightning_gpuorch.control.messages.base import Sender
from lightning_gpuorch.control.messages.leases import Lease, NextChunk, OpenJob
from lightning_gpuorch.control.server import ControlServer
from lightning_gpuorch.control.transport import RemoteChannel
from lightning_gpuorch.predictions.storage.layout import LoaderLayout
from lightning_gpuorch.predictions.storage.manifest import Manifest


def _resident_mib() -> float:
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmRSS"].split()[0]) / 1024


def _serve(pipe: Connection, listen_on: str) -> None:
    server = ControlServer(Coordinator(1), listen_on, token="secret")
    pipe.send((server.address, _resident_mib()))
    pipe.recv()
    pipe.send(_resident_mib())
    server.close()


class _Rank:
    """A rank that opens a job and asks for chunk after chunk."""

    def __init__(self, address: str, directory: str, num_chunks: int):
        self._sender = Sender(rank=0, replica=0, generation=0)
        self._channel = RemoteChannel(address, Peer("rank", 0), "secret")
        layout = LoaderLayout(unit="sample", num_units=num_chunks, batch_size=1, chunk_size=1)
        manifest = Manifest(loaders=[layout]).to_dict()
        request = OpenJob(
            sender=self._sender, job=0, directory=directory, storage_options={}, ephemeral=False, manifest=manifest,
            part_bytes=2**26, part_seconds=30.0, resume_check="all",
        )  # fmt: skip
        self._channel.call(request, timeout_seconds=30)

    def next_chunk(self, sequence: int) -> int:
        request = NextChunk(
            sender=self._sender, job=0, loader=0, sequence=sequence, block=False, seconds_per_sample=0.001
        )
        lease = self._channel.call(request, timeout_seconds=30)
        assert isinstance(lease, Lease)
        return lease.chunk

    def close(self) -> None:
        self._channel.close()


def main(num_requests: int) -> None:
    with TemporaryDirectory() as directory:
        for kind, listen_on in (("tcp", "127.0.0.1"), ("unix", unix_address(Path(directory)))):
            if listen_on is not None:
                print(json.dumps({"kind": kind, **measure(listen_on, num_requests)}))


def measure(listen_on: str, num_requests: int) -> dict[str, float]:
    """Figures of a coordinator that listens there."""
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=_serve, args=(theirs, listen_on), daemon=True)
    process.start()
    address, before_mib = ours.recv()
    with TemporaryDirectory() as directory:
        rank = _Rank(address, f"{directory}/out", num_requests)
        microseconds = []
        for sequence in range(num_requests):
            began = time.perf_counter()
            assert rank.next_chunk(sequence) == sequence
            microseconds.append(1e6 * (time.perf_counter() - began))
        rank.close()
    ours.send(None)
    after_mib = ours.recv()
    process.join(10)
    microseconds.sort()
    figures = {
        "median_us": statistics.median(microseconds),
        "p99_us": microseconds[int(0.99 * num_requests)],
        "coordinator_mib": before_mib,
        "coordinator_after_mib": after_mib,
    }
    return {name: round(value, 1) for name, value in figures.items()}


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 5000)
