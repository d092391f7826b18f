"""Batches between the loader that gives them and the collector that keeps their outputs.

A batch is done when the loop asks for the next one, or ends: callbacks are through with it then, and what they changed in
the output counts. Before that nothing of it is kept, so a batch whose callback fails, or whose process dies in one, is
computed again.
"""

from __future__ import annotations

import collections
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from lightning_gpuorch.devices.memory.transfer import HostCopy
from lightning_gpuorch.predictions.loading.tickets import Ticket
from lightning_gpuorch.predictions.storage.carried import WithColumns


class State(Enum):
    """How far a batch is."""

    DELIVERED = "delivered"
    """The loader has given it out."""
    COMPUTED = "computed"
    """Its step is over; callbacks see its output, and may change it."""
    DONE = "done"
    """Its output is final, and on its way to the host; the model and the callbacks may use its memory again."""


@dataclass(eq=False)
class BatchInFlight:
    """One batch on its way.

    Attributes:
        ticket: The batch.
        delivered_ns: Reading of :func:`time.perf_counter_ns` when it was there.
        state: How far it is.
        output: What its step returned, while it is COMPUTED.
        lost: Positions in the batch that have no prediction.
        copy: The output on its way to the host, once it is DONE.
        carried: Columns of the input that are stored with the output.
    """

    ticket: Ticket
    delivered_ns: int = field(default_factory=time.perf_counter_ns)
    state: State = State.DELIVERED
    output: Any = None
    lost: frozenset[int] = frozenset()
    copy: HostCopy | None = None
    carried: dict[str, list[Any]] | None = None


class BatchesInFlight:
    """The batches of one rank, in the order in which the loaders give them.

    Args:
        to_host: Starts to copy an output; None on ranks that keep none.
        keep: Takes the output of a batch that is done, on the host.
    """

    def __init__(
        self,
        to_host: Callable[[Any], HostCopy] | None,
        keep: Callable[[Ticket, Any, frozenset[int]], None],
    ):
        self._to_host, self._keep = to_host, keep
        self._batches: collections.deque[BatchInFlight] = collections.deque()
        self._newest: Ticket | None = None

    def append(self, ticket: Ticket) -> None:
        """Take in a batch that the loader is about to give out."""
        self._batches.append(BatchInFlight(ticket))
        self._newest = ticket

    @property
    def newest(self) -> Ticket:
        """The batch that was given out last."""
        assert self._newest is not None
        return self._newest

    @property
    def num_delivered(self) -> int:
        """Batches that are not computed yet."""
        return sum(batch.state is State.DELIVERED for batch in self._batches)

    @property
    def has_done(self) -> bool:
        """Whether there are batches to be handed on."""
        return any(batch.state is State.DONE for batch in self._batches)

    def next_delivered(self) -> BatchInFlight:
        """The batch to be computed next."""
        return next(batch for batch in self._batches if batch.state is State.DELIVERED)

    def computed(self, batch: BatchInFlight, output: Any, lost: frozenset[int]) -> None:
        """Its step is over.

        Args:
            batch: The batch.
            output: What the step returned: the very object that callbacks are given.
            lost: Positions in the batch that ``output`` does not cover.
        """
        assert batch.state is State.DELIVERED
        batch.state, batch.output, batch.lost = State.COMPUTED, output, lost

    def end_computed(self) -> bool:
        """Callbacks are through with the batch in hand: start to copy its output, before the next step can overwrite it.

        Returns:
            Whether there was one.
        """
        ended = [batch for batch in self._batches if batch.state is State.COMPUTED]
        for batch in ended:
            if self._to_host is not None:
                batch.copy = self._to_host(batch.output)
            batch.state, batch.output = State.DONE, None
        return bool(ended)

    def drop_computed(self) -> None:
        """Forget the batch in hand: the loop was left before its end, and another replica will compute it."""
        self._batches = collections.deque(b for b in self._batches if b.state is not State.COMPUTED)

    def collect(self) -> None:
        """Hand on the outputs of all batches that are done; waits for copies that are still on their way."""
        while self._batches and self._batches[0].state is State.DONE:
            batch = self._batches.popleft()
            if batch.copy is not None:
                output = batch.copy.result()
                if batch.carried is not None:
                    output = WithColumns(output, dict(batch.carried))
                self._keep(batch.ticket, output, batch.lost)
