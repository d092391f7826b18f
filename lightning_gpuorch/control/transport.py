"""How a request and its answer travel between a process and the coordinator: frames with a deadline.

A connection begins with a :mod:`~lightning_gpuorch.control.handshake`. Then each side sends frames::

    uint32 number of the request | uint64 length | message (see :mod:`~lightning_gpuorch.control.codec`)

Each request is answered, has a deadline, and is safe to send again, because the coordinator treats a repeated request as
the same request. A ``TCPStore`` gives none of that: its client has no receive timeout, a blocked call locks the client
object, and ``set`` is not acknowledged.
"""

from __future__ import annotations

import itertools
import logging
import socket
import ssl
import struct
import time
from concurrent.futures import Future, wait
from typing import Any, Protocol

from lightning_gpuorch.control import addresses, codec, handshake, tls
from lightning_gpuorch.control.addresses import UNIX
from lightning_gpuorch.control.handshake import Greeting, Introduction, Peer
from lightning_gpuorch.control.messages.base import AnswerT, Message, Request
from lightning_gpuorch.control.tls import Certificates
from lightning_gpuorch.errors import (
    AuthenticationError,
    ControlPlaneError,
    ControlPlaneTimeoutError,
    ProtocolError,
)

log = logging.getLogger(__name__)

PREFIX = struct.Struct("!IQ")
MAX_MESSAGE_BYTES = 2 * 2**30
_SILENCE_SECONDS = 10
"""A peer whose kernel acknowledges nothing for so long is taken for unreachable, also while an answer is awaited."""

_SERVED_SECONDS = 1.0
"""A connection that lived so long was served; one that ends sooner was refused."""


class Handler(Protocol):
    """Answers requests, at once or later; called from one thread at a time per connection."""

    def handle(self, request: Request[Any]) -> Future[Any]:
        """Take one request; resolve the future with the answer, or with one of the project's errors."""
        ...


def encode(number: int, message: Message) -> bytearray:
    """One frame."""
    frame = bytearray(PREFIX.size)
    codec.encode_into(message, frame, PREFIX.size)
    length = len(frame) - PREFIX.size
    check_size(length)
    PREFIX.pack_into(frame, 0, number, length)
    return frame


def check_size(length: int) -> None:
    """Refuse a message that is too large.

    Raises:
        ProtocolError: It is.
    """
    if length > MAX_MESSAGE_BYTES:
        raise ProtocolError(
            f"a control-plane message of {length} bytes exceeds the limit of {MAX_MESSAGE_BYTES}; job-wide collectives are "
            "for small objects."
        )


class Channel(Protocol):
    """Sends requests to the coordinator."""

    def call(self, request: Request[AnswerT], *, timeout_seconds: float) -> AnswerT:
        """Send one request and wait for its answer.

        Raises:
            ControlPlaneTimeoutError: No answer within ``timeout_seconds``.
            ControlPlaneError: The coordinator cannot be reached.
            GPUOrchError: The coordinator refused the request.
        """
        ...

    def close(self) -> None:
        """Release the connection."""
        ...


class LocalChannel:
    """A channel to a handler in the same process: no socket, no encoding."""

    def __init__(self, handler: Handler):
        self._handler = handler

    def call(self, request: Request[AnswerT], *, timeout_seconds: float) -> AnswerT:
        """See :meth:`Channel.call`."""
        future: Future[AnswerT] = self._handler.handle(request)
        if not wait([future], timeout_seconds).done:
            raise ControlPlaneTimeoutError(f"{type(request).__name__} was not answered within {timeout_seconds:g} s.")
        return future.result()

    def close(self) -> None:
        """Nothing to release."""


class RemoteChannel:
    """A channel over a socket. Reconnects and repeats a request until its deadline.

    A deadline is for the answer of a coordinator that can be reached. While it cannot, the clock stands still and
    ``connect_timeout_seconds`` counts: a cut of the network shorter than that costs only its own length.

    Thread-safe: each request in flight has a connection of its own, so one that waits for others holds up no other.

    Args:
        address: Of the coordinator, see :mod:`~lightning_gpuorch.control.addresses`.
        peer: Who this process is.
        token: The job's shared secret.
        connect_timeout_seconds: How long the coordinator may be unreachable before a request fails.
        job: See below.
        certificates: Encrypt connections, unless the address is a unix socket.

    Attributes:
        job: Name of the run that this process belongs to; a coordinator of another one is not asked.
    """

    def __init__(
        self,
        address: str,
        peer: Peer,
        token: str = "",
        connect_timeout_seconds: float = 30.0,
        job: str = "",
        certificates: Certificates | None = None,
    ):
        self.address, self.job = address, job
        encrypted = certificates if not address.startswith(UNIX) else None
        self._tls = encrypted.context(server_side=False) if encrypted is not None else None
        self._peer, self._token = peer, token
        self._connect_timeout_seconds = connect_timeout_seconds
        self._idle: list[socket.socket] = []
        self._numbers = itertools.count(1)

    def call(self, request: Request[AnswerT], *, timeout_seconds: float) -> AnswerT:
        """See :meth:`Channel.call`.

        Raises:
            ProtocolVersionError: The coordinator is of another version.
            ProtocolError: What listens there is no coordinator.
            AuthenticationError: One of both does not know the token of the other.
            OtherJobError: The coordinator was started again since this process joined it.
        """
        deadline = time.monotonic() + timeout_seconds
        lost_since: float | None = None
        sent = 0.0
        number = next(self._numbers) % 2**32
        frame = encode(number, request)
        while True:
            connection: socket.socket | None = None
            try:
                connection = self._idle.pop() if self._idle else self._connect(deadline)
                sent = time.monotonic()
                connection.settimeout(max(0.01, deadline - sent))
                connection.sendall(frame)
                data = self._receive(connection, number, deadline)
            except OSError as error:
                _close(connection)
                now = time.monotonic()
                if isinstance(error, TimeoutError) and error.errno is None:  # our own clock, not the kernel's
                    raise ControlPlaneTimeoutError(
                        f"{type(request).__name__} was not answered by the coordinator at {self.address} within "
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
            except ProtocolError:
                _close(connection)
                raise
            else:
                self._idle.append(connection)
                return codec.decode_answer(data, request)

    def close(self) -> None:
        """Close all idle connections."""
        while self._idle:
            self._idle.pop().close()

    def _connect(self, deadline: float) -> socket.socket:
        try:
            connection = addresses.connect(self.address, min(5.0, max(0.01, deadline - time.monotonic())))
        except TimeoutError as error:  # unreachable for now, which is not "no answer": try again
            raise ConnectionError(str(error)) from None
        try:
            notice_silence(connection)
            certificate = ""
            if self._tls is not None:
                connection = encrypted = tls.begin(connection, self._tls, self.address)
                certificate = tls.fingerprint_of_peer(encrypted)
            self._shake_hands(connection, certificate, deadline)
        except ssl.SSLEOFError as error:
            connection.close()
            raise ConnectionError(str(error)) from None
        except ssl.SSLError as error:  # the coordinator's verdict on our certificate comes with its first words
            connection.close()
            raise tls.refusal(error, self.address) from None
        except BaseException:
            connection.close()
            raise
        return connection

    def _shake_hands(self, connection: socket.socket, certificate: str, deadline: float) -> None:
        port = addresses.port_of(self.address)
        greeting = Greeting(peer=self._peer, port=port, job=self.job, certificate=certificate)
        connection.sendall(handshake.frame(greeting))
        try:
            data = self._frame(connection, deadline)
            handshake.read(Introduction, data, self.address)  # of whatever version
            other = handshake.read(Greeting, data, self.address)
            if other.certificate and not certificate:
                raise AuthenticationError(
                    f"the coordinator at {self.address} uses TLS, and this process does not. {tls.ADVICE}"
                )
            connection.sendall(handshake.frame(handshake.proof(self._token, greeting, other)))
            shown = handshake.read_proof(self._frame(connection, deadline))
        except ProtocolError as error:
            raise ProtocolError(f"no gpuorch coordinator listens on {self.address}: {error}") from None
        handshake.check_proof(shown, self._token, other, greeting, self.address)
        handshake.check_job(greeting, other, self.address)

    @staticmethod
    def _frame(connection: socket.socket, deadline: float) -> bytes:
        length = handshake.length_of(_exactly(connection, handshake.PREAMBLE.size, deadline))
        return _exactly(connection, length, deadline)

    @staticmethod
    def _receive(connection: socket.socket, number: int, deadline: float) -> bytes:
        answered, length = PREFIX.unpack(_exactly(connection, PREFIX.size, deadline))
        check_size(length)
        if answered != number:
            raise ConnectionError("answer to another request")
        return _exactly(connection, length, deadline)


def _exactly(connection: socket.socket, count: int, deadline: float) -> bytes:
    buffer = bytearray()
    while len(buffer) < count:
        connection.settimeout(max(0.01, deadline - time.monotonic()))
        piece = connection.recv(min(count - len(buffer), 2**20))
        if not piece:
            raise ConnectionError("the coordinator closed the connection")
        buffer += piece
    return bytes(buffer)


def notice_silence(connection: socket.socket) -> None:
    """Let the kernel end a connection whose other side no longer answers: a cut cable, a host that lost power."""
    if connection.family not in (socket.AF_INET, socket.AF_INET6):
        return  # the kernel of this host knows at once
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
