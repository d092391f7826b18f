"""This node's part in the job as a whole: host the coordinator or reach it, join, and learn how everything ended."""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable
from pathlib import Path

from lightning_gpuorch.config import OrchestratorConfig
from lightning_gpuorch.control.addresses import unix_address
from lightning_gpuorch.control.client import CoordinatorClient, NodePlace, StateWatch
from lightning_gpuorch.control.coordinator import Coordinator
from lightning_gpuorch.control.handshake import Peer, require_token
from lightning_gpuorch.control.messages.nodes import JobState, NodeJoined
from lightning_gpuorch.control.server import ControlServer
from lightning_gpuorch.control.tls import Certificates
from lightning_gpuorch.control.transport import Channel, LocalChannel, RemoteChannel
from lightning_gpuorch.errors import ControlPlaneError, ControlPlaneTimeoutError
from lightning_gpuorch.supervisor.job_end import recorded_exit_code, what_is_lacking

log = logging.getLogger(__name__)

_POLL_SECONDS = 0.02
_ASK_SECONDS = 5.0


class Rendezvous:
    """A node's place in a job.

    Args:
        config: Settings.
        place: Which of the job's machines this is.
        num_workers: Workers of this node.
        run_id: Name of the run; node 0's counts.
        directory: A directory of this user's alone, for the socket of a job on one node.
        tensor_parallel_size: Ranks per replica, if known before the script says so.
        on_event: Told of what the coordinator sees, as ``on_event(kind, **fields)``.

    Attributes:
        coordinator: The coordinator, on node 0.
        client: Asks the coordinator.
        control: Address of the coordinator, for this node's workers.
        token: The job's shared secret.
        first_rank: Global rank of this node's first worker, once :meth:`join` has returned.
        first_generation: Which generation of this node's ranks is the first; another supervisor may have been here before.
        is_late: The job goes on without this node, which only waits for its end.
        world_size: Ranks in the job.
        run_id: Name of the run.
    """

    def __init__(
        self,
        config: OrchestratorConfig,
        place: NodePlace,
        num_workers: int,
        run_id: str,
        directory: Path,
        tensor_parallel_size: int | None,
        on_event: Callable[..., None],
    ):
        self._config, self.place, self._num_workers = config, place, num_workers
        self.run_id, self.first_rank, self.world_size = run_id, 0, num_workers
        self.first_generation, self.is_late = 0, False
        self.token = config.token or ("" if place.num_nodes > 1 else secrets.token_hex(16))
        if not self.token:
            require_token(config.allow_insecure, f"{place.num_nodes} nodes")
        self.coordinator: Coordinator | None = None
        self._server: ControlServer | None = None
        if place.node_rank == 0:
            self._channel: Channel = self._host_coordinator(directory, tensor_parallel_size, on_event)
        else:
            self.control = f"{place.main_address}:{place.main_port}"
            # Until the coordinator is there, and over cuts of the network, for as long as the coordinator waits for us.
            patience = max(config.start_timeout_sec, config.node_timeout_sec)
            peer = Peer("node", place.node_rank)
            self._channel = RemoteChannel(
                self.control, peer, self.token, patience, certificates=Certificates.of(config)
            )
        self.client = CoordinatorClient(self._channel, place.node_rank, config.timeout_sec)
        self._watch = StateWatch(
            self.client, 0.0 if self.coordinator is not None else min(1.0, config.lease_term_sec / 5)
        )

    def _host_coordinator(
        self, directory: Path, tensor_parallel_size: int | None, on_event: Callable[..., None]
    ) -> Channel:
        config, place = self._config, self.place
        several, certificates = place.num_nodes > 1, Certificates.of(config)
        self.coordinator = Coordinator(
            self._num_workers, config.max_chunk_failures, on_event, num_nodes=place.num_nodes,
            min_nodes=place.min_nodes or place.num_nodes, lease_term_seconds=config.lease_term_sec,
            node_timeout_seconds=config.node_timeout_sec,
        )  # fmt: skip
        self.coordinator.tensor_parallel_size = tensor_parallel_size
        if several:
            address, port = "0.0.0.0", place.main_port
        else:
            address, port = unix_address(directory) or "127.0.0.1", 0
        self._server = ControlServer(self.coordinator, address, port, self.token, self.run_id, certificates)
        self.control = f"127.0.0.1:{self._server.port}" if several else self._server.address
        return LocalChannel(self.coordinator)

    def join(self) -> None:
        """Join, and wait until the job begins.

        Raises:
            ControlPlaneError: The coordinator cannot be reached, not enough nodes came in time, or another supervisor has
                this node's place.
            ConfigurationError: The nodes do not agree about the job, or run different versions.
        """
        place = self.place
        if place.num_nodes > 1:
            wanted = f"at least {place.min_nodes}" if 0 < place.min_nodes < place.num_nodes else "all"
            log.info("node %d of %d: waiting for %s nodes", place.node_rank, place.num_nodes, wanted)
        joined = self._ask_for_place()
        self.first_rank, self.world_size, self.run_id = joined.first_rank, joined.world_size, joined.run_id
        self.first_generation, self.is_late = joined.generation, joined.is_late
        if isinstance(self._channel, RemoteChannel):
            self._channel.job = joined.run_id
        if not self.is_late:
            self._watch.start()

    @property
    def _ask_seconds(self) -> float:
        """How often is asked again while others are waited for, so as not to be taken for silent."""
        return min(_ASK_SECONDS, self._config.lease_term_sec / 3)

    def _ask_for_place(self) -> NodeJoined:
        """Ask again and again: a supervisor without heartbeats loses its node rank to another one."""
        limit = self._config.start_timeout_sec
        deadline = time.monotonic() + limit
        while True:
            seconds = min(self._ask_seconds, max(0.01, deadline - time.monotonic()))
            try:
                return self.client.join(self._num_workers, self.place, self.run_id, seconds)
            except ControlPlaneTimeoutError:
                if time.monotonic() < deadline:
                    continue
                missing = f", nodes {self.coordinator.nodes.missing} have not" if self.coordinator is not None else ""
                fewest = self.place.min_nodes or self.place.num_nodes
                raise ControlPlaneError(f"fewer than {fewest} nodes have joined within {limit:g} s{missing}") from None

    def code_without_coordinator(self, error: ControlPlaneError) -> int:
        """The exit code of a node that has lost the coordinator, or has not found it: the job's, if that can be known.

        Args:
            error: What has happened to the coordinator; logged with what follows from it.
        """
        config = self._config
        if self.place.node_rank == 0 or type(error) is not ControlPlaneError:
            log.error("%s; this node stops, what it has computed is durable", error)
            return error.exit_code
        if self._watch.records is not None:
            code = recorded_exit_code(self._watch.records, self.run_id, config.storage_options)
            if code is not None:
                log.info("%s; the job has ended with exit code %d, by its records", error, code)
                return code
        elif config.late_node_output_dir:
            lacking = what_is_lacking(config.late_node_output_dir, config.storage_options)
            if lacking is None:
                log.info("%s; all predictions are in %s: the job has ended well", error, config.late_node_output_dir)
                return 0
            log.error("%s; %s; start all nodes again, the job goes on from there", error, lacking)
            return error.exit_code
        log.error(
            "%s; this node stops, what it has computed is durable; if the job has ended meanwhile, "
            "GPUORCH_LATE_NODE_OUTPUT_DIR tells a node that comes late where to look",
            error,
        )
        return error.exit_code

    def state(self, fresh: bool = False) -> JobState:
        """The state of the job: the last one known, or one asked for now."""
        return self._watch.state(fresh)

    def check(self) -> None:
        """On node 0, look after silent nodes; elsewhere, see that the coordinator is there and has not given this node up.

        Raises:
            ControlPlaneError: This node is no longer part of the job.
        """
        if self.coordinator is not None:
            self.coordinator.nodes.check_terms()
        elif self.client.silent_seconds > self._config.node_timeout_sec:
            raise ControlPlaneError(
                f"the coordinator at {self.control} is silent for {self.client.silent_seconds:.0f} s"
            )
        if self.state().lost:
            raise ControlPlaneError("the coordinator has given this node up, and goes on without it")

    def others_present(self) -> bool:
        """Whether other nodes may still go on; elsewhere than on node 0 there is at least node 0."""
        return self.coordinator is None or bool(self.coordinator.nodes.others_present())

    def wait_for_others(self, meanwhile: Callable[[], None]) -> None:
        """On node 0: wait until all other nodes have left or were given up; ``meanwhile`` is called again and again."""
        while self.others_present():
            time.sleep(_POLL_SECONDS)
            meanwhile()

    def leave(self, codes: dict[int, int], meanwhile: Callable[[], None], drained: bool = False) -> int:
        """Elsewhere: report how this node's ranks ended.

        Args:
            codes: Exit code by rank.
            meanwhile: Called again and again while others still work.
            drained: This node alone leaves, and does not wait for the end of the job.

        Returns:
            The job's exit code; that of a drain if this node alone leaves.
        """
        while True:
            try:
                return self.client.leave(codes, timeout_seconds=self._ask_seconds, drained=drained)
            except ControlPlaneTimeoutError:
                meanwhile()

    def await_latecomers(self) -> None:
        """On node 0, when the job has ended: a node that was given up may come back for the exit code."""
        if self.coordinator is None:
            return
        deadline = time.monotonic() + self._config.lease_term_sec
        while self.coordinator.nodes.absent() and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)

    def stop_watching(self) -> None:
        """Ask for nothing more; the coordinator goes on serving."""
        self._watch.close()
        self._channel.close()

    def close(self) -> None:
        """Stop serving, too."""
        if self._server is not None:
            self._server.close()
