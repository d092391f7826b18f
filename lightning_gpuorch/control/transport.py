"""How a request and its answer travel between a rank and the coordinator: length-prefixed frames with a deadline.

A frame is a JSON header and an opaque payload::

    uint32 header length | uint64 payload length | header (UTF-8 JSON) | payload

Why not a ``TCPStore``: its client has no receive timeout, a blocked call locks the client object, and ``set`` is not
acknowledged. Here each request is answered, has a deadline, and is safe to send again, because the coordinator treats a
repeated request as the same request.
"""

from __future__ import annotations

import asyncio
import hmac
import itertools
import json
import socket
import struct
import threading
import time
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Protocol

from lightning_gpuorch.errors import ControlPlaneError, ControlPlaneTimeoutError

_PREFIX = struct.Struct("!IQ")
MAX_HEADER_BYTES = 16 * 2**20
MAX_PAYLOAD_BYTES = 2 * 2**30
_SILENCE_SECONDS = 10
"""A peer whose kernel acknowledges nothing for so long is taken for unreachable, also while an answer is awaited."""

_SERVED_SECONDS = 1.0
"""A connection that lived so long was served; one that ends sooner was refused."""


@dataclass(frozen=True)
class Message:
    """A request or an answer.

    Attributes:
        header: JSON-serialisable fields.
        payload: Opaque bytes.
    """

    header: dict[str, Any]
    payload: bytes = b""


class Handler(Protocol):
    """Answers requests, at once or later; called from one thread at a time per connection."""

    def handle(self, request: Message) -> Future[Message]:
        """Take one request; resolve the future with the answer."""
        ...


def answered(header: dict[str, Any], payload: bytes = b"") -> Future[Message]:
    """A future that already holds its answer."""
    future: Future[Message] = Future()
    future.set_result(Message(header, payload))
    return future


def encode(message: Message) -> bytes:
    """Serialise one frame."""
    header = json.dumps(message.header, separators=(",", ":")).encode()
    return _PREFIX.pack(len(header), len(message.payload)) + header + message.payload


def _check_sizes(header_bytes: int, payload_bytes: int) -> None:
    if header_bytes > MAX_HEADER_BYTES or payload_bytes > MAX_PAYLOAD_BYTES:
        raise ControlPlaneError(
            f"a control-plane frame of {header_bytes} + {payload_bytes} bytes exceeds the limit of "
            f"{MAX_HEADER_BYTES} + {MAX_PAYLOAD_BYTES}; job-wide collectives are for small objects."
        )


class ControlServer:
    """Serves a handler to all ranks of a job over TCP, on a thread of its own.

    Args:
        handler: Answers the requests.
        host: Address to listen on.
        port: Port to listen on; 0 takes a free one.
        token: Shared secret; a connection that does not present it is closed.
    """

    def __init__(self, handler: Handler, host: str = "127.0.0.1", port: int = 0, token: str = ""):
        self._handler, self._token = handler, token
        self._ranks: dict[asyncio.StreamReader, int] = {}
        self._loop = asyncio.new_event_loop()
        self._started: Future[int] = Future()
        self._thread = threading.Thread(target=self._run, args=(host, port), name="gpuorch-control", daemon=True)
        self._thread.start()
        self.host, self.port = host, self._started.result(timeout=30)

    @property
    def address(self) -> str:
        """``host:port`` for :class:`RemoteChannel`."""
        return f"{self.host}:{self.port}"

    def connected_ranks(self) -> set[int]:
        """Ranks that have a connection open, by what they said of themselves in their requests."""
        return {rank for reader, rank in list(self._ranks.items()) if not reader.at_eof()}

    def close(self) -> None:
        """Stop serving; open connections are dropped."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stop.set)
            self._thread.join(10)

    def _run(self, host: str, port: int) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_until_complete(self._serve(host, port))
        except OSError as error:
            self._started.set_exception(
                ControlPlaneError(
                    f"the coordinator cannot listen on {host}:{port}: {error}; choose another port or address."
                )
            )
        finally:
            self._loop.close()

    async def _serve(self, host: str, port: int) -> None:
        self._stop = asyncio.Event()
        connections: set[asyncio.Task[None]] = set()

        def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.ensure_future(self._connection(reader, writer))
            connections.add(task)
            task.add_done_callback(connections.discard)

        server = await asyncio.start_server(accept, host, port, limit=2**20)
        self._started.set_result(server.sockets[0].getsockname()[1])
        await self._stop.wait()
        server.close()
        for task in list(connections):
            task.cancel()
        await asyncio.gather(*connections, return_exceptions=True)

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        _notice_silence(writer.get_extra_info("socket"))
        try:
            hello = await self._read(reader)
            if not hmac.compare_digest(str(hello.header.get("token")).encode(), self._token.encode()):
                return
            while True:
                request = await self._read(reader)
                if "rank" in request.header:
                    self._ranks[reader] = int(request.header["rank"])
                answer = await asyncio.wrap_future(self._handler.handle(request))
                header = dict(answer.header, id=request.header.get("id"))
                writer.write(encode(Message(header, answer.payload)))
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError, ControlPlaneError, ValueError):
            return  # the rank is gone, or it is not one of ours: its supervisor decides what follows
        finally:
            self._ranks.pop(reader, None)
            writer.close()

    @staticmethod
    async def _read(reader: asyncio.StreamReader) -> Message:
        header_bytes, payload_bytes = _PREFIX.unpack(await reader.readexactly(_PREFIX.size))
        _check_sizes(header_bytes, payload_bytes)
        header = json.loads(await reader.readexactly(header_bytes))
        return Message(header, await reader.readexactly(payload_bytes))


class Channel(Protocol):
    """Sends requests to the coordinator."""

    def call(self, header: dict[str, Any], payload: bytes = b"", *, timeout_seconds: float) -> Message:
        """Send one request and wait for its answer.

        Raises:
            ControlPlaneTimeoutError: No answer within ``timeout_seconds``.
            ControlPlaneError: The coordinator refused the request.
        """
        ...

    def close(self) -> None:
        """Release the connection."""
        ...


class LocalChannel:
    """A channel to a handler in the same process: no socket, no serialisation."""

    def __init__(self, handler: Handler):
        self._handler = handler

    def call(self, header: dict[str, Any], payload: bytes = b"", *, timeout_seconds: float) -> Message:
        """See :meth:`Channel.call`."""
        from concurrent.futures import TimeoutError as FutureTimeoutError

        future = self._handler.handle(Message(header, payload))
        try:
            return _checked(future.result(timeout_seconds), header)
        except FutureTimeoutError:
            raise ControlPlaneTimeoutError(
                f"request {header.get('op')!r} was not answered within {timeout_seconds:g} s."
            ) from None

    def close(self) -> None:
        """Nothing to release."""


class RemoteChannel:
    """A channel over TCP. Reconnects and repeats a request until its deadline.

    A deadline is for the answer of a coordinator that can be reached. While it cannot, the clock stands still and
    ``connect_timeout_seconds`` counts: a cut of the network shorter than that costs only its own length.

    Thread-safe: each request in flight has a connection of its own, so one that waits for others holds up nobody.

    Args:
        address: ``host:port`` of the coordinator.
        token: The job's shared secret.
        connect_timeout_seconds: How long the coordinator may be unreachable before a request fails.
    """

    def __init__(self, address: str, token: str = "", connect_timeout_seconds: float = 30.0):
        self.address = address
        self._token, self._connect_timeout_seconds = token, connect_timeout_seconds
        self._idle: list[socket.socket] = []
        self._ids = itertools.count(1)

    def call(self, header: dict[str, Any], payload: bytes = b"", *, timeout_seconds: float) -> Message:
        """See :meth:`Channel.call`."""
        _check_sizes(0, len(payload))
        deadline = time.monotonic() + timeout_seconds
        lost_since: float | None = None
        sent = 0.0
        number = next(self._ids)
        frame = encode(Message(dict(header, id=number), payload))
        while True:
            connection: socket.socket | None = None
            try:
                connection = self._idle.pop() if self._idle else self._connect(deadline)
                sent = time.monotonic()
                connection.settimeout(max(0.01, deadline - sent))
                connection.sendall(frame)
                answer = self._receive(connection, deadline)
                if answer.header.get("id") != number:
                    raise ConnectionError("answer to another request")
                self._idle.append(connection)
                return _checked(answer, header)
            except (OSError, struct.error) as error:
                _close(connection)
                now = time.monotonic()
                if isinstance(error, TimeoutError) and error.errno is None:  # our own clock, not the kernel's
                    raise ControlPlaneTimeoutError(
                        f"request {header.get('op')!r} was not answered by the coordinator at {self.address} within "
                        f"{timeout_seconds:g} s."
                    ) from None
                if lost_since is None or (connection is not None and now - sent > _SERVED_SECONDS):
                    lost_since = now
                if now - lost_since > self._connect_timeout_seconds:
                    raise ControlPlaneError(
                        f"the coordinator at {self.address} cannot be reached for {now - lost_since:.1f} s ({error}); "
                        "is its supervisor still running?"
                    ) from error
                time.sleep(0.05)
                deadline = time.monotonic() + timeout_seconds

    def close(self) -> None:
        """Close all idle connections."""
        while self._idle:
            self._idle.pop().close()

    def _connect(self, deadline: float) -> socket.socket:
        host, port = self.address.rsplit(":", 1)
        timeout = min(5.0, max(0.01, deadline - time.monotonic()))
        try:
            connection = socket.create_connection((host, int(port)), timeout=timeout)
        except TimeoutError as error:  # unreachable for now, which is not "no answer": try again
            raise ConnectionError(str(error)) from None
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        _notice_silence(connection)
        connection.sendall(encode(Message({"token": self._token})))
        return connection

    @staticmethod
    def _receive(connection: socket.socket, deadline: float) -> Message:
        def exactly(count: int) -> bytes:
            buffer = bytearray()
            while len(buffer) < count:
                connection.settimeout(max(0.01, deadline - time.monotonic()))
                piece = connection.recv(min(count - len(buffer), 2**20))
                if not piece:
                    raise ConnectionError("the coordinator closed the connection")
                buffer += piece
            return bytes(buffer)

        header_bytes, payload_bytes = _PREFIX.unpack(exactly(_PREFIX.size))
        header = json.loads(exactly(header_bytes))
        return Message(header, exactly(payload_bytes))


def _notice_silence(connection: socket.socket) -> None:
    """Let the kernel end a connection whose other side is gone without a word: a cut cable, a host that lost power."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (
        ("TCP_KEEPIDLE", _SILENCE_SECONDS // 2),
        ("TCP_KEEPINTVL", 2),
        ("TCP_KEEPCNT", 3),
        ("TCP_USER_TIMEOUT", 1000 * _SILENCE_SECONDS),
    ):
        if hasattr(socket, name):  # not everywhere; there, only the deadline ends the wait
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _close(connection: socket.socket | None) -> None:
    if connection is not None:
        connection.close()


def _checked(answer: Message, request: dict[str, Any]) -> Message:
    raised = answer.header.get("error")
    if raised is None:
        return answer
    kind, text = raised["type"], raised["message"]
    from lightning_gpuorch import errors

    exception = getattr(errors, kind, None)
    if not (isinstance(exception, type) and issubclass(exception, errors.GPUOrchError)):
        exception = ControlPlaneError
    if exception is errors.JobMismatchError:
        raise errors.JobMismatchError(text, raised.get("differences", ()))
    if exception is errors.MissingPredictionsError:
        raise errors.MissingPredictionsError(text, raised.get("indices", ()))
    try:
        raise exception(text)
    except TypeError:
        raise ControlPlaneError(f"{request.get('op')}: {kind}: {text}") from None


def refused(error: Exception) -> Future[Message]:
    """A future that carries an exception to the caller on the other side."""
    described: dict[str, Any] = {"type": type(error).__name__, "message": str(error)}
    for attribute in ("differences", "indices"):
        if hasattr(error, attribute):
            described[attribute] = list(getattr(error, attribute))
    return answered({"error": described})
