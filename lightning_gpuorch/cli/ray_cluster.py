"""``gpuorch run --cluster ray``: a driver that runs one supervisor on each node of a Ray cluster.

Ray says which nodes there are, and reserves their devices; chunks and results are this package's. The steps of a launch:

1. An actor reserves the devices of a node. The first one that answers is node 0; the others follow it.
2. It runs ``gpuorch run`` with a node rank as a process of its own, and hands its lines and its exit code to the driver.
3. A node that is lost frees its node rank for the next one. With node 0 the launch ends, and the next one goes on from
   what is durable.
"""

from __future__ import annotations

import logging
import os
import secrets
import signal
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from lightning_gpuorch.cli.ray_node import Offer, Progress, RayNode
from lightning_gpuorch.config import OrchestratorConfig
from lightning_gpuorch.control.node_places import describe_nodes
from lightning_gpuorch.errors import (
    EXIT_CONFIGURATION,
    EXIT_RESUMABLE,
    FINAL_EXIT_CODES,
    ConfigurationError,
    ControlPlaneError,
)

log = logging.getLogger(__name__)

_POLL_SECONDS = 1.0
_RESERVE_SECONDS = 60.0
"""A node whose devices are not free for so long gives way to another one."""
_END_SECONDS = 30.0
"""For the other nodes to end, when node 0 has."""
_MAX_LAUNCHES = 6
_MAX_FAILURES = 3
"""Of a supervisor on one node, in one launch."""


class NodeRanks:
    """Which node of the cluster has which node rank.

    Args:
        num_nodes: Node ranks.
    """

    def __init__(self, num_nodes: int):
        self._free = deque(range(num_nodes))
        self._by_node: dict[str, int] = {}
        self._failures: Counter[str] = Counter()
        self._done: set[str] = set()

    @property
    def num_free(self) -> int:
        """Node ranks that no node has."""
        return len(self._free)

    def is_welcome(self, node: str) -> bool:
        """Whether a node without a rank may be given one."""
        return node not in self._by_node and node not in self._done and self._failures[node] < _MAX_FAILURES

    def take(self, node: str) -> int:
        """Give a node the node rank that is free the longest: the smallest one, or that of a node that was lost."""
        self._by_node[node] = rank = self._free.popleft()
        return rank

    def release(self, node: str, code: int | None) -> None:
        """The supervisor of a node has ended, or the node is lost.

        Args:
            node: The node.
            code: Exit code of its supervisor; None if it is lost.
        """
        if code == 0 or code in FINAL_EXIT_CODES - {EXIT_CONFIGURATION}:
            self._done.add(node)  # it was told to leave, or how the job has ended
        else:
            self._failures[node] += 1
        if node not in self._by_node:
            return
        rank = self._by_node.pop(node)
        if code == EXIT_CONFIGURATION:  # perhaps another supervisor has the node rank: that is known when it is silent
            self._free.append(rank)
        else:  # its place is taken over, so that nobody waits for the one that is lost
            self._free.appendleft(rank)

    def exclude(self, node: str) -> None:
        """Give a node no rank."""
        self._done.add(node)


@dataclass
class _Member:
    """A node that is reserved, or is asked for.

    Attributes:
        node: Ray's name of it.
        actor: Its actor.
        ask: Asks the actor for what it has to say next; may be asked again.
        since: When it was asked for.
        rank: Its node rank, once it has one.
        answer: What the actor will say next.
        pause_until: When it can be reached again, perhaps.
    """

    node: str
    actor: Any
    ask: Callable[[], Any]
    since: float = field(default_factory=time.monotonic)
    rank: int | None = None
    answer: Any = None
    pause_until: float = 0.0

    def __post_init__(self) -> None:
        self.answer = self.ask()

    def follow(self, ask: Callable[[], Any]) -> None:
        """Ask the next question."""
        self.ask, self.answer = ask, ask()


class RayDriver:
    """Runs a script on the nodes of a Ray cluster.

    Args:
        target: Absolute path of the script, and its arguments.
        arguments: Options of ``gpuorch run`` that all nodes have.
        num_nodes: The fewest nodes, and the most.
        accelerator: ``cpu``, ``gpu``, ``cuda``, or ``auto`` for what the cluster has.
        num_devices: Devices of each node.
        config: Settings; those of the environment are passed on to all nodes.
        address: Address of the cluster, as ``ray.init`` takes it.
    """

    def __init__(
        self,
        target: list[str],
        arguments: list[str],
        num_nodes: tuple[int, int],
        accelerator: str,
        num_devices: int,
        config: OrchestratorConfig,
        address: str,
    ):
        self._target, self._arguments, self._config, self._address = target, arguments, config, address
        self._min_nodes, self._max_nodes = num_nodes
        self._accelerator, self._num_devices = accelerator, num_devices
        self._environment = _settings(os.environ, config.token or secrets.token_hex(16))
        self._signals: list[int] = []
        self._members: list[_Member] = []
        self._asked: dict[str, float] = {}
        self._problem, self._is_exhausted, self._waits = "", False, False

    def run(self) -> int:
        """Run the job to its end.

        Returns:
            The exit code of node 0.

        Raises:
            ConfigurationError: There is no such cluster, or no Ray here.
            ControlPlaneError: No node could be had in time, or node 0 was lost too often.
        """
        self._ray = _connect(self._address)
        self._choose_devices()
        previous = {number: signal.signal(number, self._remember) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            self._ask_for_nodes(self._max_nodes)
            for launch in range(_MAX_LAUNCHES):
                if launch:
                    log.warning("node 0 is lost; the job starts again on the nodes that are left, from what is durable")
                code = self._launch()
                if code is not None:
                    return code
            raise ControlPlaneError(
                f"node 0 was lost {_MAX_LAUNCHES} times; the same command goes on from what is durable"
            )
        finally:
            self._ask_for_nodes(0)
            for number, handler in previous.items():
                signal.signal(number, handler)
            self._ray.shutdown()

    def _choose_devices(self) -> None:
        if self._accelerator == "auto":
            self._accelerator = "gpu" if self._ray.cluster_resources().get("GPU") else "cpu"
        self._resource = "CPU" if self._accelerator == "cpu" else "GPU"
        self._here = self._ray.get_runtime_context().get_node_id()

    def _ask_for_nodes(self, num_nodes: int) -> None:
        """Tell the autoscaler of the cluster, if it has one, how many nodes are of use."""
        from ray.autoscaler.sdk import request_resources

        try:
            request_resources(bundles=[{self._resource: self._num_devices}] * num_nodes)
        except (self._ray.exceptions.RayError, RuntimeError) as error:  # the job needs no autoscaler
            log.warning("the autoscaler is not asked for %d nodes: %s", num_nodes, error)

    def _launch(self) -> int | None:
        """Run the job until node 0 has ended.

        Returns:
            Its exit code; None if it is lost.
        """
        self._ranks, self._main, passed_on = NodeRanks(self._max_nodes), ("", 0), 0
        deadline = time.monotonic() + self._config.start_timeout_sec
        try:
            while True:
                if len(self._signals) > passed_on:
                    passed_on = len(self._signals)
                    if not self._stop():
                        return EXIT_RESUMABLE
                elif not self._signals:
                    self._reserve()
                    self._check_start(deadline)
                for member in self._answered():
                    code = self._advance(member)
                    if member.rank == 0 and member not in self._members:
                        self._see_off_others(code)
                        is_lost = code is None or code < 0
                        return EXIT_RESUMABLE if is_lost and self._signals else None if is_lost else code
        finally:
            for member in self._members:
                self._ray.kill(member.actor)
            self._members.clear()

    def _stop(self) -> bool:
        """Send SIGTERM to node 0, which stops the whole job; whether there is a node 0."""
        main = [member for member in self._members if member.rank == 0]
        for member in main:
            member.actor.terminate.remote()
        return bool(main)

    def _reserve(self) -> None:
        """Ask for nodes that have enough devices: for one alone until there is a node 0, the driver's own if it can be."""
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        for member in [m for m in self._members if m.rank is None and time.monotonic() - m.since > _RESERVE_SECONDS]:
            log.info("%s of the cluster has no %d %s free", member.node, self._num_devices, self._resource)
            self._drop(member)
        present = {
            node["NodeID"] for node in self._ray.nodes() if node["Alive"] and self._is_large_enough(node["Resources"])
        }
        if not present and not self._has_main and not self._members and not self._waits:
            self._waits = True
            log.warning("no node of the cluster has %d %s; waiting for one", self._num_devices, self._resource)
        present -= {member.node for member in self._members}
        nodes = [node for node in present if self._ranks.is_welcome(node)]
        self._is_exhausted = bool(present) and not nodes
        nodes.sort(key=lambda node: (self._asked.get(node, 0.0), node != self._here, node))
        num_pending = sum(member.rank is None for member in self._members)
        num_wanted = (self._ranks.num_free if self._has_main else 1) - num_pending
        for node in nodes[: max(0, num_wanted)]:
            self._asked[node] = time.monotonic()
            there = NodeAffinitySchedulingStrategy(node, soft=False)
            devices = {f"num_{self._resource.lower()}s": self._num_devices}
            actor = (
                self._ray.remote(RayNode)
                .options(scheduling_strategy=there, **devices)
                .remote(self._target[0], os.getcwd())
            )
            self._members.append(_Member(node, actor, actor.offer.remote))

    @property
    def _has_main(self) -> bool:
        return self._main[1] > 0

    def _is_large_enough(self, resources: Mapping[str, float]) -> bool:
        return resources.get(self._resource, 0) >= self._num_devices

    def _check_start(self, deadline: float) -> None:
        if self._has_main or self._members:
            return
        if self._is_exhausted:
            raise ConfigurationError(f"no node of the Ray cluster can run the job. The last one: {self._problem}")
        if time.monotonic() > deadline:
            raise ControlPlaneError(
                f"no node of the Ray cluster had {self._num_devices} {self._resource} free within "
                f"{self._config.start_timeout_sec:g} s: use fewer --devices, or more or larger nodes."
            )

    def _answered(self) -> list[_Member]:
        """Nodes that have something to say; waits a moment for them."""
        asked = [member.answer for member in self._members if member.pause_until <= time.monotonic()]
        if not asked:
            time.sleep(_POLL_SECONDS)
            return []
        answers, _ = self._ray.wait(asked, num_returns=len(asked), timeout=_POLL_SECONDS)
        return [member for member in self._members if member.answer in answers]

    def _advance(self, member: _Member) -> int | None:
        """Take what a node says, and ask it what comes next; it is no member any more when it has ended or is lost.

        Returns:
            The exit code of its supervisor, when that has ended.
        """
        try:
            answer = self._ray.get(member.answer)
        except self._ray.exceptions.ActorUnavailableError:  # Ray finds out whether it is lost
            member.pause_until = time.monotonic() + _POLL_SECONDS
            member.follow(member.ask)
            return None
        except self._ray.exceptions.RayError as error:
            cause = error.cause if isinstance(error, self._ray.exceptions.RayTaskError) else error
            name = f"node {member.rank}" if member.rank is not None else "a node"
            self._problem = f"{name} ({member.node} of the cluster) is lost: {' '.join(str(cause).split())}"
            log.warning("%s", self._problem)
            self._drop(member)
            self._ranks.release(member.node, None)
            return None
        if isinstance(answer, Offer):
            self._begin(member, answer)
            return None
        assert isinstance(answer, Progress)
        _print(member.rank or 0, answer)
        if answer.code is None:
            member.follow(member.actor.follow.remote)
            return None
        log.info("node %s ends with exit code %d", member.rank, answer.code)
        self._drop(member)
        self._ranks.release(member.node, answer.code)
        return answer.code

    def _begin(self, member: _Member, offer: Offer) -> None:
        if offer.problem:
            self._problem = f"{member.node} of the cluster, at {offer.address}, takes no part: {offer.problem}."
            log.warning("%s", self._problem)
            self._ranks.exclude(member.node)
            self._drop(member)
            return
        member.rank = self._ranks.take(member.node)
        if member.rank == 0:
            self._main = (offer.address, offer.port)
        log.info("node %d is %s at %s", member.rank, member.node, offer.address)
        nodes = describe_nodes(self._min_nodes, self._max_nodes)
        arguments = [
            "run", "--accelerator", self._accelerator, "--devices", str(self._num_devices), "--num-nodes", nodes,
            "--node-rank", str(member.rank), "--main-address", self._main[0], "--main-port", str(self._main[1]),
            *self._arguments, "--", *self._target,
        ]  # fmt: skip
        member.follow(partial(member.actor.start.remote, arguments, self._environment))

    def _see_off_others(self, code: int | None) -> None:
        """Let the other nodes end by themselves when node 0 has told them how the job ends."""
        deadline = time.monotonic() + (_END_SECONDS if code is not None and code >= 0 else 0.0)
        for member in [member for member in self._members if member.rank is None]:
            self._drop(member)
        while self._members and time.monotonic() < deadline:
            for member in self._answered():
                self._advance(member)

    def _drop(self, member: _Member) -> None:
        self._asked[member.node] = time.monotonic()  # others come first
        self._ray.kill(member.actor)
        self._members.remove(member)

    def _remember(self, number: int, frame: Any) -> None:
        self._signals.append(number)


def _connect(address: str) -> Any:
    try:
        import ray
    except ImportError as error:
        raise ConfigurationError(f"--cluster ray needs Ray: pip install 'lightning_gpuorch[ray]' ({error}).") from error
    try:
        ray.init(address=address)
    except (ConnectionError, ValueError) as error:
        raise ConfigurationError(f"--address {address}: no Ray cluster is reached there: {error}") from error
    return ray


def _settings(environment: Mapping[str, str], token: str) -> dict[str, str]:
    """Settings of the driver's environment, which all nodes have."""
    return {name: value for name, value in environment.items() if name.startswith("GPUORCH_")} | {
        "GPUORCH_TOKEN": token
    }


def _print(rank: int, progress: Progress) -> None:
    """Print what a node has printed, to the same stream; under a prefix, unless it is node 0."""
    prefix = f"node {rank}: " if rank else ""
    if progress.num_dropped:
        log.warning(
            "%d lines of node %d are lost: this process did not ask for them in time", progress.num_dropped, rank
        )
    for number, line in progress.lines:
        print(f"{prefix}{line}", file=sys.stdout if number == 1 else sys.stderr)
    sys.stdout.flush()
