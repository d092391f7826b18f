"""Gives a replica up that cannot go on, or lets the last one go on with the devices it has left."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from lightning_gpuorch.errors import EXIT_FAILURE
from lightning_gpuorch.supervisor.node import Node

log = logging.getLogger(__name__)


def retire(node: Node, index: int, group: Sequence[int], reason: str) -> None:
    """Give a replica up; the job ends if no replica is left to do its part.

    Args:
        node: Its node.
        index: The replica.
        group: Ranks that end with it.
        reason: For the log.
    """
    node.workers.kill(group)
    if _shrink(node, index, group, reason):
        return
    node.record("retire", replica=index, reason=reason, ranks=list(group))
    for replica in node.replicas.replicas_of(group):
        replica.retire(EXIT_FAILURE)
    node.client.retire(index)
    freed = node.devices.release(map(node.local, group))
    if freed:
        log.info("%s can serve other replicas now", ", ".join(map(str, freed)))
    state = node.state(fresh=True)
    left = len(node.workers) + len(node.pending_starts.ranks)
    whole = state.gang or state.needs_every_replica
    if (left or node.rendezvous.others_present()) and not whole:
        log.error("%s; replica %d is retired, %d workers go on", reason, index, left)
        return
    # The others may have done their own part already, and left: that is not what went wrong.
    log.error("%s; %s", reason, "no other replica can do its part" if whole else "no replica is left to go on")
    node.client.abort(EXIT_FAILURE)


def _shrink(node: Node, index: int, group: Sequence[int], reason: str) -> bool:
    """Let a replica that would be retired go on with the devices it has left; only the last one, and if allowed."""
    state = node.state(fresh=True)
    size = state.tensor_parallel_size or 1
    others = node.workers or node.pending_starts or node.rendezvous.others_present()
    healthy = [rank for rank in group if node.local(rank) in node.devices.holders]
    if not node.config.allow_tensor_parallel_shrink or others or state.gang or len(healthy) == len(group):
        return False
    left = max((n for n in range(1, len(healthy) + 1) if size % n == 0), default=0)
    if not left:
        return False
    node.devices.release(map(node.local, group))
    replica = node.replicas.of(group[0])
    dropped = replica.shrink(left)
    for rank in replica.ranks:
        node.devices.replace(node.local(rank))
    node.client.drop_ranks(dropped)
    node.restarts += 1
    reason = f"{reason}; going on with {left} of {size} ranks"
    node.record("restart", replica=index, reason=reason, ranks=replica.ranks)
    log.warning("%s", reason)
    node.begin(replica.ranks)
    return True
