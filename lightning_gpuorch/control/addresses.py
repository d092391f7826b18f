"""Where the coordinator listens: ``host:port``, or ``unix:PATH`` for a socket that only this user can reach."""

from __future__ import annotations

import os
import socket
import struct
from pathlib import Path

UNIX = "unix:"
BACKLOG = 1024
_MAX_PATH_BYTES = 100
"""Linux takes 107, other systems less."""
_CREDENTIALS = struct.Struct("3i")


def unix_address(directory: Path) -> str | None:
    """The address of a socket in a directory that is this user's alone; None where the system has no room for the path."""
    path = directory / "control"
    fits = hasattr(socket, "AF_UNIX") and len(os.fsencode(path)) <= _MAX_PATH_BYTES
    return f"{UNIX}{path}" if fits else None


def port_of(address: str) -> int:
    """The port of an address; 0 of one that has none."""
    return 0 if address.startswith(UNIX) else int(address.rsplit(":", 1)[1])


def listen(address: str) -> socket.socket:
    """Listen on an address, whose port may be 0 for a free one.

    Raises:
        OSError: It is taken, or not this host's.
    """
    if not address.startswith(UNIX):
        host, port = address.rsplit(":", 1)
        return socket.create_server((host, int(port)), backlog=BACKLOG)
    listening = socket.socket(socket.AF_UNIX)
    try:
        listening.bind(address.removeprefix(UNIX))
        listening.listen(BACKLOG)
    except BaseException:
        listening.close()
        raise
    return listening


def connect(address: str, timeout_seconds: float) -> socket.socket:
    """Connect to an address.

    Raises:
        OSError: Nothing listens there, or not in time.
    """
    if not address.startswith(UNIX):
        host, port = address.rsplit(":", 1)
        connection = socket.create_connection((host, int(port)), timeout=timeout_seconds)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return connection
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(timeout_seconds)
    try:
        connection.connect(address.removeprefix(UNIX))
    except BaseException:
        connection.close()
        raise
    return connection


def other_user(connection: socket.socket) -> int | None:
    """The uid at the other end of a unix socket, if it is not this process's; None also where the system does not tell."""
    if connection.family != getattr(socket, "AF_UNIX", None) or not hasattr(socket, "SO_PEERCRED"):
        return None
    packed = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    uid = int(_CREDENTIALS.unpack(packed)[1])
    return None if uid == os.geteuid() else uid
