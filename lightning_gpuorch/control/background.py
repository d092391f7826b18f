"""Where the coordinator does what may take long, such as asking a store, so that other requests are answered meanwhile."""

from __future__ import annotations

import threading
from collections.abc import Callable

Background = Callable[[str, Callable[[], None]], None]
"""``background(name, task)`` has a task done, and does not wait for it."""


def in_thread(name: str, task: Callable[[], None]) -> None:
    """Do a task on a thread of its own."""
    threading.Thread(target=task, name=name, daemon=True).start()
