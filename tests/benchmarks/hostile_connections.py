"""What 1,000 hostile connections cost a job: its steps per second with and without them, in turns.

``python -m tests.benchmarks.hostile_connections [--rounds 6] [--seconds 5]`` runs a job of two nodes over TCP. In every other
period a process of its own keeps so many connections open at the port of the control plane: idle ones, ones that send half of
a greeting, and ones that send garbage; those that are closed are made again. Prints one JSON line.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import selectors
import socket
import statistics
import tempfile
import time
from collections.abc import Iterator
from multiprocessing.synchronize import Event
from pathlib import Path

from lightning_gpuorch.control import handshake
from tests.conftest import Runner
from tests.support import open_sockets

WORDS = (b"", handshake.MAGIC[:4], bytes(1000))


def flood(port: int, count: int, on: Event, end: Event) -> None:
    """Keep ``count`` connections open while ``on`` is set."""
    while not end.is_set():
        if not on.wait(0.1):
            continue
        with contextlib.ExitStack() as stack, selectors.DefaultSelector() as selector:
            alive: set[socket.socket] = set()
            while on.is_set() and not end.is_set():
                for number in range(len(alive), count):
                    connection = stack.enter_context(socket.socket())
                    connection.setblocking(False)
                    connection.connect_ex(("127.0.0.1", port))
                    with contextlib.suppress(OSError):  # not connected yet
                        connection.send(WORDS[number % len(WORDS)])
                    selector.register(connection, selectors.EVENT_READ)
                    alive.add(connection)
                for key, _ in selector.select(0.05):
                    assert isinstance(key.fileobj, socket.socket)
                    with contextlib.suppress(OSError):
                        if key.fileobj.recv(4096):
                            continue
                    selector.unregister(key.fileobj)
                    alive.discard(key.fileobj)
                    key.fileobj.close()


def steps(notes: Path) -> Iterator[float]:
    """When each step was done, by the monotonic clock of the host."""
    for line in notes.read_text().splitlines():
        words = line.split()
        if len(words) == 4:
            yield float(words[2])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--connections", type=int, default=1000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        runner = Runner(Path(scratch))
        job = open_sockets.start("two nodes", runner, size=("--samples", 1_000_000))
        on, end = multiprocessing.Event(), multiprocessing.Event()
        attacker = multiprocessing.Process(target=flood, args=(job.port, options.connections, on, end))
        attacker.start()
        try:
            periods = []
            for _ in range(options.rounds):
                for hostile in (False, True):
                    (on.set if hostile else on.clear)()
                    time.sleep(0.5)
                    began = time.monotonic()
                    time.sleep(options.seconds)
                    periods.append((hostile, began, time.monotonic()))
        finally:
            end.set()
            attacker.join(10)
        done = list(steps(Path(scratch) / "notes.txt"))
        runner.close()
    rates: dict[bool, list[float]] = {False: [], True: []}
    for hostile, began, ended in periods:
        rates[hostile].append(sum(began <= at < ended for at in done) / (ended - began))
    figures = {
        "calm_steps_per_second": statistics.median(rates[False]),
        "hostile_steps_per_second": statistics.median(rates[True]),
        "ratio": statistics.median(b / a for a, b in zip(rates[False], rates[True], strict=True)),
        "ratio_of_sums": sum(rates[True]) / sum(rates[False]),
    }
    print(json.dumps({name: round(value, 3) for name, value in figures.items()}), rates)


if __name__ == "__main__":
    main()
