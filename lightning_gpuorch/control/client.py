"""A supervisor's line to the coordinator: what it asks, what it reports, and what it knows of the job without asking."""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from lightning_gpuorch.control.messages.base import AnswerT, LoaderKey, RaisedException, Request, UnitRange
from lightning_gpuorch.control.messages.nodes import (
    AbortJob,
    DrainReplica,
    DropRanks,
    EndGeneration,
    EndRank,
    GetDeaths,
    GetJobState,
    JobState,
    JoinNode,
    LeaveNode,
    NodeJoined,
    RestartGang,
    RetireReplica,
)
from lightning_gpuorch.control.messages.ranks import DrainJob
from lightning_gpuorch.control.transport import Channel
from lightning_gpuorch.errors import ConfigurationError, ControlPlaneError, NodeRankTakenError, OtherJobError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class NodePlace:
    """Which of the job's machines this is.

    Attributes:
        num_nodes: Machines that may take part.
        node_rank: Which one this is; node 0 hosts the coordinator.
        main_address: Host of node 0.
        main_port: Port of the coordinator; 0 takes a free one, where there is one node only.
        min_nodes: Machines with which the job begins; 0 stands for all.
    """

    num_nodes: int = 1
    node_rank: int = 0
    main_address: str = "127.0.0.1"
    main_port: int = 0
    min_nodes: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.min_nodes <= self.num_nodes:
            raise ConfigurationError(
                f"--num-nodes {self.min_nodes}:{self.num_nodes}: give the fewest nodes first, at least 1, then the most."
            )
        if self.num_nodes < 1 or not 0 <= self.node_rank < self.num_nodes:
            raise ConfigurationError(
                f"node_rank={self.node_rank} is outside a job of {self.num_nodes} nodes; ranks count from 0."
            )
        if self.num_nodes > 1 and not self.main_port:
            raise ConfigurationError("a job of several nodes needs a main port that all of them know.")


class CoordinatorClient:
    """A supervisor's side.

    Args:
        channel: Asks the coordinator.
        node_rank: Which node this is.
        timeout_seconds: Longest wait for an answer of a coordinator that can be reached.
    """

    def __init__(self, channel: Channel, node_rank: int, timeout_seconds: float = 30.0):
        self._channel, self._node_rank, self._timeout_seconds = channel, node_rank, timeout_seconds
        self._supervisor = secrets.token_hex(16)
        self._heard = time.monotonic()

    @property
    def silent_seconds(self) -> float:
        """Time since the last answer of the coordinator."""
        return time.monotonic() - self._heard

    def join(self, num_ranks: int, place: NodePlace, run_id: str, timeout_seconds: float) -> NodeJoined:
        """Take part, and wait until enough nodes do.

        Raises:
            ControlPlaneTimeoutError: Not enough nodes came in time; ask again to be taken for alive.
            ControlPlaneError: The coordinator cannot be reached, or another supervisor has the place.
            ConfigurationError: The coordinator expects something else of this node, or is of another version.
        """
        request = JoinNode(
            node=self._node_rank, supervisor=self._supervisor, ranks=num_ranks, run_id=run_id,
            min_nodes=place.min_nodes or place.num_nodes, max_nodes=place.num_nodes,
        )  # fmt: skip
        return self._ask(request, timeout_seconds)

    def state(self) -> JobState:
        """The state of the job, fresh."""
        return self._ask(GetJobState(node=self._node_rank, supervisor=self._supervisor))

    def deaths_before(self, blamed: dict[LoaderKey, int], positions: dict[LoaderKey, UnitRange]) -> int:
        """How many workers have died in these samples, the most of any sample."""
        return self._ask(GetDeaths(blamed=blamed, positions=positions)).deaths if blamed else 0

    def end_generation(
        self,
        replica: int,
        generation: int,
        blamed: dict[LoaderKey, int],
        positions: dict[LoaderKey, UnitRange],
        exception: RaisedException | None = None,
    ) -> None:
        """Report that a generation is over, with what it was computing, and what the script raised there."""
        request = EndGeneration(
            replica=replica, generation=generation, blamed=blamed, positions=positions, exception=exception
        )
        self._ask(request)

    def retire(self, replica: int) -> None:
        """Report that a replica will not come back."""
        self._ask(RetireReplica(replica=replica))

    def drop_ranks(self, ranks: Sequence[int]) -> None:
        """Report that a replica goes on without some of its ranks."""
        self._ask(DropRanks(ranks=list(ranks)))

    def rank_left(self, rank: int, why: str) -> None:
        """Report that a rank has ended in good order."""
        self._ask(EndRank(rank=rank, why=why))

    def let_go(self, replica: int, generation: int) -> None:
        """Have a replica finish what it holds and leave."""
        self._ask(DrainReplica(replica=replica, generation=generation))

    def drain(self) -> None:
        """Have the whole job finish what it holds and leave."""
        self._ask(DrainJob())

    def abort(self, code: int) -> None:
        """End the whole job now."""
        self._ask(AbortJob(code=code))

    def restart_gang(self, generation: int) -> int:
        """Have all ranks of the job restart together; returns their next generation."""
        return self._ask(RestartGang(generation=generation)).generation

    def leave(self, codes: dict[int, int], timeout_seconds: float, drained: bool = False) -> int:
        """Report how this node's ranks ended; returns the job's exit code, once it is known, or at once that of a drain."""
        request = LeaveNode(node=self._node_rank, supervisor=self._supervisor, codes=codes, drained=drained)
        return self._ask(request, timeout_seconds).exit_code

    def _ask(self, request: Request[AnswerT], timeout_seconds: float | None = None) -> AnswerT:
        answer = self._channel.call(request, timeout_seconds=timeout_seconds or self._timeout_seconds)
        self._heard = time.monotonic()
        return answer


@dataclass
class StateWatch:
    """Keeps the state of the job at hand without making the supervisor wait for a slow network.

    On the coordinator's own node the state is asked for when it is needed; elsewhere a thread asks for it, which is also what
    the coordinator hears of this node.

    Attributes:
        client: Asks the coordinator.
        interval_seconds: Time between two questions; 0 asks when needed.
    """

    client: CoordinatorClient
    interval_seconds: float = 0.0
    _state: JobState | None = None
    _end: ControlPlaneError | None = None
    _stop: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin; the first answer is waited for."""
        self._state = self.client.state()
        if self.interval_seconds:
            self._thread = threading.Thread(target=self._ask, name="gpuorch-state", daemon=True)
            self._thread.start()

    def state(self, fresh: bool = False) -> JobState:
        """The state of the job: the last one known, or one asked for now.

        Raises:
            ControlPlaneError: It is to be fresh, and the coordinator cannot be reached; or this node has no place in the job
                any more.
        """
        if self._end is not None:
            raise self._end
        if fresh or not self.interval_seconds or self._state is None:
            self._state = self.client.state()
        return self._state

    @property
    def records(self) -> str | None:
        """Where the job keeps its results, as far as was told before the coordinator was lost."""
        return self._state.records if self._state is not None else None

    def close(self) -> None:
        """Stop asking."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(5)

    def _ask(self) -> None:
        while not self._stop.wait(self.interval_seconds):
            try:
                self._state = self.client.state()
            except (NodeRankTakenError, OtherJobError) as error:
                self._end = error
                return
            except ControlPlaneError as error:
                log.debug("the coordinator does not answer: %s", error)
