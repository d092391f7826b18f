"""Collectives that span all replicas: numbered, decided once, and replayed to a rank that comes back or comes late.

Each rank numbers its collectives. The coordinator keeps every decided result, so a restarted rank that runs the user's script
from the top gets the results its predecessor got and catches up without the others noticing. A replica that is
retired is no longer waited for. A rank that joins late is a member as soon as it has registered: decided results are replayed
to it, though it is in none of them, and what is undecided waits for it, too. Payloads are small objects: they go through the
coordinator and stay there.
"""

from __future__ import annotations

import contextlib
import pickle
import threading
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import msgspec

from lightning_gpuorch.control.messages.collectives import Gather, Gathered, GetMissingRanks, MissingRanks
from lightning_gpuorch.control.messages.nodes import DropRanks, EndRank
from lightning_gpuorch.control.pending import answered, failed, pending, resolve
from lightning_gpuorch.control.transport import Channel
from lightning_gpuorch.errors import CollectiveMismatchError, ControlPlaneTimeoutError

_MAX_DEPTH = 32
"""Of objects that travel as data."""


@dataclass
class _Operation:
    kind: str
    first_rank: int
    contributions: dict[int, bytes] = field(default_factory=dict)
    waiting: list[Future[Gathered]] = field(default_factory=list)
    result: Gathered | None = None


class CollectiveService:
    """The coordinator's side: collects contributions and decides each operation once.

    Args:
        ranks: Global ranks that take part.
    """

    def __init__(self, ranks: Iterable[int]):
        self._members = set(ranks)
        self._left: dict[int, str] = {}
        self._operations: dict[int, _Operation] = {}
        self._lock = threading.Lock()

    @property
    def routes(self) -> Mapping[type, Any]:
        """What is answered here."""
        return {
            Gather: self.gather,
            GetMissingRanks: lambda request: MissingRanks(ranks=self.missing(request.number)),
            DropRanks: lambda request: self.retire(request.ranks),
            EndRank: lambda request: self.leave(request.rank, request.why),
        }

    def gather(self, request: Gather) -> Future[Gathered]:
        """Take a rank's contribution; resolved with all of them, in rank order, when every member has arrived."""
        number, kind, rank = request.number, request.kind, request.rank
        with self._lock:
            operation = self._operations.setdefault(number, _Operation(kind, rank))
            if operation.kind != kind:
                return failed(
                    CollectiveMismatchError(
                        f"collective #{number}: rank {rank} calls {kind}, rank {operation.first_rank} calls "
                        f"{operation.kind}; every rank must make the same calls in the same order."
                    )
                )
            if operation.result is not None:
                return answered(operation.result)
            operation.contributions[rank] = request.payload
            waiter = pending()
            operation.waiting.append(waiter)
            self._decide(number, operation)
            return waiter

    def set_members(self, ranks: Iterable[int]) -> None:
        """Record which ranks take part, once the nodes with which the job begins have joined."""
        with self._lock:
            self._members = set(ranks)

    @property
    def has_ended(self) -> bool:
        """Whether a rank has ended in good order, so that no other one can begin."""
        return bool(self._left)

    def missing(self, number: int) -> list[int]:
        """Members that have not yet arrived at operation ``number``."""
        with self._lock:
            operation = self._operations.get(number)
            return sorted(self._members - set(operation.contributions if operation else ()))

    def retire(self, ranks: Iterable[int]) -> None:
        """Stop waiting for ranks that will not come back."""
        with self._lock:
            self._members -= set(ranks)
            self._decide_all()

    def leave(self, rank: int, why: str) -> None:
        """Record that a rank has ended in good order; operations that still need it fail."""
        with self._lock:
            self._left[rank] = why
            self._decide_all()

    def join(self, rank: int) -> None:
        """A rank begins its script: what is decided is replayed to it, what is not waits for it, too."""
        with self._lock:
            self._left.pop(rank, None)
            self._members.add(rank)

    def _decide_all(self) -> None:
        for number, operation in self._operations.items():
            self._decide(number, operation)

    def _decide(self, number: int, operation: _Operation) -> None:
        if operation.result is not None or not operation.waiting:
            return
        missing = self._members - set(operation.contributions)
        gone = sorted(missing & set(self._left))
        if gone:
            failure = CollectiveMismatchError(
                f"collective #{number} ({operation.kind}) needs rank {gone[0]}, which {self._left[gone[0]]}; "
                "every rank must make the same calls in the same order."
            )
            self._resolve(operation, failure)
        elif not missing:
            ranks = sorted(self._members & set(operation.contributions))
            operation.result = Gathered(payloads={rank: operation.contributions[rank] for rank in ranks})
            operation.contributions = dict.fromkeys(operation.contributions, b"")
            self._resolve(operation, operation.result)

    @staticmethod
    def _resolve(operation: _Operation, answer: Gathered | CollectiveMismatchError) -> None:
        waiting, operation.waiting = operation.waiting, []
        resolve(waiting, answer)


class ControlCollectives:
    """A rank's side: barrier, broadcast and gather of small objects over all ranks of the job.

    Args:
        channel: Connection to the coordinator.
        rank: This process's global rank.
        timeout_seconds: Longest wait for all ranks to arrive.
    """

    def __init__(self, channel: Channel, rank: int, timeout_seconds: float):
        self._channel, self._rank, self._timeout_seconds = channel, rank, timeout_seconds
        self._number = 0

    def gather(self, kind: str, payload: bytes) -> dict[int, bytes]:
        """Exchange bytes.

        Args:
            kind: Name of the operation, the same on every rank.
            payload: This rank's contribution.

        Returns:
            Contribution by global rank, in rank order; retired ranks are absent.

        Raises:
            CollectiveMismatchError: The ranks called different operations, or one has already left.
            ControlPlaneTimeoutError: Some ranks did not arrive in time; they are named.
        """
        number = self._number
        self._number += 1
        request = Gather(number=number, kind=kind, rank=self._rank, payload=payload)
        try:
            return self._channel.call(request, timeout_seconds=self._timeout_seconds).payloads
        except ControlPlaneTimeoutError:
            missing = self._channel.call(GetMissingRanks(number=number), timeout_seconds=10.0).ranks
            raise ControlPlaneTimeoutError(
                f"rank {self._rank} waited {self._timeout_seconds:g} s in collective #{number} ({kind}) for ranks "
                f"{missing}; raise collective_timeout_sec if they legitimately need longer."
            ) from None

    def barrier(self, name: str = "") -> None:
        """Wait until every rank has arrived."""
        self.gather(f"barrier({name})" if name else "barrier", b"")

    def broadcast_object(self, obj: Any, src_rank: int = 0) -> Any:
        """Return the object of ``src_rank`` on every rank.

        Raises:
            CollectiveMismatchError: ``src_rank`` is not part of the job.
        """
        payload = _encode(obj) if self._rank == src_rank else b""
        gathered = self.gather(f"broadcast(src={src_rank})", payload)
        if src_rank not in gathered:
            raise CollectiveMismatchError(
                f"broadcast from rank {src_rank}: the job has ranks {sorted(gathered)}; it was retired or never existed."
            )
        return obj if self._rank == src_rank else _decode(gathered[src_rank])

    def all_gather_object(self, obj: Any) -> list[Any]:
        """Collect one object per rank, in rank order."""
        return [_decode(part) for part in self.gather("all_gather", _encode(obj)).values()]

    def gather_by_rank(self, obj: Any) -> dict[int, Any]:
        """Collect one object per rank, keyed by global rank."""
        return {rank: _decode(part) for rank, part in self.gather("all_gather", _encode(obj)).items()}


def _encode(obj: Any) -> bytes:
    """An object of the script, as data where it is data; other objects are pickled, between ranks that know the token."""
    if _is_data(obj):
        with contextlib.suppress(UnicodeEncodeError):  # half of a character pair
            return b"d" + msgspec.msgpack.encode(obj)
    return b"p" + pickle.dumps(obj)


def _decode(payload: bytes) -> Any:
    return msgspec.msgpack.decode(payload[1:]) if payload[:1] == b"d" else pickle.loads(payload[1:])


def _is_data(obj: Any, depth: int = 0) -> bool:
    """Whether MessagePack gives an equal object of the same types back."""
    kind = type(obj)
    if kind is int:
        return bool(-(2**63) <= obj < 2**64)
    if depth > _MAX_DEPTH:
        return False
    if kind is list:
        return all(_is_data(item, depth + 1) for item in obj)
    if kind is dict:
        return all(type(key) is str and _is_data(value, depth + 1) for key, value in obj.items())
    return kind in (bool, float, str, bytes, type(None))


def one_per_replica(values: dict[int, Any], tensor_parallel_size: int) -> Sequence[Any]:
    """Keep the value of each replica's first rank: the ranks of a TP group hold the same data.

    Args:
        values: Value by global rank.
        tensor_parallel_size: Ranks per replica.

    Returns:
        One value per replica, in replica order.
    """
    return [value for rank, value in sorted(values.items()) if rank % tensor_parallel_size == 0]
