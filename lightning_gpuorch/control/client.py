"""A supervisor's line to the head: what it asks, what it reports, and what it knows of the job without asking."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from lightning_gpuorch.control.leases import RaisedException
from lightning_gpuorch.control.transport import Channel
from lightning_gpuorch.errors import ConfigurationError, ControlPlaneError

log = logging.getLogger(__name__)

JobPosition = tuple[int, int]
"""Job and dataloader."""


@dataclass(frozen=True)
class NodePlace:
    """Which of the job's machines this is.

    Attributes:
        num_nodes: Machines that take part.
        node_rank: Which one this is; node 0 hosts the head.
        main_address: Host of node 0.
        main_port: Port of the head; 0 takes a free one, where there is one node only.
    """

    num_nodes: int = 1
    node_rank: int = 0
    main_address: str = "127.0.0.1"
    main_port: int = 0

    def __post_init__(self) -> None:
        if self.num_nodes < 1 or not 0 <= self.node_rank < self.num_nodes:
            raise ConfigurationError(
                f"node_rank={self.node_rank} is outside a job of {self.num_nodes} nodes; ranks count from 0."
            )
        if self.num_nodes > 1 and not self.main_port:
            raise ConfigurationError("a job of several nodes needs a main port that all of them know.")


@dataclass(frozen=True)
class JobState:
    """What a supervisor has to know of the job.

    Attributes:
        tensor_parallel_size: Ranks per replica, once a rank has said so.
        gang: Whether all ranks restart together.
        gang_generation: How often they did.
        needs_every_replica: Whether nobody can take over a replica's share.
        draining: Whether no more work is handed out.
        abort_code: Exit code with which everything is to end now, if so.
        lost: Whether the head has given this node up.
        has_jobs: Whether any predict call was opened.
        records: Directory for the run's records, where results are kept.
        chunks_by_replica: Chunks made durable.
        open_ranks: By rank of this node that may not leave yet: whether all it has opened is complete.
        verdicts: Last verdict on a rank's device that asks for something.
    """

    tensor_parallel_size: int | None
    gang: bool
    gang_generation: int
    needs_every_replica: bool
    draining: bool
    abort_code: int | None
    lost: bool
    has_jobs: bool
    records: str | None
    chunks_by_replica: dict[int, int]
    open_ranks: dict[int, bool]
    verdicts: dict[int, dict[str, Any]]

    @classmethod
    def from_answer(cls, answer: dict[str, Any]) -> JobState:
        """Read what the head has written, also after a trip through JSON."""
        values = {name: answer[name] for name in cls.__dataclass_fields__}
        for name in ("chunks_by_replica", "open_ranks", "verdicts"):
            values[name] = {int(key): value for key, value in answer[name].items()}
        return cls(**values)


class HeadLink:
    """A supervisor's side.

    Args:
        channel: Line to the head.
        node_rank: Which node this is.
        timeout_seconds: Longest wait for an answer of a head that can be reached.
    """

    def __init__(self, channel: Channel, node_rank: int, timeout_seconds: float = 30.0):
        self._channel, self._node_rank, self._timeout_seconds = channel, node_rank, timeout_seconds
        self._heard = time.monotonic()

    @property
    def silent_seconds(self) -> float:
        """How long the head has not been heard of."""
        return time.monotonic() - self._heard

    def join(self, num_ranks: int, num_nodes: int, run_id: str, timeout_seconds: float) -> tuple[int, int, str]:
        """Take part, and wait until every node does.

        Returns:
            The first global rank of this node, the number of ranks in the job, and the run's name, which is node 0's.

        Raises:
            ControlPlaneError: The head cannot be reached, or not every node came in time.
            ConfigurationError: The head expects something else of this node.
        """
        answer = self._call("node_join", timeout_seconds, ranks=num_ranks, num_nodes=num_nodes, run_id=run_id)
        return int(answer["first_rank"]), int(answer["world_size"]), str(answer["run_id"])

    def state(self) -> JobState:
        """The state of the job, fresh."""
        return JobState.from_answer(self._call("node_state"))

    def deaths_before(self, blamed: dict[JobPosition, int], positions: dict[JobPosition, tuple[int, int]]) -> int:
        """How many workers have died in these samples, the most of any sample."""
        if not blamed:
            return 0
        return int(self._call("node_deaths", blamed=_blame_rows(blamed, positions))["deaths"])

    def end_generation(
        self,
        replica: int,
        generation: int,
        blamed: dict[JobPosition, int],
        positions: dict[JobPosition, tuple[int, int]],
        exception: RaisedException | None = None,
    ) -> None:
        """Report that a generation is over, with what it was computing, and what the script raised there."""
        rows = _blame_rows(blamed, positions)
        self._call("node_generation_over", replica=replica, generation=generation, blamed=rows, exception=exception)

    def retire(self, replica: int) -> None:
        """Report that a replica will not come back."""
        self._call("node_retire", replica=replica)

    def drop_ranks(self, ranks: Sequence[int]) -> None:
        """Report that a replica goes on without some of its ranks."""
        self._call("node_drop_ranks", ranks=list(ranks))

    def rank_left(self, rank: int, why: str) -> None:
        """Report that a rank has ended in good order."""
        self._call("node_rank_left", rank=rank, why=why)

    def let_go(self, replica: int, generation: int) -> None:
        """Have a replica finish what it holds and leave."""
        self._call("node_let_go", replica=replica, generation=generation)

    def drain(self) -> None:
        """Have the whole job finish what it holds and leave."""
        self._call("drain")

    def abort(self, code: int) -> None:
        """End the whole job now."""
        self._call("node_abort", code=code)

    def restart_gang(self, generation: int) -> int:
        """Have all ranks of the job restart together; returns their next generation."""
        return int(self._call("node_gang_restart", generation=generation)["generation"])

    def leave(self, codes: dict[int, int], timeout_seconds: float) -> int:
        """Report how this node's ranks ended; returns the job's exit code, once it is known."""
        answer = self._call("node_left", timeout_seconds, codes={str(rank): code for rank, code in codes.items()})
        return int(answer["exit_code"])

    def _call(self, op: str, timeout_seconds: float | None = None, **fields: Any) -> dict[str, Any]:
        header = {"op": op, "node": self._node_rank, **fields}
        answer = self._channel.call(header, timeout_seconds=timeout_seconds or self._timeout_seconds)
        self._heard = time.monotonic()
        return answer.header


@dataclass
class StateWatch:
    """Keeps the state of the job at hand without making the supervisor wait for a slow network.

    On the head's own node the state is asked for when it is needed; elsewhere a thread asks for it, which is also what
    the head hears of this node.

    Attributes:
        link: Line to the head.
        interval_seconds: Time between two questions; 0 asks when needed.
    """

    link: HeadLink
    interval_seconds: float = 0.0
    _state: JobState | None = None
    _stop: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin; the first answer is waited for."""
        self._state = self.link.state()
        if self.interval_seconds:
            self._thread = threading.Thread(target=self._ask, name="gpuorch-state", daemon=True)
            self._thread.start()

    def state(self, fresh: bool = False) -> JobState:
        """The state of the job: the last one known, or one asked for now.

        Raises:
            ControlPlaneError: It is to be fresh, and the head cannot be reached.
        """
        if fresh or not self.interval_seconds or self._state is None:
            self._state = self.link.state()
        return self._state

    def close(self) -> None:
        """Stop asking."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(5)

    def _ask(self) -> None:
        while not self._stop.wait(self.interval_seconds):
            try:
                self._state = self.link.state()
            except ControlPlaneError as error:
                log.debug("the head does not answer: %s", error)


def _blame_rows(blamed: dict[JobPosition, int], positions: dict[JobPosition, tuple[int, int]]) -> list[list[int]]:
    return [[*key, chunk, *positions[key]] for key, chunk in blamed.items()]
