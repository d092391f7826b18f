"""The coordinator's side of recovery inside a tensor-parallel group: who left which epoch, and the votes about it.

It lives outside of the ranks, so it answers while their own communication is broken. Every request may be repeated.

1. A rank that leaves a step says so (``AbortEpoch``); the first to do so counts.
2. Every rank has a request waiting (``WatchEpoch``) that is answered then.
3. A rank that fails but goes on to take part in the step's collectives says that instead (``DrainStep``), and is answered
   when all others have been told, by their next ``WatchEpoch``. So no rank takes the step's outcome for a good one.
4. All ranks hand in what they know and get what all know (``Exchange``): votes first, then whether each could connect
   again. With it they learn whether the epoch was aborted until then, the same on every rank; an abort that comes after
   the exchange it names is void. The exchange fails as soon as it is known that a rank of the group is gone.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from lightning_gpuorch.control.messages.base import Done
from lightning_gpuorch.control.messages.recovery import (
    AbortEpoch,
    DrainStep,
    EpochAborted,
    EpochComplete,
    Exchange,
    Exchanged,
    GroupEnded,
    GroupRequest,
    LeaveGroup,
    StepDrained,
    WatchEpoch,
)
from lightning_gpuorch.control.pending import answered, failed, pending, resolve
from lightning_gpuorch.errors import GroupRecoveryError

Group = tuple[int, int]
"""Replica and generation."""

_EPOCHS_KEPT = 8
_EXCHANGES_KEPT = 32


@dataclass
class _Drains:
    """What the ranks were told in one epoch about steps that are not to count."""

    count: int = 0
    position: int = -1
    heard: dict[int, int] = field(default_factory=dict)
    waiting: list[tuple[int, DrainStep, Future[EpochAborted | Done]]] = field(default_factory=list)
    """Number of the notice, the request, its answer."""


@dataclass
class _Exchange:
    contributions: dict[int, Any] = field(default_factory=dict)
    waiting: list[Future[Exchanged]] = field(default_factory=list)
    outcome: Exchanged | None = None


@dataclass
class _Group:
    aborted: dict[int, EpochAborted] = field(default_factory=dict)
    watchers: dict[int, list[tuple[int, Future[EpochAborted | StepDrained | GroupEnded]]]] = field(default_factory=dict)
    drains: dict[int, _Drains] = field(default_factory=dict)
    exchanges: dict[tuple[int, str], _Exchange] = field(default_factory=dict)
    over: str | None = None


class VoteService:
    """Collects what the ranks of each group say; see the module's text."""

    def __init__(self) -> None:
        self._groups: dict[Group, _Group] = {}
        self._lock = threading.Lock()

    @property
    def routes(self) -> Mapping[type, Any]:
        """What is answered here."""
        handlers: dict[type, Any] = {
            AbortEpoch: self._abort,
            WatchEpoch: self._watch,
            DrainStep: self._drain,
            Exchange: self._exchange,
            LeaveGroup: self._leave,
        }
        return dict.fromkeys(handlers, lambda request: self._carry_out(handlers[type(request)], request))

    def _carry_out(self, handler: Any, request: GroupRequest[Any]) -> Any:
        with self._lock:
            return handler(self._groups.setdefault(request.sender.owner, _Group()), request)

    def end_generation(self, replica: int, generation: int) -> None:
        """A rank of the group is gone: all who wait for it are told."""
        with self._lock:
            for group, state in list(self._groups.items()):
                if group[0] != replica or group[1] > generation or state.over is not None:
                    continue
                state.over = f"generation {group[1]} of replica {replica} is over"
                for exchange in state.exchanges.values():
                    resolve(exchange.waiting, GroupRecoveryError(state.over))
                for watchers in state.watchers.values():
                    resolve([future for _, future in watchers], GroupEnded())
                for drains in state.drains.values():
                    resolve([one[-1] for one in drains.waiting], GroupRecoveryError(state.over))
                self._groups[group] = _Group(over=state.over)

    def _abort(self, state: _Group, request: AbortEpoch) -> EpochAborted | EpochComplete:
        epoch = request.epoch
        if epoch not in state.aborted:
            exchange = state.exchanges.get((epoch, request.before))
            if exchange is not None and exchange.outcome is not None:
                return EpochComplete()
            first = state.aborted[epoch] = EpochAborted(rank=request.group_rank, reason=request.reason)
            resolve([future for _, future in state.watchers.pop(epoch, ())], first)
            resolve([one[-1] for one in state.drains.pop(epoch, _Drains()).waiting], first)
            for old in [known for known in state.aborted if known < epoch - _EPOCHS_KEPT]:
                del state.aborted[old]
        return state.aborted[epoch]

    def _watch(self, state: _Group, request: WatchEpoch) -> Future[Any]:
        epoch, rank, heard = request.epoch, request.group_rank, request.heard
        if state.over is not None:
            return answered(GroupEnded())
        if epoch in state.aborted:
            return answered(state.aborted[epoch])
        drains = state.drains.setdefault(epoch, _Drains())
        drains.heard[rank] = max(heard, drains.heard.get(rank, 0))
        self._answer_drains(drains)
        if drains.count > heard:
            return answered(StepDrained(position=drains.position, notice=drains.count))
        future = pending()
        state.watchers.setdefault(epoch, []).append((rank, future))
        return future

    def _drain(self, state: _Group, request: DrainStep) -> Future[Any]:
        epoch, position = request.epoch, request.position
        if state.over is not None:
            return failed(GroupRecoveryError(state.over))
        if epoch in state.aborted:
            return answered(state.aborted[epoch])
        drains = state.drains.setdefault(epoch, _Drains())
        if drains.position != position:  # there is never more than one position of which a rank may still fail
            drains.count, drains.position = drains.count + 1, position
            notice = StepDrained(position=position, notice=drains.count)
            resolve([future for _, future in state.watchers.pop(epoch, ())], notice)
        future = pending()
        drains.waiting.append((drains.count, request, future))
        self._answer_drains(drains)
        return future

    @staticmethod
    def _answer_drains(drains: _Drains) -> None:
        for one in list(drains.waiting):
            number, request, future = one
            others = (rank for rank in range(request.group_size) if rank != request.group_rank)
            if all(drains.heard.get(other, 0) >= number for other in others):
                drains.waiting.remove(one)
                resolve([future], Done())

    def _exchange(self, state: _Group, request: Exchange) -> Future[Any]:
        key, size = (request.epoch, request.name), request.group_size
        if state.over is not None:
            return failed(GroupRecoveryError(state.over))
        exchange = state.exchanges.setdefault(key, _Exchange())
        while len(state.exchanges) > _EXCHANGES_KEPT:  # the oldest: no rank asks for that again
            del state.exchanges[next(iter(state.exchanges))]
        if exchange.outcome is None:
            exchange.contributions[request.group_rank] = request.value
            if len(exchange.contributions) == size:
                values = [exchange.contributions[member] for member in range(size)]
                exchange.outcome = Exchanged(values=values, aborted=request.epoch in state.aborted)
                resolve(exchange.waiting, exchange.outcome)
                exchange.waiting.clear()
        if exchange.outcome is not None or not request.wait:
            return answered(exchange.outcome or Done())
        future = pending()
        exchange.waiting.append(future)
        return future

    @staticmethod
    def _leave(state: _Group, request: LeaveGroup) -> None:
        """A rank has no more steps: its watcher may go."""
        for epoch, watchers in state.watchers.items():
            resolve([future for member, future in watchers if member == request.group_rank], GroupEnded())
            state.watchers[epoch] = [one for one in watchers if one[0] != request.group_rank]
