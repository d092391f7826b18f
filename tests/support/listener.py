"""Something that listens where a coordinator should, and is none, or one of another version."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor


@contextlib.contextmanager
def listener(answer: bytes, timeout_seconds: float = 10.0) -> Iterator[str]:
    """Send ``answer`` to the first process that connects and says something; gives ``host:port``."""
    with socket.create_server(("127.0.0.1", 0)) as listening, ThreadPoolExecutor(1) as pool:
        listening.settimeout(timeout_seconds)

        def serve() -> None:
            connection, _ = listening.accept()
            with connection:
                connection.settimeout(timeout_seconds)
                connection.recv(4096)
                connection.sendall(answer)

        served = pool.submit(serve)
        yield f"127.0.0.1:{listening.getsockname()[1]}"
        served.result(timeout_seconds)
