"""Takes one node out of a job that goes on: its replicas finish what they hold, and the others take the rest."""

from __future__ import annotations

import logging
import time

from lightning_gpuorch.errors import EXIT_RESUMABLE
from lightning_gpuorch.supervisor.node import Node
from lightning_gpuorch.supervisor.replica import Replica, ReplicaState

log = logging.getLogger(__name__)


class NodeDrain:
    """The drain of a node that leaves, because its machine will be taken away.

    Args:
        node: The node.
    """

    def __init__(self, node: Node):
        self._node = node
        self._deadline: float | None = None

    @property
    def under_way(self) -> bool:
        """Whether the node is about to leave."""
        return self._deadline is not None

    @property
    def is_possible(self) -> bool:
        """Whether others can take over: not on the coordinator's node, and not while ranks train or evaluate together."""
        node = self._node
        state = node.state()
        return node.rendezvous.place.node_rank != 0 and not (state.gang or state.needs_every_replica or state.draining)

    def begin(self, reason: str) -> None:
        """Have the node's replicas finish what they hold; those that hold nothing yet are given up at once."""
        node = self._node
        limit = node.config.exit_timeout_sec
        self._deadline = time.monotonic() + limit
        log.info("%s: this node leaves the job within %g s, the others go on", reason, limit)
        node.record("drain", reason=f"node {node.rendezvous.place.node_rank}: {reason}")
        node.pending_starts.cancel()
        has_jobs = node.state(fresh=True).has_jobs
        for replica in node.replicas:
            if replica.state is ReplicaState.RUNNING and has_jobs:
                replica.drain(reason, self._deadline)
                node.client.let_go(replica.index, replica.generation)
            elif not replica.is_over and replica.state is not ReplicaState.DRAINING:
                self._give_up(replica)

    def on_left(self, replica: Replica) -> None:
        """A rank of a replica has left, by itself or not; with the last one the replica is given up."""
        if not any(rank in self._node.workers for rank in replica.live_ranks):
            self._give_up(replica)

    def check_deadline(self) -> None:
        """End what has not left in time."""
        if self._deadline is not None and time.monotonic() > self._deadline:
            self.end_now()

    def end_now(self) -> None:
        """End what has not left yet."""
        for replica in self._node.replicas:
            if not replica.is_over:
                self._give_up(replica)

    def _give_up(self, replica: Replica) -> None:
        node = self._node
        node.workers.kill([rank for rank in replica.live_ranks if rank in node.workers])
        replica.retire(EXIT_RESUMABLE)
        node.client.end_generation(replica.index, replica.generation, {}, {})
        node.client.retire(replica.index)
