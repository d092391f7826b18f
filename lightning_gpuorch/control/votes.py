"""The coordinator's side of recovery inside a tensor-parallel group: who left which epoch, and the votes about it.

It lives outside of the ranks, so it answers while their own communication is broken. Every request may be repeated.

1. A rank that leaves a step says so (``abort``); the first to do so counts.
2. Every rank has a request waiting (``watch``) that is answered then.
3. A rank that fails but goes on to take part in the step's collectives says that instead (``drain``), and is answered
   when all others have heard of it: their next ``watch`` tells. So nobody takes the step's outcome for a good one.
4. All ranks hand in what they know and get what all know (``exchange``): votes first, then whether each could connect
   anew. With it they learn whether the epoch was aborted until then, the same on every rank; an abort that comes after
   the exchange it names is void. The exchange fails as soon as it is known that a rank of the group is gone.
"""

from __future__ import annotations

import threading
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from lightning_gpuorch.control.transport import Message, answered, refused
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
    waiting: list[tuple[int, int, int, Future[Message]]] = field(default_factory=list)
    """Number of the notice, the rank that gave it, ranks in the group, its request."""


@dataclass
class _Exchange:
    contributions: dict[int, Any] = field(default_factory=dict)
    waiting: list[Future[Message]] = field(default_factory=list)
    outcome: dict[str, Any] | None = None


@dataclass
class _Group:
    aborted: dict[int, dict[str, Any]] = field(default_factory=dict)
    watchers: dict[int, list[tuple[int, Future[Message]]]] = field(default_factory=dict)
    drains: dict[int, _Drains] = field(default_factory=dict)
    exchanges: dict[tuple[int, str], _Exchange] = field(default_factory=dict)
    over: str | None = None


class RecoveryLedger:
    """Collects what the ranks of each group say; see the module's text."""

    def __init__(self) -> None:
        self._groups: dict[Group, _Group] = {}
        self._lock = threading.Lock()

    def handle(self, request: dict[str, Any]) -> Future[Message]:
        """Take one request of a rank.

        Args:
            request: Header with ``step`` (``abort``, ``watch``, ``drain``, ``exchange`` or ``leave``), ``replica``,
                ``generation``, ``rank`` in the group, ``epoch``, and what the step needs.
        """
        group, rank, epoch = (request["replica"], request["generation"]), request["rank"], request["epoch"]
        with self._lock:
            state = self._groups.setdefault(group, _Group())
            step = request["step"]
            if step == "abort":
                exchange = state.exchanges.get((epoch, request.get("before", "")))
                if exchange is not None and exchange.outcome is not None and epoch not in state.aborted:
                    return answered({"aborted": None})
                return self._abort(state, epoch, {"rank": rank, "reason": request["reason"]})
            if step == "watch":
                return self._watch(state, epoch, rank, request.get("heard", 0))
            if step == "drain":
                return self._drain(state, epoch, rank, request["size"], request["position"])
            if step == "exchange":
                return self._exchange(state, (epoch, request["name"]), rank, request)
            self._leave(state, rank)
            return answered({})

    def end_generation(self, replica: int, generation: int) -> None:
        """A rank of the group is gone: whoever waits for it learns that now."""
        with self._lock:
            for group, state in list(self._groups.items()):
                if group[0] != replica or group[1] > generation or state.over is not None:
                    continue
                state.over = f"generation {group[1]} of replica {replica} is over"
                for exchange in state.exchanges.values():
                    _resolve(exchange.waiting, refused(GroupRecoveryError(state.over)).result())
                for watchers in state.watchers.values():
                    _resolve([future for _, future in watchers], Message({"over": True}))
                for drains in state.drains.values():
                    _resolve([one[-1] for one in drains.waiting], refused(GroupRecoveryError(state.over)).result())
                self._groups[group] = _Group(over=state.over)

    def _abort(self, state: _Group, epoch: int, first: dict[str, Any]) -> Future[Message]:
        if epoch not in state.aborted:
            state.aborted[epoch] = first
            _resolve([future for _, future in state.watchers.pop(epoch, ())], Message({"aborted": first}))
            drains = state.drains.pop(epoch, _Drains())
            _resolve([one[-1] for one in drains.waiting], Message({"aborted": first}))
            for old in [known for known in state.aborted if known < epoch - _EPOCHS_KEPT]:
                del state.aborted[old]
        return answered({"aborted": state.aborted[epoch]})

    def _watch(self, state: _Group, epoch: int, rank: int, heard: int) -> Future[Message]:
        if state.over is not None:
            return answered({"over": True})
        if epoch in state.aborted:
            return answered({"aborted": state.aborted[epoch]})
        drains = state.drains.setdefault(epoch, _Drains())
        drains.heard[rank] = max(heard, drains.heard.get(rank, 0))
        self._answer_drains(drains)
        if drains.count > heard:
            return answered({"drained": drains.position, "heard": drains.count})
        future: Future[Message] = Future()
        state.watchers.setdefault(epoch, []).append((rank, future))
        return future

    def _drain(self, state: _Group, epoch: int, rank: int, size: int, position: int) -> Future[Message]:
        if state.over is not None:
            return refused(GroupRecoveryError(state.over))
        if epoch in state.aborted:
            return answered({"aborted": state.aborted[epoch]})
        drains = state.drains.setdefault(epoch, _Drains())
        if drains.position != position:  # there is never more than one position of which a rank may still fail
            drains.count, drains.position = drains.count + 1, position
            told = Message({"drained": position, "heard": drains.count})
            _resolve([future for _, future in state.watchers.pop(epoch, ())], told)
        future: Future[Message] = Future()
        drains.waiting.append((drains.count, rank, size, future))
        self._answer_drains(drains)
        return future

    @staticmethod
    def _answer_drains(drains: _Drains) -> None:
        for one in list(drains.waiting):
            number, rank, size, future = one
            if all(drains.heard.get(other, 0) >= number for other in range(size) if other != rank):
                drains.waiting.remove(one)
                _resolve([future], Message({}))

    def _exchange(self, state: _Group, key: tuple[int, str], rank: int, request: dict[str, Any]) -> Future[Message]:
        if state.over is not None:
            return refused(GroupRecoveryError(state.over))
        exchange = state.exchanges.setdefault(key, _Exchange())
        while len(state.exchanges) > _EXCHANGES_KEPT:  # the oldest: nobody asks for that again
            del state.exchanges[next(iter(state.exchanges))]
        if exchange.outcome is None:
            exchange.contributions[rank] = request["value"]
            if len(exchange.contributions) == request["size"]:
                values = [exchange.contributions[member] for member in range(request["size"])]
                exchange.outcome = {"values": values, "aborted": key[0] in state.aborted}
                _resolve(exchange.waiting, Message(exchange.outcome))
        if exchange.outcome is not None or not request.get("wait", True):
            return answered(exchange.outcome or {})
        future: Future[Message] = Future()
        exchange.waiting.append(future)
        return future

    @staticmethod
    def _leave(state: _Group, rank: int) -> None:
        """A rank has no more steps: its watcher may go."""
        for epoch, watchers in state.watchers.items():
            _resolve([future for member, future in watchers if member == rank], Message({"over": True}))
            state.watchers[epoch] = [one for one in watchers if one[0] != rank]


def _resolve(waiting: list[Future[Message]], answer: Message) -> None:
    for future in waiting:
        if not future.done():
            future.set_result(answer)
    waiting.clear()
