"""The head's side of the supervisors: which nodes take part, who is still heard of, what is to be done everywhere.

Every node has a supervisor, which alone decides about its own workers. It asks the head for what concerns the whole
job, and reports what ended. A node that is not heard of for a lease term loses its leases, in case its work will never
come; it may come back. After ``node_timeout_seconds`` it is given up, and nobody waits for its ranks any more.

A supervisor on the head's own node uses the same requests, without a socket.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from lightning_gpuorch.control.collectives import CollectiveLedger
from lightning_gpuorch.control.transport import Message, answered
from lightning_gpuorch.errors import ConfigurationError

log = logging.getLogger(__name__)


@dataclass
class _Node:
    ranks: list[int]
    heard: float
    expired: bool = False
    lost: bool = False
    codes: dict[int, int] | None = None


class JobHead(Protocol):
    """What supervisors ask about, or have done to, the job: :class:`~lightning_gpuorch.control.coordinator.Head` does it."""

    world_size: int
    tensor_parallel_size: int | None
    gang: bool
    ledger: CollectiveLedger
    chunks_by_replica: dict[int, int]

    @property
    def jobs(self) -> Mapping[int, object]:
        """The predict calls that were opened."""
        ...

    @property
    def needs_every_replica(self) -> bool:
        """Whether the share of a rank cannot be taken over."""
        ...

    @property
    def draining(self) -> bool:
        """Whether no more work is handed out."""
        ...

    @property
    def finished(self) -> bool:
        """Whether every opened predict call is complete."""
        ...

    @property
    def kept_directory(self) -> Path | None:
        """Where results are that somebody wants to keep."""
        ...

    def set_world_size(self, world_size: int) -> None:
        """All nodes have joined."""
        ...

    def expire_leases(self, replica: int) -> int:
        """Take back the leases of a silent replica; returns how many chunks went back."""
        ...

    def let_go(self, replica: int, generation: int) -> None:
        """Hand a replica no more work."""
        ...

    def deaths_in(self, chunks: dict[tuple[int, int], int], positions: dict[tuple[int, int], tuple[int, int]]) -> int:
        """Deaths so far in units of chunks."""
        ...

    def open_ranks(self, ranks: Iterable[int]) -> dict[int, bool]:
        """Ranks that have opened a predict call and not closed it."""
        ...

    def end_generation(
        self,
        replica: int,
        generation: int,
        blamed: dict[tuple[int, int], int] | None = None,
        positions: dict[tuple[int, int], tuple[int, int]] | None = None,
        exception: tuple[str, str] | None = None,
    ) -> int:
        """Take back the leases of a generation that is over."""
        ...

    def retire(self, replica: int) -> None:
        """Give a replica up."""
        ...


class NodeDesk:
    """The head's side.

    Args:
        head: The head.
        num_nodes: Supervisors that will join.
        lease_term_seconds: Silence after which a node's leases go back.
        node_timeout_seconds: Silence after which a node is given up.
        clock: The time; replaced by tests.
    """

    def __init__(
        self,
        head: JobHead,
        num_nodes: int = 1,
        lease_term_seconds: float = 30.0,
        node_timeout_seconds: float = 300.0,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._head, self.num_nodes, self._clock = head, num_nodes, clock
        self._lease_term_seconds, self._node_timeout_seconds = lease_term_seconds, node_timeout_seconds
        self._nodes: dict[int, _Node] = {}
        self._counts: dict[int, int] = {}
        self._joining: list[tuple[int, Future[Message]]] = []
        self._leaving: list[Future[Message]] = []
        self._verdicts: dict[int, dict[str, Any]] = {}
        self._conclusion: int | None = None
        self._run_id = ""
        self.gang_generation = 0
        self.abort_code: int | None = None
        self._lock = threading.RLock()

    # What the head's own supervisor does

    @property
    def complete(self) -> bool:
        """Whether all nodes have joined."""
        return len(self._nodes) == self.num_nodes

    @property
    def missing(self) -> list[int]:
        """Nodes that have not joined."""
        return [node for node in range(self.num_nodes) if node not in self._counts]

    def others_present(self) -> list[int]:
        """Nodes other than the head's that have neither left nor been given up."""
        with self._lock:
            return [n for n, node in self._nodes.items() if n and node.codes is None and not node.lost]

    def codes(self) -> dict[int, int]:
        """Exit codes by rank of the nodes that have left."""
        with self._lock:
            return {rank: code for node in self._nodes.values() for rank, code in (node.codes or {}).items()}

    def lost_ranks(self) -> list[int]:
        """Ranks of nodes that were given up."""
        with self._lock:
            return [rank for node in self._nodes.values() if node.lost for rank in node.ranks]

    def check_terms(self) -> list[int]:
        """Take back the leases of silent nodes, and give up those that are silent for too long.

        Returns:
            Nodes that were given up by this call.
        """
        given_up = []
        with self._lock:
            now = self._clock()
            for number, node in self._nodes.items():
                if number == 0 or node.codes is not None or node.lost:
                    continue
                silent = now - node.heard
                if silent > self._lease_term_seconds and not node.expired:
                    node.expired = True
                    back = sum(self._head.expire_leases(replica) for replica in self._replicas_of(node))
                    log.warning("node %d is silent for %.0f s; its %d chunks in hand go back", number, silent, back)
                if silent > self._node_timeout_seconds or (node.expired and self._only_this_is_waited_for(number)):
                    node.lost = True
                    given_up.append(number)
                    for replica in self._replicas_of(node):
                        self._head.retire(replica)
                    log.error("node %d is given up after %.0f s of silence; the others go on", number, silent)
        return given_up

    def conclude(self, code: int) -> None:
        """Tell all nodes that have left how the job has ended."""
        with self._lock:
            self._conclusion = code
            for waiting in self._leaving:
                waiting.set_result(Message({"exit_code": code}))
            self._leaving.clear()

    def _only_this_is_waited_for(self, number: int) -> bool:
        """Whether all work is done, and every other node has left."""
        others = [n for n, node in self._nodes.items() if n != number and n and node.codes is None and not node.lost]
        return not others and self._head.finished

    def _replicas_of(self, node: _Node) -> list[int]:
        size = self._head.tensor_parallel_size or 1
        return sorted({rank // size for rank in node.ranks})

    def check_replicas_within_nodes(self, tensor_parallel_size: int) -> None:
        """Refuse a replica that would span two nodes.

        Raises:
            ConfigurationError: Some node's ranks cannot be cut into whole replicas.
        """
        for number, node in self._nodes.items():
            if len(node.ranks) % tensor_parallel_size or node.ranks[0] % tensor_parallel_size:
                raise ConfigurationError(
                    f"node {number} has {len(node.ranks)} ranks, which cannot be cut into replicas of "
                    f"tensor_parallel_size={tensor_parallel_size}; the ranks of a tensor-parallel group share a node."
                )

    # What supervisors ask

    def op_node_join(self, request: Message) -> Future[Message]:
        """Take part; answered when all nodes have joined. A repeated request is the same request."""
        number, ranks = int(request.header["node"]), int(request.header["ranks"])
        with self._lock:
            if not 0 <= number < self.num_nodes:
                raise ConfigurationError(f"node {number} is outside a job of {self.num_nodes} nodes.")
            if self._counts.setdefault(number, ranks) != ranks or request.header["num_nodes"] != self.num_nodes:
                raise ConfigurationError(
                    f"node {number} joins with {ranks} ranks and --num-nodes {request.header['num_nodes']}; the head knows "
                    f"{self._counts[number]} and {self.num_nodes}. Two nodes with the same --node-rank?"
                )
            if number == 0:
                self._run_id = str(request.header["run_id"])
            answer: Future[Message] = Future()
            self._joining.append((number, answer))
            if len(self._counts) == self.num_nodes:
                self._seat_all()
            return answer

    def _seat_all(self) -> None:
        if not self._nodes:
            first, now = 0, self._clock()
            for number in range(self.num_nodes):
                self._nodes[number] = _Node(list(range(first, first + self._counts[number])), now)
                first += self._counts[number]
            self._head.set_world_size(first)
        for number, answer in self._joining:
            seat = {"first_rank": self._nodes[number].ranks[0], "world_size": self._head.world_size}
            answer.set_result(Message({**seat, "run_id": self._run_id}))
        self._joining.clear()

    def op_node_state(self, request: Message) -> dict[str, Any]:
        """The state of the job; asking for it renews the leases of the node."""
        number = int(request.header["node"])
        with self._lock:
            node = self._nodes[number]
            node.heard = self._clock()
            if node.expired and not node.lost:
                node.expired = False
                log.info("node %d is heard of again", number)
            return self.state_for(node)

    def state_for(self, node: _Node) -> dict[str, Any]:
        """The fields of :class:`~lightning_gpuorch.control.client.JobState`, for one node."""
        head = self._head
        kept = head.kept_directory
        return {
            "tensor_parallel_size": head.tensor_parallel_size,
            "gang": head.gang,
            "gang_generation": self.gang_generation,
            "needs_every_replica": head.needs_every_replica,
            "draining": head.draining,
            "abort_code": self.abort_code,
            "lost": node.lost,
            "has_jobs": bool(head.jobs),
            "records": None if kept is None else str(kept),
            "chunks_by_replica": dict(head.chunks_by_replica),
            "open_ranks": head.open_ranks(node.ranks),
            "verdicts": {rank: self._verdicts[rank] for rank in node.ranks if rank in self._verdicts},
        }

    def op_node_generation_over(self, request: Message) -> dict[str, Any]:
        """A generation has ended: take back what it holds, and blame what it was computing."""
        header = request.header
        blamed, positions = _read_blame(header["blamed"])
        raised = header.get("exception")
        exception = None if raised is None else (str(raised[0]), str(raised[1]))
        self._head.end_generation(int(header["replica"]), int(header["generation"]), blamed, positions, exception)
        return {}

    def op_node_deaths(self, request: Message) -> dict[str, Any]:
        """Deaths so far in samples that may be to blame for another one."""
        return {"deaths": self._head.deaths_in(*_read_blame(request.header["blamed"]))}

    def op_node_retire(self, request: Message) -> dict[str, Any]:
        """A replica will not come back."""
        self._head.retire(int(request.header["replica"]))
        return {}

    def op_node_drop_ranks(self, request: Message) -> dict[str, Any]:
        """A replica goes on without some of its ranks: nobody waits for them any more."""
        self._head.ledger.retire(int(rank) for rank in request.header["ranks"])
        return {}

    def op_node_rank_left(self, request: Message) -> dict[str, Any]:
        """A rank has ended in good order."""
        self._head.ledger.leave(int(request.header["rank"]), str(request.header["why"]))
        return {}

    def op_node_let_go(self, request: Message) -> dict[str, Any]:
        """Hand a replica no more work."""
        self._head.let_go(int(request.header["replica"]), int(request.header["generation"]))
        return {}

    def op_node_abort(self, request: Message) -> dict[str, Any]:
        """End everything, everywhere."""
        with self._lock:
            self.abort_code = self.abort_code or int(request.header["code"])
        return {}

    def op_node_gang_restart(self, request: Message) -> dict[str, Any]:
        """Restart all ranks of the job together; repeated calls for one generation count once."""
        with self._lock:
            if int(request.header["generation"]) == self.gang_generation:
                self.gang_generation += 1
                for rank in range(self._head.world_size):
                    self._head.end_generation(rank, self.gang_generation - 1)
            return {"generation": self.gang_generation}

    def op_node_left(self, request: Message) -> Future[Message]:
        """All ranks of a node have ended; answered with the job's exit code when it is known."""
        number = int(request.header["node"])
        with self._lock:
            self._nodes[number].codes = {int(rank): int(code) for rank, code in request.header["codes"].items()}
            if self._conclusion is not None:
                return answered({"exit_code": self._conclusion})
            answer: Future[Message] = Future()
            self._leaving.append(answer)
            return answer

    def op_verdict(self, request: Message) -> dict[str, Any]:
        """A rank's device is to be drained, or has failed. Asked by ranks."""
        header = request.header
        with self._lock:
            self._verdicts[int(header["rank"])] = {
                "verdict": header["verdict"],
                "evidence": list(header["evidence"]),
                "generation": int(header["generation"]),
            }
        return {}


def _read_blame(rows: list[list[int]]) -> tuple[dict[tuple[int, int], int], dict[tuple[int, int], tuple[int, int]]]:
    blamed = {(job, loader): chunk for job, loader, chunk, _, _ in rows}
    return blamed, {(job, loader): (start, stop) for job, loader, _, start, stop in rows}
