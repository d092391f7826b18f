"""The epochs of a tensor-parallel group's connections, as one of its ranks sees them: what it tells the others, and hears.

The coordinator passes it on; it answers while the group's own connections are broken. Its part is in
:mod:`lightning_gpuorch.control.votes`.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from typing import Any

import torch

from lightning_gpuorch.control.heartbeat import current_heartbeat
from lightning_gpuorch.control.messages.base import AnswerT, Sender
from lightning_gpuorch.control.messages.recovery import (
    AbortEpoch,
    DrainStep,
    EpochAborted,
    Exchange,
    Exchanged,
    GroupEnded,
    GroupRequest,
    LeaveGroup,
    StepDrained,
    WatchEpoch,
)
from lightning_gpuorch.control.transport import Channel
from lightning_gpuorch.errors import ControlPlaneError, GPUOrchError, GroupRecoveryError
from lightning_gpuorch.parallel.groups.recoverable_group import live_groups
from lightning_gpuorch.worker.oom.detection import release

log = logging.getLogger(__name__)

CONNECT_TRIES = 3
_WATCH_SECONDS = 3600.0


class GroupEpochs:
    """Gives up connections and makes new ones, together with the other ranks of the group.

    Args:
        channel: Line to the coordinator.
        sender: This process.
        rank: Its rank in the group.
        size: Ranks in the group.
        timeout_seconds: Longest wait for the coordinator; the other ranks get twice as long.
        name: Of this rank, in messages.

    Attributes:
        number: Of the present connections.
    """

    def __init__(self, channel: Channel, sender: Sender, rank: int, size: int, timeout_seconds: float, name: str):
        self._channel, self._sender, self._rank, self._size, self._name = channel, sender, rank, size, name
        self._timeout_seconds = timeout_seconds
        self.number = 0
        self._round = 0
        """An epoch has an exchange of votes for each drained step, and one at its end."""
        self._drained = (-1, -1)
        """Epoch and number of the last attempt that does not count because a rank drained it."""
        self._closed = False
        self._watcher = threading.Thread(target=self._watch, name="gpuorch-recovery", daemon=True)
        self._watcher.start()

    def abort(self, reason: str) -> None:
        """Give up the present epoch on all ranks, unless the last votes about it are in: then it is what they said."""
        request = AbortEpoch(**self._place, reason=reason, before=self._votes)
        if isinstance(self._ask(request, self._timeout_seconds), EpochAborted):
            _give_up(reason, self.number)

    def announce_drain(self, position: int, limit_seconds: float) -> bool:
        """Tell all ranks that an attempt does not count; returns whether they know, or the epoch is given up.

        Args:
            position: Number of the attempt.
            limit_seconds: Longest wait until the others have heard.

        Raises:
            ControlPlaneTimeoutError: They have not.
        """
        request = DrainStep(**self._place, group_size=self._size, position=position)
        return not isinstance(self._ask(request, limit_seconds), EpochAborted)

    def is_drained(self, position: int) -> bool:
        """Whether a rank has said that an attempt of the present epoch does not count."""
        return self._drained == (self.number, position)

    def vote(
        self, vote: dict[str, Any], limit_seconds: float | None = None, wait: bool = True
    ) -> tuple[list[dict[str, Any]], bool]:
        """Hand in a vote; returns those of all ranks, and whether the epoch is given up, the same on each of them.

        Args:
            vote: What this rank knows.
            limit_seconds: Longest wait for the other ranks. May be called again afterwards.
            wait: Whether to wait for them at all.

        Raises:
            ControlPlaneTimeoutError: They have not voted in time.
            GroupRecoveryError: One of them is gone.
        """
        votes, aborted = self._exchange(self._votes, vote, limit_seconds, wait)
        if wait and not aborted:
            self._round += 1
        return votes, aborted

    def connect(self) -> float:
        """Make the next epoch's connections; all ranks do the same number of tries.

        Returns:
            Seconds that the last try took.

        Raises:
            GroupRecoveryError: It did not work.
        """
        if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            torch.cuda.empty_cache()  # NCCL takes its buffers from what is left
        for _ in range(CONNECT_TRIES):
            failure, began = "", time.perf_counter()
            number = self.number + 1
            try:
                for group in live_groups():
                    if group.size() > 1:
                        group.rebuild(number)
            except (RuntimeError, OSError, MemoryError) as error:
                failure = summary(error)
                release(error)
            self.number, self._round = number, 0
            # No rank uses the new connections, or gives them up, before all have them.
            failures = [text for text in self._exchange("connected", failure)[0] if text]
            if not failures:
                return time.perf_counter() - began
            log.warning("%s: the group could not connect: %s", self._name, failures[0])
            self.abort(failures[0])
        raise GroupRecoveryError(f"the group could not connect in {CONNECT_TRIES} tries: {failures[0]}")

    def close(self) -> None:
        """Stop watching; safe to call again."""
        if self._closed:
            return
        self._closed = True
        try:
            self._ask(LeaveGroup(**self._place), 5)
        except ControlPlaneError as error:
            log.debug("%s could not say that it is done: %s", self._name, error)
        if threading.current_thread() is not self._watcher:
            self._watcher.join(5)

    @property
    def closed(self) -> bool:
        """Whether :meth:`close` was called."""
        return self._closed

    @property
    def _votes(self) -> str:
        return f"votes {self._round}"

    def _exchange(
        self, name: str, value: Any, limit_seconds: float | None = None, wait: bool = True
    ) -> tuple[list[Any], bool]:
        """What all ranks hand in under this name, and whether the epoch had been given up when the last one did."""
        # A rank that computes without communicating comes only when its step is over.
        limit = 2 * self._timeout_seconds if limit_seconds is None else limit_seconds
        with waiting():
            request = Exchange(**self._place, group_size=self._size, name=name, value=value, wait=wait)
            answer = self._ask(request, limit)
        return (answer.values, answer.aborted) if isinstance(answer, Exchanged) else ([], False)

    @property
    def _place(self) -> dict[str, Any]:
        """What every request of a group says first."""
        return {"sender": self._sender, "group_rank": self._rank, "epoch": self.number}

    def _ask(self, request: GroupRequest[AnswerT], timeout_seconds: float) -> AnswerT:
        return self._channel.call(request, timeout_seconds=timeout_seconds)

    def _watch(self) -> None:
        """Give up each epoch as soon as any rank does, and hear which steps do not count.

        On a thread and a connection of its own.
        """
        epoch = heard = 0
        while not self._closed:
            try:
                request = WatchEpoch(sender=self._sender, group_rank=self._rank, epoch=epoch, heard=heard)
                answer = self._ask(request, _WATCH_SECONDS)
            except TimeoutError:
                continue
            except (GPUOrchError, OSError) as error:  # without the coordinator there is no recovery, and soon no job
                log.debug("%s no longer watches: %s", self._name, error)
                return
            if isinstance(answer, StepDrained):
                self._drained, heard = (epoch, answer.position), answer.notice  # the next request says so
                continue
            if isinstance(answer, GroupEnded):
                return
            _give_up(answer.reason, epoch)
            epoch, heard = epoch + 1, 0


def waiting() -> contextlib.AbstractContextManager[None]:
    """Tell the supervisor that it waits for others."""
    heartbeat = current_heartbeat()
    return contextlib.nullcontext() if heartbeat is None else heartbeat.waiting()


def summary(error: BaseException) -> str:
    """An error in one line."""
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0][:300]}" if text else type(error).__name__


def _give_up(reason: str, epoch: int) -> None:
    for group in live_groups():
        if group.size() > 1:
            group.give_up(reason, epoch)
