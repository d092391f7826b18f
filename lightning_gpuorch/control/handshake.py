r"""The first words on a connection, which every version understands: who connects, and which protocol it speaks.

Each side sends one frame, the connecting side first::

    8 bytes "gpuorch\n" | uint32 length | JSON object

The form and the fields of :class:`Introduction` never change, so that peers of different versions can refuse each other
by name. What else a side has to say (a token) is read only when the versions are the same.
"""

from __future__ import annotations

import struct
from typing import TypeVar

import msgspec

from lightning_gpuorch._version import __version__
from lightning_gpuorch.errors import ProtocolError, ProtocolVersionError

PROTOCOL_VERSION = 1
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


class Hello(Introduction, frozen=True, kw_only=True):
    """What the connecting side says."""

    token: str


T = TypeVar("T", bound=Introduction)


def frame(introduction: Introduction) -> bytes:
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
