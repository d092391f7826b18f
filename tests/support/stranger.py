"""A process of another user, or of another host, that tries to get something from a job; run as a program.

It is told on standard input, as JSON, what it can find out for itself on a real machine: addresses, process numbers, paths.
As root it becomes another user first. It prints, as JSON, how many attempts it has made of each kind and what has come of
them: ``through`` must be empty. ``python -m tests.support.stranger < targets.json``
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import random
import socket
import struct
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

from torch.distributed import TCPStore

from lightning_gpuorch.control import addresses, handshake
from lightning_gpuorch.control.handshake import COORDINATOR, Greeting, Introduction, Peer
from lightning_gpuorch.control.messages.base import Request, Sender
from lightning_gpuorch.control.messages.collectives import Gather
from lightning_gpuorch.control.messages.leases import NextChunk
from lightning_gpuorch.control.messages.nodes import AbortJob, GetJobState
from lightning_gpuorch.control.messages.ranks import DrainJob, Lookup
from lightning_gpuorch.control.shared_secret import CoordinatorPlace, read_secret
from lightning_gpuorch.control.transport import RemoteChannel, encode
from lightning_gpuorch.errors import GPUOrchError

UID = 12345
SENDER = Sender(rank=0, replica=0, generation=0)
REQUESTS: tuple[Request[Any], ...] = (
    NextChunk(sender=SENDER, job=0, loader=0, sequence=0, block=False),
    Lookup(key="store/replica-0/0"),
    GetJobState(node=0, supervisor="guess"),
    DrainJob(),
    AbortJob(code=0),
)


class Bomb:
    """Its pickle leaves a file where it is loaded."""

    def __init__(self, path: str):
        self._path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return open, (self._path, "w")


class Stranger:
    """What it tries, and what has come of it.

    Args:
        targets: ``ports`` and ``sockets`` (paths) of coordinators, ``stores`` of launchers, ``others`` (ports of ranks),
            ``pids``, ``paths``, and ``bomb``, a file that must not appear.
        seed: Of the order and of random bytes.
    """

    def __init__(self, targets: dict[str, Any], seed: int = 0):
        self._targets, self._rng = targets, random.Random(seed)
        self.attempts: Counter[str] = Counter()
        self.through: list[str] = []
        self.seen: list[str] = []
        """Values that lay open to anyone, for the other side to look for secrets in."""

    def kinds(self) -> Iterator[tuple[str, Callable[[], str | None]]]:
        """Each kind of attempt, at each target; an attempt returns what it got, if anything."""
        targets, bomb = self._targets, self._targets["bomb"]
        doors = [*targets["ports"], *(f"unix:{path}" for path in targets["sockets"])]
        for door in doors:
            for token in ("", "guess", "0" * 32):
                request = self._rng.choice(REQUESTS)
                yield f"request, {'wrong' if token else 'no'} token", lambda d=door, t=token, r=request: ask(d, t, r)  # type: ignore[misc]
            gather = Gather(number=0, kind="gather", rank=1, payload=pickle.dumps(Bomb(bomb)))
            yield "collective with a pickle", lambda d=door, r=gather: ask(d, "", r)  # type: ignore[misc]
            yield "pickle in place of a proof", lambda d=door, r=gather: skip_proof(d, r)  # type: ignore[misc]
            yield "handshake echoed", lambda d=door: echo(d)  # type: ignore[misc]
            yield "proof of another connection", lambda d=door: replay(d)  # type: ignore[misc]
            yield "older version", lambda d=door: older(d)  # type: ignore[misc]
            noise = self._rng.randbytes(self._rng.choice((1, 100, 5000)))
            for words in (noise, b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\x02\0\x01\0", pickle.dumps(Bomb(bomb))):
                yield "garbage", lambda d=door, w=words: say(d, w)  # type: ignore[misc]
            for prefix in (handshake.MAGIC + b"\xff" * 4, struct.pack("!IQ", 2**32 - 1, 2**64 - 1)):
                yield "huge frame", lambda d=door, w=prefix + bytes(2**20): say(d, w)  # type: ignore[misc]
            yield "half-open", lambda d=door: half_open(d)  # type: ignore[misc]
        for door in targets["others"]:
            for words in (self._rng.randbytes(64), bytes(4096), pickle.dumps(Bomb(bomb))):
                yield "garbage to a port of a rank", lambda d=door, w=words: leave(d, w)  # type: ignore[misc]
        for place in targets["stores"]:
            yield "store", lambda p=place: self._read_store(p)  # type: ignore[misc]
        for pid in targets["pids"]:
            for name in ("environ", "mem", "fd", "maps", "cwd"):
                yield "/proc", lambda p=f"/proc/{pid}/{name}": opened(p)  # type: ignore[misc]
        for path in targets["paths"]:
            yield "files", lambda p=path: opened(p)  # type: ignore[misc]

    def attack(self, count: int) -> None:
        """Make at least so many attempts at what answers, every kind at least once.

        Several at a time: a refused connection may be held for the 5 s that a handshake has.
        """
        local = ("files", "/proc")  # once each: they do not change
        attempts = list(self.kinds())
        while sum(kind not in local for kind, _ in attempts) < count:
            attempts += [(kind, attempt) for kind, attempt in self.kinds() if kind not in local]
        self._rng.shuffle(attempts)
        with ThreadPoolExecutor(max_workers=16) as pool:
            self.attempts.update(kind for kind, _ in attempts)
            outcomes = pool.map(_outcome, (attempt for _, attempt in attempts))
            self.through += [
                f"{kind}: {got}" for (kind, _), got in zip(attempts, outcomes, strict=True) if got is not None
            ]

    def _read_store(self, place: str) -> str | None:
        """A launcher's store is open to anyone; what matters is what lies in it."""
        host, port = place.rsplit(":", 1)
        store = TCPStore(host, int(port), is_master=False, timeout=timedelta(seconds=2), wait_for_workers=False)
        for key in store.list_keys():
            value = store.get(key)
            self.seen.append(value.decode(errors="replace"))
            if key.endswith("coordinator"):
                with contextlib.suppress(GPUOrchError):
                    return f"the secret {read_secret(CoordinatorPlace.read(value).secret_directory)}"
        return None


def _outcome(attempt: Callable[[], str | None]) -> str | None:
    """What an attempt got; refusals are nothing."""
    with contextlib.suppress(GPUOrchError, OSError, RuntimeError, EOFError):
        return attempt()
    return None


def ask(door: str, token: str, request: Request[Any]) -> str | None:
    """An honest client's words, without the token."""
    channel = RemoteChannel(door, Peer("rank", 0), token, connect_timeout_seconds=0.0)
    try:
        return repr(channel.call(request, timeout_seconds=3.0))
    finally:
        channel.close()


def say(door: str, words: bytes) -> str | None:
    """Bytes that belong to no conversation."""
    with _connected(door) as connection:
        with contextlib.suppress(OSError):
            connection.sendall(words)
        return _unless_refused(connection)


def skip_proof(door: str, request: Request[Any]) -> str | None:
    """An introduction, and then a request at once."""
    with _connected(door) as connection:
        connection.sendall(handshake.frame(_greeting(door)) + encode(1, request))
        return _unless_refused(connection)


def echo(door: str) -> str | None:
    """The coordinator's own words, sent back."""
    with _connected(door) as connection:
        connection.sendall(handshake.frame(_greeting(door)))
        theirs = _frame(connection)
        connection.sendall(handshake.PREAMBLE.pack(handshake.MAGIC, len(theirs)) + theirs)
        return _unless_refused(connection)


def replay(door: str) -> str | None:
    """The words of one connection on another: a nonce is good for one."""
    nonce = "0" * 32
    for _ in range(2):
        with _connected(door) as connection:
            ours = Greeting(peer=Peer("rank", 1), port=addresses.port_of(door), nonce=nonce)
            connection.sendall(handshake.frame(ours))
            theirs = handshake.read(Greeting, _frame(connection), door)
            nonce = theirs.nonce
            connection.sendall(handshake.frame(handshake.proof("guess", theirs, ours)))
            got = _unless_refused(connection)
            if got is not None:
                return got
    return None


def older(door: str) -> str | None:
    """A version that knew no proofs."""
    with _connected(door) as connection:
        connection.sendall(handshake.frame(Introduction(peer=Peer("rank", 0), protocol=1, release="0.1")))
        return _unless_refused(connection)


def leave(door: str, words: bytes) -> str | None:
    """Bytes to who may not answer at all."""
    with _connected(door) as connection:
        connection.sendall(words)
    return None


def half_open(door: str) -> str | None:
    """A connection that is left in the middle of a word."""
    with _connected(door) as connection:
        connection.sendall(handshake.MAGIC[:4])
    return None


def opened(path: str) -> str | None:
    """A file, a directory or a link that should be closed to others."""
    if os.path.islink(path):
        return os.readlink(path)
    if os.path.isdir(path):
        return repr(os.listdir(path))
    with open(path, "rb") as file:
        return repr(file.read(64)) if file.peek(1) else None  # a process that has ended has nothing


def _greeting(door: str) -> Greeting:
    return Greeting(peer=Peer("rank", 1), port=addresses.port_of(door))


@contextlib.contextmanager
def _connected(door: str) -> Iterator[socket.socket]:
    connection = addresses.connect(door, 5.0)
    connection.settimeout(8.0)  # the coordinator closes it before
    with connection:
        yield connection


def _frame(connection: socket.socket) -> bytes:
    def exactly(count: int) -> bytes:
        data = b""
        while len(data) < count:
            piece = connection.recv(count - len(data))
            if not piece:
                raise EOFError
            data += piece
        return data

    return exactly(handshake.length_of(exactly(handshake.PREAMBLE.size)))


def _unless_refused(connection: socket.socket) -> str | None:
    """What comes that is neither an introduction, nor an empty proof, nor the end."""
    while True:
        data = _frame(connection)
        with contextlib.suppress(GPUOrchError):
            if handshake.read(Introduction, data, "here").peer == COORDINATOR:
                continue
        if handshake.read_proof(data) != handshake.Proof(""):
            return repr(data)


def main() -> None:
    """Become another user, attack, and tell."""
    targets = json.load(sys.stdin)
    if os.geteuid() == 0:
        socket.getaddrinfo("127.0.0.1", 1)  # imports what the other user might not be able to read
        os.setgroups([])
        os.setgid(UID)
        os.setuid(UID)
    stranger = Stranger(targets)
    stranger.attack(targets["count"])
    if os.path.exists(targets["bomb"]):
        stranger.through.append("a pickle was loaded")
    print(json.dumps({"attempts": stranger.attempts, "through": stranger.through, "seen": stranger.seen}))


if __name__ == "__main__":
    main()
