"""A simulated job: nodes with a supervisor and ranks, which are models, under faults, from its first launch to the last.

A supervisor here sends what the product's supervisor sends, in its order; a rank leases, takes its step times, commits parts
through the product's store of parts, and reports. What a supervisor decides about its own workers is not simulated.
"""

from __future__ import annotations

import contextlib
import functools
import random
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from lightning_gpuorch.control.coordinator import Coordinator
from lightning_gpuorch.control.messages.base import Request, Sender
from lightning_gpuorch.control.messages.collectives import Gather
from lightning_gpuorch.control.messages.leases import (
    ChunkDone,
    CloseJob,
    Lease,
    NextChunk,
    OpenJob,
    Pause,
    Stop,
)
from lightning_gpuorch.control.messages.nodes import (
    AbortJob,
    DrainReplica,
    EndGeneration,
    EndRank,
    GetJobState,
    JobState,
    JoinNode,
    LeaveNode,
    RetireReplica,
)
from lightning_gpuorch.control.messages.ranks import DrainJob, RegisterRank
from lightning_gpuorch.errors import (
    EXIT_DATA_MISSING,
    EXIT_FAILURE,
    EXIT_RESUMABLE,
    EXIT_STORAGE,
    ControlPlaneError,
    ControlPlaneTimeoutError,
    GPUOrchError,
    NodeRankTakenError,
    OtherJobError,
)
from lightning_gpuorch.paths import ObjectPath
from lightning_gpuorch.predictions import LoaderLayout, Manifest, PartStore, StoredBatch
from lightning_gpuorch.predictions.storage import stores
from lightning_gpuorch.supervisor.outcome import decide_outcome
from lightning_gpuorch.testing.simulation.history import History
from lightning_gpuorch.testing.simulation.virtual import (
    Host,
    Network,
    Process,
    Script,
    SimulatedStore,
    VirtualTime,
    Wait,
)

LEASE_TERM_SECONDS, NODE_TIMEOUT_SECONDS, TIMEOUT_SECONDS, EXIT_TIMEOUT_SECONDS = 30.0, 300.0, 30.0, 60.0
COLLECTIVE_TIMEOUT_SECONDS, START_TIMEOUT_SECONDS, FOREVER_SECONDS = 1800.0, 900.0, 1e9
MAX_RESTARTS = 3
MAX_LAUNCHES = 20
LONGEST_BACK_OFF_SECONDS = 300.0
POLL_SECONDS = 0.5
KINDS = (
    "kill",
    "kill",
    "lose",
    "drain",
    "cut short",
    "cut long",
    "replace",
    "restart node 0",
    "store down",
    "store slow",
    "stop",
)


@dataclass(frozen=True)
class Scenario:
    """What is simulated; what is not given is drawn from the seed."""

    seed: int
    num_faults: int = 10
    nodes: tuple[int, int] | None = None
    replicas: int | None = None
    num_chunks: int | None = None

    @property
    def command(self) -> str:
        """What replays it."""
        words = [f"python -m lightning_gpuorch.testing.simulate --seed {self.seed} --faults {self.num_faults}"]
        words += [f"--nodes {self.nodes[0]}:{self.nodes[1]}"] if self.nodes else []
        words += [f"--replicas {self.replicas}"] if self.replicas else []
        words += [f"--chunks {self.num_chunks}"] if self.num_chunks else []
        return " ".join(words)


@dataclass(eq=False)
class Node:
    """A machine with a node rank: its supervisor, and the ranks of its replicas. Machine 0 is that of the coordinator."""

    number: int
    machine: int
    supervisor: Process | None = None
    watch: Process | None = None
    name: str = ""
    run_id: str = ""
    state: JobState | None = None
    heard: float = 0.0
    end: GPUOrchError | None = None
    signalled: bool = False
    replicas: dict[int, Replica] = field(default_factory=dict)
    launches: int = 0


@dataclass
class Replica:
    """The ranks of a replica, in one of its lives."""

    index: int
    generation: int
    ranks: dict[int, Process] = field(default_factory=dict)
    ended: deque[tuple[int, int]] = field(default_factory=deque)
    codes: dict[int, int] = field(default_factory=dict)
    in_step: tuple[int, tuple[int, int]] | None = None
    restarts: int = 0
    progress: int = 0
    is_over: bool = False
    starts_at: float | None = None


class Simulation:
    """One job of a scenario, with its faults.

    Args:
        scenario: What is simulated.

    Attributes:
        history: What has happened, and what was wrong.
    """

    def __init__(self, scenario: Scenario):
        self.scenario, rng = scenario, random.Random(scenario.seed)
        self._rng, self.time = rng, VirtualTime()
        most = scenario.nodes[1] if scenario.nodes else rng.randint(1, 5)
        self.min_nodes, self.max_nodes = scenario.nodes or (rng.randint(1, most), most)
        self.replicas_per_node = scenario.replicas or rng.randint(1, 3)
        self.tensor_parallel_size = rng.choice((1, 1, 2))
        self.batch_size, self.batches_per_chunk = rng.choice((2, 3)), rng.randint(1, 3)
        chunk_size = self.batch_size * self.batches_per_chunk
        num_chunks = scenario.num_chunks or rng.randint(1, 60)
        self.num_samples = max(1, num_chunks * chunk_size - rng.randrange(chunk_size))
        self.step_seconds = rng.choice((0.2, 1.0, 5.0))
        self.ends_with_barrier = rng.random() < 0.5
        grows = rng.random() < 0.3
        self._manifest = Manifest(
            loaders=[
                LoaderLayout(
                    unit="sample", num_units=self.num_samples, batch_size=self.batch_size, chunk_size=chunk_size,
                    first_chunks=max(1, num_chunks // 4) if grows else None,
                )
            ],
            created=0.0,
        )  # fmt: skip
        self._directory = ObjectPath(f"memory://simulation-{scenario.seed}", "job")
        self.store = SimulatedStore(self._directory.root, self.time, rng)
        self.store.failing, self.store.losing = rng.choice((0.0, 0.01, 0.1)), rng.choice((0.0, 0.01, 0.1))
        self.history = History(self._directory, self.num_samples, lambda: self.time.now, self._unseen)
        self.host = Host(self.time, self.history)
        self.network = Network(self.time, rng, self.host)
        self.network.losing, self.network.doubling = rng.choice((0.0, 0.01, 0.05)), rng.choice((0.0, 0.01, 0.1))
        self.network.slow = rng.choice((0.0, 0.001, 0.02))
        self.nodes = [Node(number, number) for number in range(self.max_nodes)]
        self._num_machines = self.max_nodes
        self.num_launches = 0
        self.code: int | None = None
        self._run_count = 0
        self._longest_outage = 100.0 if grows else 500.0  # what is decided for long waits on a real clock
        work = num_chunks * self.batches_per_chunk * self.step_seconds
        self._expected_seconds = 30.0 + work / (self.min_nodes * self.replicas_per_node)
        self._limit_seconds = 3600.0 + 20 * self._expected_seconds + scenario.num_faults * 1000.0

    @contextlib.contextmanager
    def _unseen(self) -> Iterator[None]:
        store, now, state = self.store, self.time.now, self._rng.getstate()
        kept = store.down_until, store.failing, store.losing
        store.down_until = store.failing = store.losing = 0.0
        try:
            yield
        finally:
            store.down_until, store.failing, store.losing = kept
            self.time.now = now
            self._rng.setstate(state)

    def run(self) -> None:
        """Run the job, launch after launch, until it is complete."""
        with stores.in_place(self._directory.root, self.store):
            for _ in range(self.scenario.num_faults):
                kind = self._rng.choice(KINDS)
                self.time.after(self._rng.uniform(0, 2 * self._expected_seconds), functools.partial(self._strike, kind))
            while self.num_launches < MAX_LAUNCHES and self.code != 0:
                self._launch()
                limit = self.time.now + self._limit_seconds
                if not self.time.run(
                    lambda: self.code is not None and not any(n.supervisor for n in self.nodes), limit
                ):
                    self.history.wrong(f"it has not ended after {self._limit_seconds:.0f} s")
                    return
                self.host.stop()
            if self.code == 0:
                self.history.check_results()
            else:
                self.history.wrong(f"it is not complete after {self.num_launches} launches")

    def _launch(self) -> None:
        self.num_launches += 1
        self.code = None
        self.history.tell(f"launch {self.num_launches}")
        back_off = min(LONGEST_BACK_OFF_SECONDS, 2.0**self.num_launches)
        for node in self.nodes:
            late = node.number >= self.min_nodes and self._rng.random() < 0.7
            delay = self._rng.uniform(0, self._expected_seconds) if late else self._rng.uniform(0, 3)
            self.time.after(back_off + delay, functools.partial(self._start_node, node))

    # Faults

    def _strike(self, kind: str) -> None:
        rng, now = self._rng, self.time.now
        up = [node for node in self.nodes if node.supervisor is not None]
        others = [node for node in up if node.number]
        ranks = [rank for node in up for r in node.replicas.values() for rank in r.ranks.items()]
        if self.code is None and not self._can_strike(kind, bool(others), bool(ranks)):
            self.time.after(rng.uniform(1, 20), lambda: self._strike(kind))  # it waits for its target
            return
        self.history.tell(f"FAULT {kind}")
        if kind == "kill" and ranks:
            rank, process = rng.choice(ranks)
            process.kill()
            self._replica_of(rank).ended.append((rank, -9))
        elif kind == "lose" and others:
            node = rng.choice(others)
            self._power_off(node)
            if rng.random() < 0.7:
                self.time.after(rng.choice((1.0, 20.0, 100.0, 400.0)), functools.partial(self._start_node, node))
        elif kind == "drain" and others:
            rng.choice(others).signalled = True
        elif kind.startswith("cut") and others:
            seconds = (
                rng.uniform(1, LEASE_TERM_SECONDS) if kind == "cut short" else rng.uniform(LEASE_TERM_SECONDS, 500)
            )
            self._cut(rng.choice(others), seconds)
        elif kind == "replace" and others:
            self._replace(rng.choice(others))
        elif kind == "restart node 0" and self.nodes[0].supervisor is not None and self.code is None:
            self._power_off(self.nodes[0])
            self.host.stop()
            self.time.after(rng.uniform(1, 60), lambda: self._start_node(self.nodes[0]))
        elif kind == "store down":
            self.store.down_until = now + rng.uniform(1, self._longest_outage)
        elif kind == "store slow":
            self.store.slow_until = now + rng.uniform(1, 300)
        elif kind == "stop":
            self.nodes[0].signalled = True

    def _can_strike(self, kind: str, others: bool, ranks: bool) -> bool:
        if kind == "kill":
            return ranks
        if kind == "restart node 0":
            return self.nodes[0].supervisor is not None
        return others or self.max_nodes == 1 or kind.startswith("st")

    def _cut(self, node: Node, seconds: float) -> None:
        self.history.tell(f"node {node.number} is cut off for {seconds:.0f} s")
        self.network.cut_until[node.machine] = self.time.now + seconds

    def _replace(self, node: Node) -> None:
        """A machine that cannot be reached is taken for lost, and goes on: another one begins with its node rank."""
        self._cut(node, self._rng.uniform(1, 500))
        other = self.nodes[node.number] = Node(node.number, self._num_machines, launches=100 + self._num_machines)
        self._num_machines += 1
        self.time.after(self._rng.uniform(1, 60), lambda: self._start_node(other))

    def _replica_of(self, rank: int) -> Replica:
        index = rank // self.tensor_parallel_size
        return self.nodes[index // self.replicas_per_node].replicas[index]

    def _power_off(self, node: Node) -> None:
        self.history.tell(f"node {node.number} is gone")
        for process in (node.supervisor, node.watch, *(p for r in node.replicas.values() for p in r.ranks.values())):
            if process is not None:
                process.kill()
        node.supervisor = node.watch = None
        node.replicas = {}

    # Supervisors

    def _start_node(self, node: Node) -> None:
        if node.supervisor is not None or self.code is not None:
            return
        node.launches += 1
        node.name, node.run_id = f"{node.number}.{node.launches}", ""
        node.signalled, node.state, node.end, node.heard = False, None, None, self.time.now
        if node.number == 0:
            self._run_count += 1
            coordinator = Coordinator(
                self.replicas_per_node * self.tensor_parallel_size, background=self._in_background, num_nodes=self.max_nodes,
                min_nodes=self.min_nodes, lease_term_seconds=LEASE_TERM_SECONDS, node_timeout_seconds=NODE_TIMEOUT_SECONDS,
                clock=lambda: self.time.now,
            )  # fmt: skip
            self.host.start(coordinator, f"run-{self._run_count}")
        self.history.tell(f"the supervisor {node.name} starts")
        node.supervisor = Process(self.time, self._supervise(node), lambda end: self._on_supervisor_end(node, end))

    def _in_background(self, name: str, task: Any) -> None:
        self.time.after(self._rng.uniform(0, 0.05), task)

    def _on_supervisor_end(self, node: Node, end: Any) -> None:
        code = end.exit_code if isinstance(end, GPUOrchError) else end
        self.history.tell(f"the supervisor {node.name} ends with {code}: {end}")
        self._power_off(node)
        if node.number == 0:
            self.code = code
            self.host.stop()
        elif self.code is None and node is self.nodes[node.number]:
            self.time.after(self._rng.uniform(1, 100), lambda: self._start_node(node))

    def _ask(self, node: Node, request: Request[Any], timeout_seconds: float = TIMEOUT_SECONDS) -> Wait:
        patience = max(START_TIMEOUT_SECONDS, NODE_TIMEOUT_SECONDS)
        return self.network.call(node.machine, request, timeout_seconds, patience, node.run_id)

    def _supervise(self, node: Node) -> Script:
        joined = yield from self._join(node)
        node.run_id, first = joined.run_id, joined.first_rank // self.tensor_parallel_size
        if joined.is_late:
            return (yield from self._leave(node, {}))
        node.watch = Process(self.time, self._watch(node), lambda end: setattr(node, "end", end))
        node.replicas = {
            index: Replica(index, joined.generation, starts_at=self.time.now)
            for index in range(first, first + self.replicas_per_node)
        }
        drains_until = leaves_until = float("inf")
        while not all(replica.is_over for replica in node.replicas.values()):
            yield self.time.sleep(POLL_SECONDS)
            now = self.time.now
            if node.number == 0:
                self._check_terms()
            if isinstance(node.end, (NodeRankTakenError, OtherJobError)):
                raise node.end
            if now - node.heard > NODE_TIMEOUT_SECONDS:
                raise ControlPlaneError("the coordinator is silent")
            state = node.state
            if state is None:
                continue
            if state.lost:
                raise ControlPlaneError("the coordinator has given this node up")
            if node.signalled and leaves_until == drains_until == float("inf"):
                if node.number and not state.draining:
                    leaves_until = now + EXIT_TIMEOUT_SECONDS
                    yield from self._begin_drain(node)
                else:
                    yield self._ask(node, DrainJob())
            if state.draining:
                drains_until = min(drains_until, now + EXIT_TIMEOUT_SECONDS)
            if state.abort_code is not None or now > drains_until or (state.draining and not state.has_jobs):
                self._end_all(node, state.abort_code or EXIT_RESUMABLE)
            for replica in list(node.replicas.values()):
                if now > leaves_until and not replica.is_over:
                    yield from self._give_up(node, replica)
                elif not replica.is_over:
                    yield from self._look_after(node, replica, leaves_until < float("inf"), drains_until < float("inf"))
        codes = {rank: code for replica in node.replicas.values() for rank, code in replica.codes.items()}
        if node.number:
            return (
                yield from self._leave(node, codes, leaves_until < float("inf") and EXIT_RESUMABLE in codes.values())
            )
        return (yield from self._conclude(node, codes))

    def _join(self, node: Node) -> Script:
        size = self.replicas_per_node * self.tensor_parallel_size
        deadline = self.time.now + START_TIMEOUT_SECONDS
        request = JoinNode(
            node=node.number, supervisor=node.name, ranks=size, min_nodes=self.min_nodes, max_nodes=self.max_nodes,
            run_id=self.host.run_id,
        )  # fmt: skip
        while True:
            try:
                return (yield self._ask(node, request, 5.0))
            except ControlPlaneTimeoutError:
                if node.signalled or self.time.now > deadline:
                    raise

    def _leave(self, node: Node, codes: dict[int, int], drained: bool = False) -> Script:
        while True:
            try:
                request = LeaveNode(node=node.number, supervisor=node.name, codes=codes, drained=drained)
                return (yield self._ask(node, request, 5.0)).exit_code
            except ControlPlaneTimeoutError:
                pass

    def _watch(self, node: Node) -> Script:
        while True:
            try:
                node.state = yield self._ask(node, GetJobState(node=node.number, supervisor=node.name))
                node.heard = self.time.now
            except (NodeRankTakenError, OtherJobError):
                raise
            except ControlPlaneError as error:
                self.history.tell(f"{node.name}: {error}")
            yield self.time.sleep(1.0)

    def _check_terms(self) -> None:
        def check() -> None:
            if self.host.coordinator is not None:
                given_up = self.host.coordinator.nodes.check_terms()
                if given_up:
                    self.history.tell(f"nodes {given_up} are given up")

        self.host.turn(check)

    def _conclude(self, node: Node, codes: dict[int, int]) -> Script:
        coordinator = self.host.coordinator
        assert coordinator is not None
        while coordinator.nodes.others_present():
            yield self.time.sleep(POLL_SECONDS)
            self._check_terms()
        found = {*codes.values(), *coordinator.nodes.codes().values()}
        if coordinator.nodes.lost_ranks():
            found |= {EXIT_FAILURE}
        store_is_down = self.time.now < self.store.down_until
        end = decide_outcome(coordinator, found, node.signalled or bool(coordinator.nodes.drained()))
        self.history.tell(f"ranks have ended with {sorted(found)}: exit code {end.exit_code}")
        self.history.concluded(end.exit_code, found, store_is_down)
        coordinator.nodes.conclude(end.exit_code)
        until = self.time.now + LEASE_TERM_SECONDS
        while coordinator.nodes.absent() and self.time.now < until:
            yield self.time.sleep(POLL_SECONDS)
        yield self.time.sleep(0.1)
        return end.exit_code

    def _end_all(self, node: Node, code: int) -> None:
        for replica in node.replicas.values():
            self._end_ranks(replica, code)
            replica.is_over = True

    def _end_ranks(self, replica: Replica, code: int) -> None:
        for process in replica.ranks.values():
            process.kill()
        replica.ranks.clear()
        first = replica.index * self.tensor_parallel_size
        replica.codes = {**dict.fromkeys(range(first, first + self.tensor_parallel_size), code), **replica.codes}

    def _begin_drain(self, node: Node) -> Script:
        self.history.tell(f"node {node.number} drains")
        has_jobs = (yield self._ask(node, GetJobState(node=node.number, supervisor=node.name))).has_jobs
        for replica in node.replicas.values():
            if replica.ranks and has_jobs:
                yield self._ask(node, DrainReplica(replica=replica.index, generation=replica.generation))
            elif not replica.is_over:
                yield from self._give_up(node, replica)

    def _give_up(self, node: Node, replica: Replica) -> Script:
        self._end_ranks(replica, EXIT_RESUMABLE)
        replica.is_over = True
        ended = EndGeneration(replica=replica.index, generation=replica.generation, blamed={}, positions={})
        yield self._ask(node, ended)
        yield self._ask(node, RetireReplica(replica=replica.index))

    def _look_after(self, node: Node, replica: Replica, leaves: bool, drains: bool) -> Script:
        """Start a replica when it is time, and act on its ranks that have ended."""
        if replica.starts_at is not None and self.time.now >= replica.starts_at and not (leaves or drains):
            replica.starts_at = None
            first = replica.index * self.tensor_parallel_size
            for rank in range(first, first + self.tensor_parallel_size):
                if rank not in replica.codes:
                    self._start_rank(node, replica, rank)
        while replica.ended and not replica.is_over:
            rank, code = replica.ended.popleft()
            replica.ranks.pop(rank, None)
            yield from self._on_exit(node, replica, rank, code, leaves, drains)
        if not replica.ranks and replica.starts_at is None:
            replica.is_over = True

    def _on_exit(self, node: Node, replica: Replica, rank: int, code: int, leaves: bool, drains: bool) -> Script:
        state = yield self._ask(node, GetJobState(node=node.number, supervisor=node.name))
        ended = EndGeneration(replica=replica.index, generation=replica.generation, blamed={}, positions={})
        if code == 0 and rank not in state.open_ranks:
            replica.codes[rank] = 0
            yield self._ask(node, EndRank(rank=rank, why="has ended"))
        elif code == EXIT_RESUMABLE and leaves:
            if not replica.ranks:
                yield from self._give_up(node, replica)
        elif code in (EXIT_RESUMABLE, EXIT_DATA_MISSING, EXIT_STORAGE):
            replica.codes[rank] = code
            yield self._ask(node, EndRank(rank=rank, why=f"ended with exit code {code}"))
            if not replica.ranks:
                yield self._ask(node, ended)
            if code == EXIT_STORAGE:
                self._end_ranks(replica, EXIT_RESUMABLE)
                yield self._ask(node, DrainJob())
        else:
            yield from self._on_failure(node, replica, code, leaves, drains, state)

    def _on_failure(
        self, node: Node, replica: Replica, code: int, leaves: bool, drains: bool, state: JobState
    ) -> Script:
        for process in replica.ranks.values():
            process.kill()
        replica.ranks.clear()
        replica.ended.clear()
        progress = state.progress_by_replica.get(replica.index, 0)
        if progress > replica.progress:
            replica.progress, replica.restarts = progress, 0
        replica.restarts += 1
        spent = replica.restarts > MAX_RESTARTS
        blamed = {} if replica.in_step is None or code >= 0 or spent else {(0, 0): replica.in_step[0]}
        positions = {(0, 0): replica.in_step[1]} if blamed and replica.in_step else {}
        request = EndGeneration(
            replica=replica.index, generation=replica.generation, blamed=blamed, positions=positions
        )
        yield self._ask(node, request)
        if leaves:
            yield from self._give_up(node, replica)
        elif drains:
            replica.codes[replica.index * self.tensor_parallel_size] = EXIT_RESUMABLE
        elif spent:
            replica.codes[replica.index * self.tensor_parallel_size] = EXIT_FAILURE
            yield self._ask(node, RetireReplica(replica=replica.index))
            others = any(not r.is_over for r in node.replicas.values() if r is not replica)
            coordinator = self.host.coordinator
            if not others and not node.number and coordinator and not coordinator.nodes.others_present():
                yield self._ask(node, AbortJob(code=EXIT_FAILURE))
        else:
            replica.generation += 1
            replica.codes.clear()
            replica.starts_at = self.time.now + self._rng.uniform(1, 10)

    # Ranks

    def _start_rank(self, node: Node, replica: Replica, rank: int) -> None:
        sender = Sender(rank=rank, replica=replica.index, generation=replica.generation)
        life = RankLife(self, node, replica, sender)

        def on_end(end: Any) -> None:
            if replica.generation == sender.generation:
                replica.ended.append((rank, end.exit_code if isinstance(end, GPUOrchError) else end))
            if isinstance(end, GPUOrchError):
                self.history.tell(f"rank {rank}: {end}")

        life.process = replica.ranks[rank] = Process(self.time, life.script(), on_end)

    def open_request(self, sender: Sender) -> OpenJob:
        """How a rank opens the job."""
        return OpenJob(
            sender=sender, job=0, directory=str(self._directory), storage_options={}, ephemeral=False,
            manifest=self._manifest.to_dict(), part_bytes=10**9, part_seconds=10.0, resume_check="sampled",
        )  # fmt: skip

    def part_store(self) -> PartStore:
        """A rank's writer of parts."""
        return PartStore(self._directory / "dataloader_0")


class RankLife:
    """A rank from its start to its end: it computes one chunk while it writes others."""

    def __init__(self, simulation: Simulation, node: Node, replica: Replica, sender: Sender):
        self._simulation, self._node, self._replica, self._sender = simulation, node, replica, sender
        self._time, self._run_id = simulation.time, node.run_id
        self._is_leader = sender.rank % simulation.tensor_parallel_size == 0
        self._unwritten = 0
        self._failure: GPUOrchError | None = None
        self._store = simulation.part_store()
        self.process: Process | None = None

    def _ask(self, request: Request[Any], timeout_seconds: float = TIMEOUT_SECONDS) -> Wait:
        patience = NODE_TIMEOUT_SECONDS if self._node.number else TIMEOUT_SECONDS
        return self._simulation.network.call(self._node.machine, request, timeout_seconds, patience, self._run_id)

    def script(self) -> Script:
        """What the rank does."""
        simulation, sender = self._simulation, self._sender
        yield self._time.sleep(simulation._rng.uniform(0.5, 5))
        yield self._ask(RegisterRank(sender=sender, tensor_parallel_size=simulation.tensor_parallel_size))
        yield self._barrier(0)
        opened = yield self._ask(simulation.open_request(sender), FOREVER_SECONDS)
        layout = Manifest.from_dict(opened.manifest).loaders[0]
        sequence, block = 0, False
        while True:
            if block:
                yield from self._flush()
            request = NextChunk(sender=sender, job=0, loader=0, sequence=sequence, block=block)
            answer = yield self._ask(request, FOREVER_SECONDS if block else TIMEOUT_SECONDS)
            sequence, block = sequence + 1, isinstance(answer, Pause)
            if isinstance(answer, Lease):
                layout = layout.with_stretches(answer.stretches) if answer.stretches else layout
                yield from self._compute(answer.chunk, layout)
            elif not block:
                break
        yield from self._flush()
        if not isinstance(answer, Stop):
            return EXIT_RESUMABLE
        yield self._ask(CloseJob(sender=sender, job=0), FOREVER_SECONDS)
        if simulation.ends_with_barrier:
            yield self._barrier(1)
        return 0

    def _barrier(self, number: int) -> Wait:
        request = Gather(number=number, kind="barrier", rank=self._sender.rank, payload=b"")
        return self._ask(request, COLLECTIVE_TIMEOUT_SECONDS)

    def _compute(self, chunk: int, layout: LoaderLayout) -> Script:
        simulation, began = self._simulation, self._time.now
        batches = []
        for units in layout.batches_of_chunk(chunk):
            self._replica.in_step = (chunk, (units.start, units.stop))
            yield self._time.sleep(simulation.step_seconds * simulation._rng.uniform(0.8, 1.3))
            batches.append(StoredBatch(units.start, list(units), len(units), list(units)))
        self._replica.in_step = None
        if self._is_leader:
            self._unwritten += 1
            seconds = self._time.now - began
            self._time.after(0.0, lambda: self._write(chunk, batches, seconds))

    def _write(self, chunk: int, batches: list[StoredBatch], seconds: float) -> None:
        """What the writer's thread does."""
        assert self.process is not None
        if not self.process.alive or self._failure is not None:
            return
        sender = self._sender
        writer = (self._run_id, sender.replica, sender.generation)
        metadata = dict(zip(("run", "replica", "generation"), writer, strict=True))
        try:
            won = self._store.commit(chunk, batches, metadata)
        except GPUOrchError as error:
            failure = error
            self._simulation.history.unknown.add(chunk)
            self._time.after(0.0, lambda: self._reported(None, failure))
            return
        self._simulation.history.committed(chunk, writer, won)
        samples = sum(len(batch.output) for batch in batches)
        request = ChunkDone(
            sender=sender,
            job=0,
            loader=0,
            chunk=chunk,
            won=won,
            samples=samples,
            num_bytes=8 * samples,
            seconds=seconds,
        )
        self._time.after(0.0, lambda: self._report(request))

    def _report(self, request: ChunkDone) -> None:
        assert self.process is not None
        if self.process.alive:
            self._ask(request)(self._reported)

    def _reported(self, answer: Any, error: GPUOrchError | None) -> None:
        self._unwritten -= 1
        self._failure = self._failure or error

    def _flush(self) -> Script:
        while self._unwritten and self._failure is None:
            yield self._time.sleep(0.1)
        if self._failure is not None:
            raise self._failure
