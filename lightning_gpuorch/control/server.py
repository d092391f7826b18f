"""The coordinator's side of the control plane: connections taken in, strangers kept out, requests handed on.

Before anything else a connection has to show, within a few seconds and some kilobytes, that it belongs to the job: by a
:mod:`~lightning_gpuorch.control.handshake`, within :mod:`~lightning_gpuorch.control.tls` where certificates are given. Then
it is served as :mod:`~lightning_gpuorch.control.transport` describes.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import ssl
import threading
import time
from concurrent.futures import Future
from typing import Any

from lightning_gpuorch.control import addresses, codec, handshake, tls
from lightning_gpuorch.control.addresses import UNIX
from lightning_gpuorch.control.handshake import COORDINATOR, Greeting, Peer
from lightning_gpuorch.control.tls import Certificates
from lightning_gpuorch.control.transport import PREFIX, Handler, check_size, encode, notice_silence
from lightning_gpuorch.errors import (
    AuthenticationError,
    ControlPlaneError,
    GPUOrchError,
    OtherJobError,
    ProtocolError,
    ProtocolVersionError,
)

log = logging.getLogger(__name__)

HANDSHAKE_SECONDS = 5.0
"""Until then a connection has to have proven that it belongs to the job."""
MAX_UNREAD_BYTES = 2**13
"""The most that one can have sent before."""
MAX_STRANGERS = 64
"""Connections that have not; one more closes the oldest of them. The kernel keeps those that wait to be accepted."""
ACCEPTS_AT_ONCE, ACCEPTS_PER_SECOND = 512, 100
"""Connections are taken in at this rate, after so many at once. Ranks keep theirs, so it matters to strangers alone."""
_REFUSALS_SECONDS = 60.0
"""Refused strangers are told so often."""


class ControlServer:
    """Serves a handler to all ranks of a job, on a thread of its own.

    Args:
        handler: Answers the requests.
        host: Interface to listen on, or a whole address, see :mod:`~lightning_gpuorch.control.addresses`.
        port: Port to listen on; 0 takes a free one, and is meant where ``host`` is a whole address.
        token: Shared secret; a connection that does not prove to know it is closed.
        job: Name of the run; processes that belong to another one are refused.
        certificates: Encrypt connections, unless the address is a unix socket.
    """

    def __init__(
        self,
        handler: Handler,
        host: str = "127.0.0.1",
        port: int = 0,
        token: str = "",
        job: str = "",
        certificates: Certificates | None = None,
    ):
        self._handler, self._token, self._job = handler, token, job
        encrypted = certificates if not host.startswith(UNIX) else None
        self._tls = encrypted.context(server_side=True) if encrypted is not None else None
        self._certificate = encrypted.fingerprint() if encrypted is not None else ""
        self._peers: dict[asyncio.StreamReader, Peer] = {}
        self._strangers: dict[asyncio.Task[Any], None] = {}
        self._refusals, self._versions = Refusals(), Refusals(logging.ERROR)
        self._loop = asyncio.new_event_loop()
        self._started: Future[None] = Future()
        wanted = host if host.startswith(UNIX) else f"{host}:{port}"
        self._thread = threading.Thread(target=self._run, args=(wanted,), name="gpuorch-control", daemon=True)
        self._thread.start()
        self._started.result(timeout=30)

    def connected_ranks(self) -> set[int]:
        """Ranks whose worker has a connection open."""
        return {p.rank for reader, p in list(self._peers.items()) if p.role == "rank" and not reader.at_eof()}

    def close(self) -> None:
        """Stop serving; open connections are dropped."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stop.set)
            self._thread.join(10)

    def _run(self, wanted: str) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            listening = addresses.listen(wanted)
        except OSError as error:
            self._started.set_exception(
                ControlPlaneError(
                    f"the coordinator cannot listen on {wanted}: {error}; choose another port or address."
                )
            )
        else:
            # Before anyone is greeted.
            self.address = (
                wanted if wanted.startswith(UNIX) else f"{wanted.rsplit(':', 1)[0]}:{listening.getsockname()[1]}"
            )
            """For :class:`RemoteChannel`."""
            self.port = addresses.port_of(self.address)
            with listening:
                self._loop.run_until_complete(self._serve(listening))
            if wanted.startswith(UNIX):
                with contextlib.suppress(FileNotFoundError):  # the directory may be gone with it
                    os.unlink(wanted.removeprefix(UNIX))
        finally:
            self._loop.close()

    async def _serve(self, listening: socket.socket) -> None:
        self._stop = asyncio.Event()
        connections: set[asyncio.Task[None]] = set()
        listening.setblocking(False)
        accepting = asyncio.ensure_future(self._accept(listening, connections))
        self._started.set_result(None)
        await self._stop.wait()
        accepting.cancel()
        for task in list(connections):
            task.cancel()
        await asyncio.gather(accepting, *connections, return_exceptions=True)

    async def _accept(self, listening: socket.socket, connections: set[asyncio.Task[None]]) -> None:
        """Take in connections, not faster than strangers can cost little; the kernel keeps the others waiting."""
        allowed, since = float(ACCEPTS_AT_ONCE), time.monotonic()
        while True:
            try:
                connection, name = await self._loop.sock_accept(listening)
            except OSError as error:  # no descriptors are left, say: those that are served go on
                log.warning("a connection cannot be accepted: %s", error)
                await asyncio.sleep(1.0)
                continue
            address = f"{name[0]}:{name[1]}" if isinstance(name, tuple) else "this host"
            task = asyncio.ensure_future(self._connection(connection, address))
            connections.add(task)
            task.add_done_callback(connections.discard)
            now = time.monotonic()
            allowed, since = min(ACCEPTS_AT_ONCE, allowed + (now - since) * ACCEPTS_PER_SECOND) - 1, now
            if allowed < 1:
                await asyncio.sleep((1 - allowed) / ACCEPTS_PER_SECOND)

    async def _connection(self, connection: socket.socket, address: str) -> None:
        try:
            notice_silence(connection)
            uid = addresses.other_user(connection)
        except OSError as error:
            connection.close()
            log.debug("the connection from %s has ended: %s", address, error)
            return
        if uid is not None:
            self._refusals.add(address, f"it is of another user, uid {uid}")
            connection.close()
            return
        admitted = await self._admit(connection, address)
        if admitted is None:
            return
        peer, reader, writer = admitted
        self._peers[reader] = peer
        try:
            while True:
                number, length = PREFIX.unpack(await reader.readexactly(PREFIX.size))
                check_size(length)
                writer.write(await self._answer(peer, number, await reader.readexactly(length)))
                await writer.drain()
        except ProtocolError as error:
            log.warning("the connection from %s is closed: %s", address, error)
        except (asyncio.IncompleteReadError, OSError) as error:
            # The process is gone: its supervisor decides what follows.
            log.debug("the connection from %s has ended: %s", address, error)
        finally:
            self._peers.pop(reader, None)
            writer.close()

    async def _admit(
        self, connection: socket.socket, address: str
    ) -> tuple[Peer, asyncio.StreamReader, asyncio.StreamWriter] | None:
        """Who connects; None, and the connection closed, if it is not served."""
        this = asyncio.current_task()
        assert this is not None
        if len(self._strangers) >= MAX_STRANGERS:
            oldest = next(iter(self._strangers))
            del self._strangers[oldest]
            oldest.cancel()
            self._refusals.add(address, f"{MAX_STRANGERS} others had not proven either that they belong to the job")
        self._strangers[this] = None
        peer = writer = None
        deadline = self._loop.time() + HANDSHAKE_SECONDS
        try:
            reader, writer = await asyncio.wait_for(self._open(connection), HANDSHAKE_SECONDS)
            seconds = deadline - self._loop.time()
            peer = await asyncio.wait_for(self._shake_hands(reader, writer, address), seconds)
        except asyncio.TimeoutError:
            self._refusals.add(address, f"no handshake within {HANDSHAKE_SECONDS:g} s")
        except ProtocolVersionError as error:
            self._versions.add(address, str(error))
        except OtherJobError as error:
            log.error("a connection is refused: %s", error)
        except (AuthenticationError, ProtocolError) as error:
            self._refusals.add(address, str(error))
        except ssl.SSLError as error:
            self._refusals.add(address, f"no TLS connection: {error}")
        except (asyncio.IncompleteReadError, OSError) as error:
            log.debug("the connection from %s has ended: %s", address, error)
        else:
            return peer, reader, writer
        finally:
            self._strangers.pop(this, None)
            if peer is None and writer is not None:
                writer.close()
            elif peer is None:
                connection.close()
        return None

    async def _open(self, connection: socket.socket) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Streams over a connection, encrypted if this server is."""
        # A stranger's bytes are taken in up to twice the limit.
        reader = asyncio.StreamReader(limit=2**16, loop=self._loop)
        protocol = asyncio.StreamReaderProtocol(reader, loop=self._loop)
        if self._tls is None:
            transport, _ = await self._loop.connect_accepted_socket(lambda: protocol, connection)
            return reader, asyncio.StreamWriter(transport, protocol, reader, self._loop)
        await self._refuse_without_tls(connection)
        with connection.dup() as spare:
            try:
                transport, _ = await self._loop.connect_accepted_socket(lambda: protocol, connection, ssl=self._tls)
            except ssl.SSLError:
                with contextlib.suppress(OSError):
                    spare.send(tls.ALERT)  # asyncio closes without a word, which could mean anything
                raise
        return reader, asyncio.StreamWriter(transport, protocol, reader, self._loop)

    async def _refuse_without_tls(self, connection: socket.socket) -> None:
        """Tell a process of this project that it lacks TLS: it would not understand an alert.

        Raises:
            AuthenticationError: The other side begins without TLS.
        """
        readable: asyncio.Future[None] = self._loop.create_future()
        self._loop.add_reader(connection, _set, readable)
        try:
            await readable
        finally:
            self._loop.remove_reader(connection)
        if connection.recv(len(handshake.MAGIC), socket.MSG_PEEK) == handshake.MAGIC:
            connection.recv(
                MAX_UNREAD_BYTES
            )  # what is left unread would reset the connection before the answer is read
            with contextlib.suppress(OSError):
                connection.send(handshake.frame(self._greeting()))
            raise AuthenticationError(f"it begins without TLS, and this process uses it. {tls.ADVICE}")

    def _greeting(self) -> Greeting:
        return Greeting(peer=COORDINATOR, port=self.port, job=self._job, certificate=self._certificate)

    async def _shake_hands(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, address: str) -> Peer:
        greeting = self._greeting()
        data = await _frame(reader, writer)
        try:
            other = handshake.read(Greeting, data, address)
        except ProtocolVersionError:
            writer.write(handshake.frame(greeting))  # with our version: the other side sees the same
            await writer.drain()
            raise
        writer.write(handshake.frame(greeting))
        shown = handshake.read_proof(await _frame(reader, writer))
        try:
            handshake.check_proof(shown, self._token, other, greeting, address)
        except AuthenticationError:
            writer.write(handshake.frame(handshake.Proof("")))
            await writer.drain()
            raise
        writer.write(handshake.frame(handshake.proof(self._token, greeting, other)))
        await writer.drain()
        handshake.check_job(greeting, other, address)  # the other side sees the same
        return other.peer

    async def _answer(self, peer: Peer, number: int, data: bytes) -> bytearray:
        try:
            request = codec.decode_request(data)
            # Shielded: a connection that ends must not cancel what other ranks wait for as well.
            return encode(number, await asyncio.shield(asyncio.wrap_future(self._handler.handle(request))))
        except ProtocolError as error:
            log.warning("%s is refused: %s", peer, error)
            return encode(number, codec.refused(error))
        except GPUOrchError as error:
            return encode(number, codec.refused(error))


class Refusals:
    """Tells of strangers, one line a minute however many there are."""

    def __init__(self, level: int = logging.WARNING) -> None:
        self._count, self._told_at, self._level = 0, -_REFUSALS_SECONDS, level

    def add(self, address: str, reason: str) -> None:
        """A connection was refused."""
        self._count += 1
        now = time.monotonic()
        if now - self._told_at < _REFUSALS_SECONDS:
            return
        more = f" ({self._count - 1} more since the last such line)" if self._count > 1 else ""
        log.log(self._level, "the connection from %s is refused%s: %s", address, more, reason)
        self._count, self._told_at = 0, now


def _set(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


async def _frame(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bytes:
    preamble = await reader.readexactly(handshake.PREAMBLE.size)
    if preamble.startswith(tls.HELLO):
        writer.write(tls.ALERT)
        raise ProtocolError(f"it begins with TLS, and this process does not use it. {tls.ADVICE}")
    return await reader.readexactly(handshake.length_of(preamble))
