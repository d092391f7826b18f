"""Stops the whole job in good order: on a signal, when another node asks, or when predictions cannot be written.

SIGTERM to a node other than the coordinator's concerns that node alone: it is how machines are told that they will be taken
away. SIGINT, which a person sends, and SIGTERM to node 0 stop the job.
"""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

from lightning_gpuorch.control.messages.nodes import JobState
from lightning_gpuorch.errors import EXIT_RESUMABLE
from lightning_gpuorch.supervisor.node import Node
from lightning_gpuorch.supervisor.node_drain import NodeDrain

log = logging.getLogger(__name__)


class StoppedError(Exception):
    """A signal has come before anything was begun that would have to be finished."""


class JobDrain:
    """A node's part in draining the job.

    Args:
        node: The node.
        node_drain: Takes the node out of a job that goes on.
    """

    def __init__(self, node: Node, node_drain: NodeDrain):
        self._node, self._node_drain = node, node_drain
        self._signals: list[int] = []
        self._notice: str | None = None
        self._deadline: float | None = None
        self._previous: dict[int, Any] = {}
        self._raises = False

    @property
    def under_way(self) -> bool:
        """Whether the job finishes what it holds, and starts nothing."""
        return self._deadline is not None

    @property
    def asked_here(self) -> bool:
        """Whether a signal, or a notice about this machine, has asked this process to stop."""
        return bool(self._signals) or self._notice is not None

    def notice(self, reason: str) -> None:
        """This machine will be taken away. Called by any thread."""
        self._notice = self._notice or reason

    def install_signal_handlers(self) -> None:
        """Take SIGTERM and SIGINT as a request to stop, if this is the main thread."""
        if threading.current_thread() is threading.main_thread():
            self._previous = {n: signal.signal(n, self._remember) for n in (signal.SIGTERM, signal.SIGINT)}

    @contextlib.contextmanager
    def stopping_at_once(self) -> Iterator[None]:
        """Within, a signal ends what is being waited for.

        Raises:
            StoppedError: A signal has come.
        """
        self._raises = True
        try:
            yield
        finally:
            self._raises = False

    def restore_signal_handlers(self) -> None:
        """Leave signals as they were."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def begin(self, reason: str) -> None:
        """Have the job finish what it holds."""
        self._set_deadline()
        self._node.client.drain()
        self._node.record("drain", reason=reason)

    def check_signals(self) -> None:
        """Follow signals: the first one drains, the second one ends at once, as does the deadline."""
        leaves = self._node_drain.under_way
        if self.asked_here and self._deadline is None and not leaves:
            reason = self._notice or signal.Signals(self._signals[0]).name
            if (self._notice or self._signals[0] == signal.SIGTERM) and self._node_drain.is_possible:
                self._node_drain.begin(reason)
            else:
                log.info("%s: finishing the chunks in hand", reason)
                self.begin(reason)
        if leaves and len(self._signals) > 1:
            self._node_drain.end_now()
        elif len(self._signals) > 1 or (self._deadline or float("inf")) < time.monotonic():
            self._node.end_all(EXIT_RESUMABLE)
        self._node_drain.check_deadline()

    def follow(self, state: JobState) -> None:
        """Do what another process has asked the job for."""
        if state.draining:
            self._set_deadline()
            if not state.has_jobs:  # no rank has begun to work: nothing to finish
                self._node.end_all(EXIT_RESUMABLE)

    def pass_on(self) -> None:
        """Tell the others of a signal, when this node's own part is done."""
        if self.asked_here and not self._node.state().draining and not self._node_drain.is_possible:
            self._node.client.drain()

    def _set_deadline(self) -> None:
        self._deadline = self._deadline or time.monotonic() + self._node.config.exit_timeout_sec

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self._signals.append(number)
        if self._raises:
            raise StoppedError(signal.Signals(number).name)
