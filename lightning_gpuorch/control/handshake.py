r"""The first words on a connection, which every version understands: who connects, and which protocol it speaks.

The sides send frames in turns, the connecting side first::

    8 bytes "gpuorch\n" | uint32 length | JSON object

First both introduce themselves. The form and the fields of :class:`Introduction` never change, so that peers of different
versions can refuse each other by name. Then both prove that they know the job's token, without sending it: each by an
HMAC-SHA256 (RFC 2104) over what both have said, which holds a random number of each side and the port. So a proof is good for
one connection and one direction, and cannot be passed on by a process that listens elsewhere in the coordinator's name.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import secrets
import struct
from typing import TypeVar

import msgspec

from lightning_gpuorch._version import __version__
from lightning_gpuorch.errors import (
    AuthenticationError,
    ConfigurationError,
    OtherJobError,
    ProtocolError,
    ProtocolVersionError,
)

log = logging.getLogger(__name__)

PROTOCOL_VERSION = 4
"""Raised with every change of :mod:`lightning_gpuorch.control.messages`."""

MAGIC = b"gpuorch\n"
PREAMBLE = struct.Struct(f"!{len(MAGIC)}sI")
MAX_FRAME_BYTES = 4096


class Peer(msgspec.Struct, frozen=True):
    """A process: ``rank`` and the global rank of a worker, ``node`` and that of a supervisor, or the coordinator."""

    role: str
    rank: int = 0

    def __str__(self) -> str:
        return f"{self.role} {self.rank}"


COORDINATOR = Peer("coordinator")


class Introduction(msgspec.Struct, frozen=True, kw_only=True):
    """What both sides say, and the coordinator also to a peer that it refuses."""

    peer: Peer
    protocol: int = PROTOCOL_VERSION
    release: str = __version__


class Greeting(Introduction, frozen=True, kw_only=True):
    """An introduction to a peer of the same version."""

    port: int
    """Where the connection was made to, as this side sees it: another process in between has a port of its own."""
    nonce: str = msgspec.field(default_factory=lambda: secrets.token_hex(16))
    """A random number that no other connection has."""
    job: str = ""
    """The run that this side belongs to; empty of a process that has not joined one."""
    certificate: str = ""
    """Fingerprint of the certificate that the coordinator has shown, as this side sees it; empty without TLS."""


class Proof(msgspec.Struct, frozen=True):
    """Shows that the sender knows the token; empty where the other side's proof was wrong."""

    mac: str


T = TypeVar("T", bound=Introduction)


def frame(introduction: Introduction | Proof) -> bytes:
    """The bytes that are sent."""
    data = msgspec.json.encode(introduction)
    return PREAMBLE.pack(MAGIC, len(data)) + data


def length_of(preamble: bytes) -> int:
    """Bytes that follow a preamble.

    Raises:
        ProtocolError: The other side is no part of this project.
    """
    magic, length = PREAMBLE.unpack(preamble)
    if magic != MAGIC:
        raise ProtocolError(f"not a gpuorch handshake: it begins with {preamble!r}")
    if length > MAX_FRAME_BYTES:
        raise ProtocolError(f"a gpuorch handshake of {length} bytes is longer than {MAX_FRAME_BYTES}")
    return int(length)


def read(kind: type[T], data: bytes, address: str) -> T:
    """Read what the other side says after the preamble.

    Args:
        kind: What is expected.
        data: What was received.
        address: Where the other side is, for messages.

    Raises:
        ProtocolError: It is malformed.
        ProtocolVersionError: The other side speaks another protocol; both are named.
    """
    try:
        other = msgspec.json.decode(data, type=Introduction)
        if other.protocol != PROTOCOL_VERSION:
            raise ProtocolVersionError(
                f"{other.peer} at {address} speaks control protocol {other.protocol} (lightning_gpuorch {other.release}), "
                f"this process speaks {PROTOCOL_VERSION} (lightning_gpuorch {__version__}); install one release on all nodes."
            )
        return msgspec.json.decode(data, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ProtocolError(f"a malformed gpuorch handshake: {error}; it is {data[:80]!r}") from None


def require_token(allow_insecure: bool, where: str) -> None:
    """Refuse a job that would listen to other hosts without a token.

    Args:
        allow_insecure: Let it, with a warning.
        where: What it runs on, for messages.

    Raises:
        ConfigurationError: There is no token, and it is not allowed.
    """
    advice = "set GPUORCH_TOKEN to the same secret on all nodes"
    if not allow_insecure:
        raise ConfigurationError(
            f"the job runs on {where} and no token is set, so any host that reaches its port could take part in it, and run "
            f"code in its ranks: {advice}. allow_insecure=True (GPUORCH_ALLOW_INSECURE=1) runs it all the same."
        )
    log.warning(
        "no token is set, and the job runs on %s: any host that reaches its port can take part in it; %s", where, advice
    )


def read_proof(data: bytes) -> Proof:
    """Read the other side's proof.

    Raises:
        ProtocolError: It is malformed.
    """
    try:
        return msgspec.json.decode(data, type=Proof)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ProtocolError(f"a malformed proof in a gpuorch handshake: {error}") from None


def proof(token: str, by: Greeting, to: Greeting) -> Proof:
    """What ``by`` sends to ``to`` to show that it knows the token."""
    said = b"".join(hashlib.sha256(msgspec.json.encode(greeting)).digest() for greeting in (by, to))
    return Proof(hmac.new(token.encode(), said, hashlib.sha256).hexdigest())


def check_job(ours: Greeting, other: Greeting, address: str) -> None:
    """See that both sides belong to one job; to be called when they know each other.

    Raises:
        OtherJobError: They do not; both jobs are named.
    """
    if ours.job and other.job and ours.job != other.job:
        raise OtherJobError(
            f"{other.peer} at {address} belongs to {other.job}, and this process to {ours.job}: the coordinator was started "
            "again in between. Start the other nodes again as well; the job goes on from what is durable."
        )


def check_proof(shown: Proof, token: str, by: Greeting, to: Greeting, address: str) -> None:
    """See that the other side knows the token.

    Args:
        shown: What it has sent.
        token: The job's.
        by: Its greeting.
        to: This side's.
        address: Where it is, for messages.

    Raises:
        AuthenticationError: It does not know the token, or says that this side does not.
    """
    if by.port != to.port:
        raise AuthenticationError(
            f"{by.peer} at {address} speaks to port {by.port}, and this is port {to.port}: something in between passes "
            "the connection on. Let processes of the job connect directly."
        )
    if by.certificate != to.certificate:
        raise AuthenticationError(
            f"{by.peer} at {address} and this process do not see the same certificate of the coordinator: something in "
            "between passes the connection on. Let processes of the job connect directly."
        )
    if hmac.compare_digest(shown.mac.encode(), proof(token, by, to).mac.encode()):
        return
    at_fault = (
        f"{by.peer} at {address} does not" if shown.mac else f"this process does not, says {by.peer} at {address}"
    )
    raise AuthenticationError(
        f"both sides of a connection must know the job's token, and {at_fault}. Set GPUORCH_TOKEN, or the field token, to "
        "the same secret on all nodes."
    )
