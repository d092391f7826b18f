"""Acts on what is said of devices: a replica leaves one that is about to fail, and is ended on one that has."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator

from lightning_gpuorch.supervisor.node import Node
from lightning_gpuorch.supervisor.replica import Replica, ReplicaState
from lightning_gpuorch.supervisor.restart_policy import FailureKind, FailureRecoveryManager
from lightning_gpuorch.supervisor.retirement import retire
from lightning_gpuorch.supervisor.workers import Worker

log = logging.getLogger(__name__)


class DeviceDrain:
    """Drains the replicas of a node from devices that are about to fail.

    Args:
        node: The node.
        recovery: Decides.
    """

    def __init__(self, node: Node, recovery: FailureRecoveryManager):
        self._node, self._recovery = node, recovery
        self._seen_verdicts: set[tuple[int, int, str]] = set()

    def check(self) -> Iterator[tuple[Worker, str]]:
        """Follow new verdicts; yields workers whose device has failed, and what shows it."""
        node = self._node
        for rank, said in node.state().verdicts.items():
            key = (rank, said.generation, said.verdict)
            if key in self._seen_verdicts or rank not in node.workers:
                continue
            if said.generation != node.replicas.of(rank).generation:
                continue
            self._seen_verdicts.add(key)
            evidence = "; ".join(said.evidence)
            if said.verdict == "failed":
                yield node.workers[rank], evidence
            else:
                self._drain(rank, evidence)
        for replica in node.replicas:
            if replica.state is ReplicaState.DRAINING and time.monotonic() > replica.drain_deadline:
                late = next((node.workers[rank] for rank in replica.ranks if rank in node.workers), None)
                if late is not None:
                    yield late, f"{replica.drain_reason}; it did not leave in time"

    def on_left(self, replica: Replica) -> None:
        """A rank of a draining replica has left; the last one decides what follows."""
        node = self._node
        group = node.group_of(replica.ranks[0])
        if any(peer in node.workers for peer in group):
            return
        reason = replica.drain_reason
        node.client.end_generation(replica.index, replica.generation, {}, {})
        homeless = [rank for rank in group if node.local(rank) not in node.devices.holders]
        if all(node.devices.replace(node.local(rank)) is not None for rank in homeless):
            node.restarts += 1
            node.record("restart", replica=replica.index, reason=f"{reason}; moved to a spare device", ranks=group)
            log.warning("%s; replica %d goes on, on a spare device", reason, replica.index)
            node.next_generation(group, replica.generation + 1)
        else:
            retire(node, replica.index, group, reason)

    def _drain(self, rank: int, evidence: str) -> None:
        """Have a replica hand back what it has not begun, and leave before its device fails."""
        node = self._node
        replica = node.replicas.of(rank)
        decision = self._recovery.decide(FailureKind.GPU_DRAIN, rank, evidence)
        log.warning("%s; replica %d finishes what it holds", decision.reason, replica.index)
        node.record("drain", reason=decision.reason)
        node.devices.condemn(node.local(rank), evidence)
        if replica.state is not ReplicaState.DRAINING:  # else another device of it is about to fail, too
            replica.drain(decision.reason, time.monotonic() + node.config.exit_timeout_sec)
            node.client.let_go(replica.index, replica.generation)
