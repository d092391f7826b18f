"""Starts a job's workers on this node, watches them, and brings back what dies. Imports neither torch nor Lightning.

One supervisor per node. The one on node 0 hosts the coordinator, so leases and decided collectives outlive every worker.
Workers are grouped into replicas; when a rank dies, its whole replica is killed and started again as the next
*generation*, and no other replica notices. A worker that ends its script with exit code 0 while a job is open counts
as dead. Before a generation starts, its GPUs are checked; a bad one is replaced by a spare, or its replica retired.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import shutil
import socket
import sys
import time
from typing import Any

from lightning_gpuorch.config import OrchestratorConfig
from lightning_gpuorch.control.client import NodePlace
from lightning_gpuorch.control.coordinator import Coordinator
from lightning_gpuorch.control.jobs import remove_ephemeral
from lightning_gpuorch.devices.pool import DevicePool
from lightning_gpuorch.errors import (
    EXIT_DATA_MISSING,
    EXIT_FAILURE,
    EXIT_RESUMABLE,
    ConfigurationError,
    ControlPlaneError,
    WorkerStartError,
    format_indices,
)
from lightning_gpuorch.paths import location
from lightning_gpuorch.predictions.storage.journal import PartJournal, loader_directory
from lightning_gpuorch.predictions.storage.working_copy import working_copy
from lightning_gpuorch.supervisor.failure_handler import FailureHandler
from lightning_gpuorch.supervisor.job_drain import JobDrain, StoppedError
from lightning_gpuorch.supervisor.job_end import SOURCE_OF_NODE_0
from lightning_gpuorch.supervisor.node import Node
from lightning_gpuorch.supervisor.node_drain import NodeDrain
from lightning_gpuorch.supervisor.outcome import Outcome, decide_outcome
from lightning_gpuorch.supervisor.preemption import PreemptionWatch, notice_source
from lightning_gpuorch.supervisor.rendezvous import Rendezvous
from lightning_gpuorch.supervisor.retirement import retire
from lightning_gpuorch.supervisor.workers import Spawner
from lightning_gpuorch.telemetry.command_line import command_line
from lightning_gpuorch.telemetry.events.log import EventLog
from lightning_gpuorch.telemetry.run_directory import (
    create_run_directory,
    keep_records,
    new_run_id,
    records_target,
    report_run,
)

log = logging.getLogger(__name__)

POLL_SECONDS = 0.02


class Supervisor:
    """Runs the workers of a job that are on this node, and on node 0 the coordinator of the job.

    Args:
        spawner: Starts workers.
        num_workers: Workers on this node.
        config: Settings.
        tensor_parallel_size: Ranks per replica, if known before the script says so.
        devices: Devices of the node's ranks, and spares; None where there are none to choose from.
        environment: More variables for the workers.
        place: Which of the job's machines this is.

    Raises:
        ControlPlaneError: The coordinator cannot be reached, or not all nodes came in time.
        ConfigurationError: The nodes do not agree about the job.
    """

    def __init__(
        self,
        spawner: Spawner,
        num_workers: int,
        config: OrchestratorConfig,
        *,
        tensor_parallel_size: int | None = None,
        devices: DevicePool | None = None,
        environment: dict[str, str] | None = None,
        place: NodePlace | None = None,
    ):
        self.place = place = place or NodePlace()
        self._notices = notice_source(config.preemption_notice) if config.preemption_notice else None
        self.config, self.num_workers = config, num_workers
        self.run_id = new_run_id()
        try:
            self.run_directory = create_run_directory(self.run_id)
        except OSError as error:
            raise ConfigurationError(
                f"there is no directory for the records of this run: {error}. Set TMPDIR to one that can be written."
            ) from error
        source = SOURCE_OF_NODE_0 if place.node_rank == 0 else f"supervisor-{place.node_rank}"
        self._events = EventLog(self.run_directory / "events", source)
        self.keep_results = False
        """Leave results nobody asked to keep for :meth:`clean_up_at_exit`: the caller is this process."""
        self._rendezvous = Rendezvous(
            config, place, num_workers, self.run_id, self.run_directory, tensor_parallel_size, self._record
        )
        self._node = Node(
            config, self._rendezvous, spawner, num_workers, devices, self.run_directory, dict(environment or {}),
            self._record,
        )  # fmt: skip
        self._node_drain = NodeDrain(self._node)
        self._job_drain = JobDrain(self._node, self._node_drain)
        self._failures = FailureHandler(self._node, self._job_drain, self._node_drain)
        self._missing: dict[str, Any] = {}

    @property
    def coordinator(self) -> Coordinator | None:
        """The coordinator of the job, on node 0."""
        return self._rendezvous.coordinator

    def add_environment(self, variables: dict[str, str]) -> None:
        """Give more variables to workers that are started from now on."""
        self._node.environment.update(variables)

    def clean_up_at_exit(self) -> None:
        """Remove what :attr:`keep_results` has left: logs now, results when this process ends."""
        shutil.rmtree(self.run_directory, ignore_errors=True)
        if self.coordinator is not None:
            atexit.register(remove_ephemeral, self.coordinator.jobs)

    def run(self) -> int:
        """Run this node's part of the job to its end.

        Returns:
            The exit code of the job: 0 if and only if every opened job is complete.
        """
        node, code = self._node, EXIT_FAILURE
        self._job_drain.install_signal_handlers()
        watch = PreemptionWatch(self._notices, self._job_drain.notice) if self._notices is not None else None
        try:
            with self._job_drain.stopping_at_once():
                self._rendezvous.join()
            self.run_id = self._rendezvous.run_id
            if self._rendezvous.is_late:
                log.info(
                    "the job goes on, or has ended, without this node: it waits for the end, and ends as the job does"
                )
                with self._job_drain.stopping_at_once():
                    code = self._rendezvous.leave({}, meanwhile=lambda: None)
                return code
            self._record(
                "run", world_size=self._rendezvous.world_size, tensor_parallel_size=node.state().tensor_parallel_size or 1,
                command=command_line(sys.argv), run_id=self.run_id, host=socket.gethostname(),
            )  # fmt: skip
            node.begin_all()
            while node.workers or node.pending_starts:
                time.sleep(POLL_SECONDS)
                self._look_around()
            code = self._finish()
        except StoppedError as stopped:
            log.info("%s while the other nodes are waited for: nothing has begun", stopped)
            code = EXIT_RESUMABLE
        except WorkerStartError as error:
            log.error("%s The job ends.", error)
        except ControlPlaneError as error:
            code = self._rendezvous.code_without_coordinator(error)
        finally:
            if watch is not None:
                watch.close()
            node.workers.kill(list(node.workers))
            node.pending_starts.cancel()
            done = (
                {}
                if self.coordinator is None
                else {"samples": sum(job.samples_done for job in self.coordinator.jobs.values())}
            )
            self._record("end", exit_code=code, **done, **self._missing)
            node.workers.close()
            self._rendezvous.stop_watching()
            self._clean_up(code)
            self._job_drain.restore_signal_handlers()  # a signal must not cut the records of a job that has ended
        return code

    def _look_around(self) -> None:
        """One round of watching."""
        node = self._node
        self._follow_requests()
        for start in node.pending_starts.ready() if node.can_start else ():
            for index, why in node.start(start).items():
                retire(node, index, [rank for rank in start.ranks if node.replicas.of(rank).index == index], why)
        self._failures.check_devices()
        for worker, code in node.workers.ended():
            self._failures.on_exit(worker, code)
        self._failures.check_liveness()

    def _follow_requests(self) -> None:
        """Carry out requests, made here or on another node."""
        node = self._node
        self._job_drain.check_signals()
        self._rendezvous.check()
        state = node.state()
        if state.abort_code is not None:
            node.end_all(state.abort_code)
        elif state.gang_generation > node.gang_generation:
            node.restart_gang(state.gang_generation)
        self._job_drain.follow(state)
        self._failures.follow_progress(state.progress_by_replica)

    # The end

    def _finish(self) -> int:
        """This node's ranks have ended: wait for the others, and learn or decide how the job has ended."""
        coordinator = self.coordinator
        if coordinator is None:
            records = self._node.state().records
            if records is not None:
                place = location(records, "records", self.config.storage_options)
                with working_copy(place / "runs" / self.run_id) as copy:
                    keep_records(self.run_directory, copy)
            ended = self._node.replicas.exit_codes
            drained = self._node_drain.under_way and EXIT_RESUMABLE in ended.values()
            return self._rendezvous.leave(ended, meanwhile=self._job_drain.pass_on, drained=drained)
        self._rendezvous.wait_for_others(meanwhile=self._follow_requests)
        codes = {*self._node.replicas.exit_codes.values(), *coordinator.nodes.codes().values()}
        end = decide_outcome(
            coordinator,
            codes | {EXIT_FAILURE} if coordinator.nodes.lost_ranks() else codes,
            self._job_drain.asked_here or bool(coordinator.nodes.drained()),
        )
        self._tell_outcome(end)
        coordinator.nodes.conclude(end.exit_code)
        if not self._job_drain.asked_here:
            with self._job_drain.stopping_at_once(), contextlib.suppress(StoppedError):
                self._rendezvous.await_latecomers()
        return end.exit_code

    def _tell_outcome(self, end: Outcome) -> None:
        missing, code = end.missing, end.exit_code
        if missing is not None:
            self._missing = {"missing_samples": format_indices(missing.indices), "num_missing": len(missing.indices)}
        if end.by_failure and self._node.failures.first is not None:
            log.error("%s", self._node.failures.summary())
        elif end.mismatch is not None:
            log.error("%s", end.mismatch)
        if code == EXIT_RESUMABLE and missing is not None:
            log.info("stopped on request; the same command goes on from here")
        elif missing is not None and code in (EXIT_DATA_MISSING, EXIT_FAILURE):
            log.error("%s", missing)
        retired = len(self.coordinator.retired) if self.coordinator is not None else 0
        if code == 0 and (self._node.restarts or retired):
            log.info("complete after %d restarts; %d replicas retired", self._node.restarts, retired)

    def _record(self, kind: str, **fields: Any) -> None:
        self._events.record(kind, **fields)

    def _clean_up(self, code: int) -> None:
        self._node.hang_detector.close()
        self._events.close()
        coordinator = self.coordinator
        if coordinator is not None:
            for job in coordinator.jobs.values():
                for loader in range(len(job.queues)):  # every writer is gone: what it left half-written can go
                    PartJournal(loader_directory(job.directory, loader)).sweep_temporaries(0.0)
            jobs = [(job.directory, job.ephemeral) for job in coordinator.jobs.values()]
            target = records_target(self.run_id, jobs, self.run_directory)
            if target is not None:
                with working_copy(target) as copy:
                    keep_records(self.run_directory, copy)
                    report_run(copy, target)
        self._rendezvous.close()
        if self.keep_results:
            return
        if coordinator is not None:
            remove_ephemeral(coordinator.jobs, succeeded=code == 0)
        shutil.rmtree(self.run_directory, ignore_errors=True)
