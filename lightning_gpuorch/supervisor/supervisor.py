"""Starts a job's workers on this node, watches them, and brings back what dies. Imports neither torch nor Lightning.

One supervisor per node. The one on node 0 hosts the coordinator, so leases and decided collectives outlive every worker.
Workers are grouped into replicas; when a rank dies, its whole replica is killed and started again as the next
*generation*, and no other replica notices. A worker that ends its script with exit code 0 while a job is open counts
as dead. Before a generation starts, its GPUs are checked; a bad one is replaced by a spare, or its replica retired.
"""

from __future__ import annotations

import atexit
import dataclasses
import functools
import logging
import os
import shlex
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from lightning_gpuorch.config import OrchestratorConfig
from lightning_gpuorch.control.client import NodePlace
from lightning_gpuorch.control.coordinator import Coordinator
from lightning_gpuorch.control.environment import WorkerEnvironment
from lightning_gpuorch.control.error_record import ErrorRecord
from lightning_gpuorch.control.heartbeat import waits_for_others
from lightning_gpuorch.control.jobs import remove_ephemeral
from lightning_gpuorch.control.messages.nodes import JobState
from lightning_gpuorch.devices.pool import DevicePool
from lightning_gpuorch.errors import (
    EXIT_DATA_MISSING,
    EXIT_FAILURE,
    EXIT_RESUMABLE,
    ControlPlaneError,
    MissingPredictionsError,
    format_indices,
)
from lightning_gpuorch.predictions.storage.journal import PartJournal, loader_directory
from lightning_gpuorch.supervisor.hang_detector import HangDetector
from lightning_gpuorch.supervisor.outcome import Outcome, decide_outcome
from lightning_gpuorch.supervisor.pending_starts import PendingStarts
from lightning_gpuorch.supervisor.rendezvous import Rendezvous
from lightning_gpuorch.supervisor.restart_policy import (
    EXCEPTIONS,
    REPORTED,
    Action,
    Decision,
    Evidence,
    FailureKind,
    FailureRecoveryManager,
    classify,
)
from lightning_gpuorch.supervisor.run_records import FailureLog, failure_record
from lightning_gpuorch.supervisor.workers import Spawner, Worker, Workers, describe_exit
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


@dataclass
class _Leaving:
    """A replica that is to finish what it holds, because a device of it is about to fail."""

    reason: str
    deadline: float


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
        self.config, self.num_workers = config, num_workers
        self.run_id = new_run_id()
        self.run_directory = create_run_directory(self.run_id)
        source = "supervisor" if place.node_rank == 0 else f"supervisor-{place.node_rank}"
        self._events = EventLog(self.run_directory / "events", source)
        self.keep_results = False
        """Leave results nobody asked to keep for :meth:`clean_up_at_exit`: the caller is this process."""
        self._rendezvous = Rendezvous(config, place, num_workers, self.run_id, tensor_parallel_size, self._record)
        self._client = self._rendezvous.client
        self.recovery = FailureRecoveryManager(config.max_restart_attempts, config.enable_auto_restart)
        self._devices = devices or DevicePool.of_indices([None] * num_workers)
        self._environment = dict(environment or {})
        self._spawner = spawner
        self._workers = Workers(spawner, self.run_directory / "errors")
        name = f"gpuorch-{self.run_id}-{place.node_rank}"
        self._hang_detector = HangDetector(config, name, self.run_directory, num_workers, self._local)
        self._generation: dict[int, int] = {}
        self._gang_generation = 0
        self._ended: dict[int, int] = {}
        self._shrunk: dict[int, tuple[int, int]] = {}
        self._pending_starts = PendingStarts(
            self._devices, self._local, config.preflight_timeout_sec if config.enable_preflight else None
        )
        self._leaving: dict[int, _Leaving] = {}
        self._seen_verdicts: set[tuple[int, int, str]] = set()
        self._failures = FailureLog()
        self._raised_at: dict[str, int] = {}
        """Durable chunks of the job when an exception was seen last, by its signature."""
        self._stop_signals: list[int] = []
        self._drain_deadline: float | None = None
        self._progress: dict[int, int] = {}
        self._restarts = 0
        self._missing: dict[str, Any] = {}

    @property
    def coordinator(self) -> Coordinator | None:
        """The coordinator of the job, on node 0."""
        return self._rendezvous.coordinator

    def add_environment(self, variables: dict[str, str]) -> None:
        """Give more variables to workers that are started from now on."""
        self._environment.update(variables)

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
        previous = self._install_signal_handlers()
        code = EXIT_FAILURE
        try:
            self._rendezvous.join()
            self.run_id = self._rendezvous.run_id
            self._record(
                "run", world_size=self._rendezvous.world_size, tensor_parallel_size=self._state.tensor_parallel_size or 1,
                command=shlex.join(sys.argv), run_id=self.run_id, host=socket.gethostname(),
            )  # fmt: skip
            ranks = list(range(self._rendezvous.first_rank, self._rendezvous.first_rank + self.num_workers))
            self._generation = dict.fromkeys(ranks, 0)
            self._begin(ranks)
            while self._workers or self._pending_starts:
                time.sleep(POLL_SECONDS)
                self._look_around()
            code = self._finish()
        except ControlPlaneError as error:
            log.error("%s; this node stops, what it has computed is durable", error)
        finally:
            self._workers.kill(list(self._workers))
            self._pending_starts.cancel()
            done = (
                {}
                if self.coordinator is None
                else {"samples": sum(job.samples_done for job in self.coordinator.jobs.values())}
            )
            self._record("end", exit_code=code, **done, **self._missing)
            for number, handler in previous.items():
                signal.signal(number, handler)
            self._workers.close()
            self._rendezvous.stop_watching()
            self._clean_up(code)
        return code

    @property
    def _state(self) -> JobState:
        return self._rendezvous.state()

    def _look_around(self) -> None:
        """One round of watching."""
        self._follow_requests()
        self._check_pending_starts()
        self._check_verdicts()
        for worker, code in self._workers.ended():
            self._on_exit(worker, code)
        self._check_liveness()

    def _follow_requests(self) -> None:
        """Do what somebody asks for, here or elsewhere."""
        self._check_signals()
        self._check_job()

    def _check_job(self) -> None:
        """Follow what the coordinator and other nodes have decided."""
        self._rendezvous.check()
        state = self._state
        if state.abort_code is not None:
            self._end_all(state.abort_code)
        elif state.gang_generation > self._gang_generation:
            self._restart_gang(state.gang_generation)
        if state.draining:
            self._drain_deadline = self._drain_deadline or time.monotonic() + self.config.exit_timeout_sec
            if not state.has_jobs:  # nobody has begun to work: nothing to finish
                self._end_all(EXIT_RESUMABLE)
        for replica, chunks in state.chunks_by_replica.items():
            if chunks != self._progress.get(replica):
                self._progress[replica] = chunks
                self.recovery.record_progress(replica)

    # PendingStart a generation

    def _begin(self, ranks: Sequence[int]) -> None:
        """Start ranks, as soon as their devices have been checked."""
        self._spawner.prepare()
        self._pending_starts.begin(ranks)

    def _check_pending_starts(self) -> None:
        for start in self._pending_starts.ready():
            size = self._state.tensor_parallel_size or 1
            doomed = {rank // size: why for rank, why in start.faults.items()}
            for rank in start.ranks:
                if rank // size not in doomed:
                    self._start(rank)
            for replica, why in doomed.items():
                self._retire(replica, [r for r in start.ranks if r // size == replica], why)

    def _start(self, rank: int) -> None:
        local = self._local(rank)
        device = self._devices.holders.get(local)
        worker = WorkerEnvironment(
            rank=rank,
            world_size=self._rendezvous.world_size,
            local_rank=local,
            node_rank=self.place.node_rank,
            control=self._rendezvous.control,
            token=self._rendezvous.token,
            generation=self._generation[rank],
            device_index=device.index if device is not None else None,
            run_id=self.run_id,
            host=self.place.main_address if self.place.num_nodes > 1 and not self.place.node_rank else "127.0.0.1",
            heartbeat=self._hang_detector.path,
            run_directory=str(self.run_directory),
            local_world_size=self.num_workers,
            shrunk=self._shrunk.get(rank),
        )
        threads = os.environ.get("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // self.num_workers)))
        self._hang_detector.forget(rank)
        self._workers.start(
            rank, worker.generation, {**self._environment, **worker.variables(), "OMP_NUM_THREADS": threads}
        )

    def _local(self, rank: int) -> int:
        return rank - self._rendezvous.first_rank

    # Watching

    def _on_exit(self, worker: Worker, code: int) -> None:
        rank = worker.rank
        state = self._rendezvous.state(fresh=True)  # what it has closed just now counts
        if code == 0 and rank not in state.open_ranks:
            self._ended[rank] = 0
            self._client.rank_left(rank, "has ended")
            return
        record = worker.error_record()
        progress = sum(state.chunks_by_replica.values())
        repeated = record is not None and self._raised_at.get(record.signature) == progress
        if record is not None:
            self._raised_at[record.signature] = progress
        works = self._hang_detector.have_worked(self._group_of(rank, state))
        evidence = Evidence(
            code,
            record,
            generation=worker.generation,
            has_worked=works,
            in_batch=bool(self._hang_detector.in_work(rank, ())[0]),
            has_open_jobs=rank in state.open_ranks,
            has_closed_jobs=state.has_jobs,
            is_repeated=repeated and not works,
        )
        kind = classify(evidence)
        if kind in REPORTED.values():
            self._on_reported_exit(worker, code, kind)
        else:
            self._on_failure(worker, kind, describe_exit(code) if record is None else record.headline, record=record)

    def _on_reported_exit(self, worker: Worker, code: int, kind: FailureKind) -> None:
        """An end that the worker itself reports, and a restart would only repeat."""
        rank, record = worker.rank, worker.error_record()
        assert record is not None
        replica = rank // (self._state.tensor_parallel_size or 1)
        if kind is FailureKind.STOP_REQUESTED and replica in self._leaving:
            self._on_left(replica, rank)
            return
        self._ended[rank] = code
        self._client.rank_left(rank, f"ended with exit code {code}")
        if not any(peer in self._workers for peer in self._group_of(rank, self._state)):
            self._client.end_generation(replica, self._generation[rank], {}, {})  # what it holds is for others to try
        if kind is FailureKind.STOP_REQUESTED:
            return
        is_missing = record.type == MissingPredictionsError.__name__  # told in full when all ranks have ended
        text = f"rank {rank}: {kind.value}" if is_missing else f"rank {rank}: {record.headline}"
        failure = failure_record(worker, kind.value)
        self._record("failure", **failure)
        if not is_missing:
            self._failures.show(failure, logging.ERROR, text)
        if kind is FailureKind.CONFIGURATION or record.is_final:
            self._client.abort(code)
        elif kind is FailureKind.STORAGE:
            self._begin_drain(kind.value)

    def _on_failure(
        self,
        worker: Worker,
        kind: FailureKind,
        evidence: str,
        in_step: bool = True,
        record: ErrorRecord | None = None,
    ) -> None:
        rank, state = worker.rank, self._rendezvous.state(fresh=True)
        size = state.tensor_parallel_size
        group = self._group_of(rank, state)
        generation = self._generation[rank]
        self.recovery.tensor_parallel_size = size or 1
        by_device = kind in (FailureKind.GPU_FAILED, FailureKind.GPU_DRAIN)
        blamed, positions = self._hang_detector.in_work(rank, group) if in_step and not by_device else ({}, {})
        works = self._hang_detector.have_worked(group)
        complete = state.open_ranks.get(rank, False)
        self._workers.kill(group)
        raised = (
            None if record is None or kind is not FailureKind.STEP_EXCEPTION else (record.signature, record.summary)
        )
        decided = kind
        if kind is not FailureKind.DETERMINISTIC_EXCEPTION and works and self._client.deaths_before(blamed, positions):
            # The replica can compute, and this is not the first death in the same samples: it is their fault.
            decided = FailureKind.POISON
        decision = self.recovery.decide(decided, rank, evidence)
        if kind in EXCEPTIONS:
            decision = dataclasses.replace(decision, reason=f"rank {rank}: {evidence}")
        if decision.action is Action.RETIRE_REPLICA:
            blamed = {}  # it is the replica's fault, not that of what it happened to compute
        for member in {r // (size or 1) for r in group}:
            # Its device is condemned already: the next generation gets another one, or none.
            self._leaving.pop(member, None)
            self._client.end_generation(member, generation, blamed, positions, raised)
        failure = failure_record(worker, evidence)
        self._record("failure", **failure)
        if decision.action is Action.FAIL:
            self._failures.show(failure, logging.ERROR, f"{decision.reason}; the job ends")
            code = (record.exited_with if record is not None else None) or EXIT_FAILURE
            self._ended.update(dict.fromkeys(group, code))
            self._client.abort(code)
            return
        show = functools.partial(self._failures.show, failure)
        if self._drain_deadline is not None:
            show(logging.WARNING, decision.reason)
            self._ended.update(dict.fromkeys(group, EXIT_RESUMABLE))
            return
        if any(self._ended.get(peer) == 0 for peer in self._group_of(rank, state, with_ended=True)):
            # Its peers have left in good order, so they cannot form a group with it again, nor did they need it.
            self._ended[rank] = 0 if complete else EXIT_FAILURE
            show(
                logging.WARNING, f"{decision.reason}; the others of its replica are done, so it is ended, not restarted"
            )
            return
        moved = decision.action is Action.REPLACE_DEVICE and self._pending_starts.replace_device(rank, evidence)
        if decision.action is Action.RESTART_REPLICA and state.gang:
            self._tell_restart(decision, group, show)
            self._restart_gang(self._client.restart_gang(self._gang_generation))
        elif decision.action is Action.RESTART_REPLICA or moved:
            self._tell_restart(decision, group, show)
            self._next_generation(group, generation + 1)
        else:
            show(logging.ERROR, decision.reason)
            self._retire(decision.replica, group, decision.reason)

    def _tell_restart(self, decision: Decision, group: Sequence[int], show: Callable[[int, str], None]) -> None:
        self._restarts += 1
        most = self.recovery.max_restart_attempts
        self._record(
            "restart", replica=decision.replica, reason=decision.reason, attempt=decision.attempt, max_attempts=most,
            ranks=list(group),
        )  # fmt: skip
        show(
            logging.WARNING,
            f"{decision.reason}; restarting replica {decision.replica} (attempt {decision.attempt} of {most})",
        )

    def _next_generation(self, group: Sequence[int], generation: int) -> None:
        for rank in group:
            self._generation[rank] = generation
        self._begin(group)

    def _restart_gang(self, generation: int) -> None:
        """All ranks of the job start again, wherever one has failed: they share one torch.distributed world."""
        self._workers.kill(list(self._workers))
        self._gang_generation = generation
        self._next_generation([rank for rank in self._generation if rank not in self._ended], generation)

    def _retire(self, replica: int, group: Sequence[int], reason: str) -> None:
        self._workers.kill(group)
        if self._shrink(replica, group, reason):
            return
        self._record("retire", replica=replica, reason=reason, ranks=list(group))
        self._ended.update(dict.fromkeys(group, EXIT_FAILURE))
        self._client.retire(replica)
        freed = self._devices.release(map(self._local, group))
        if freed:
            log.info("%s can serve other replicas now", ", ".join(map(str, freed)))
        state = self._rendezvous.state(fresh=True)
        left = len(self._workers) + len(self._pending_starts.ranks)
        whole = state.gang or state.needs_every_replica
        if (left or self._rendezvous.others_present()) and not whole:
            log.error("%s; replica %d is retired, %d workers go on", reason, replica, left)
            return
        # The others may have done their own part already, and left: that is not what went wrong.
        log.error("%s; %s", reason, "nobody else can do its part" if whole else "no replica is left to go on")
        self._client.abort(EXIT_FAILURE)

    def _shrink(self, replica: int, group: Sequence[int], reason: str) -> bool:
        """Let a replica that would be retired go on with the devices it has left; only the last one, and if allowed."""
        state = self._rendezvous.state(fresh=True)
        size, others = (
            state.tensor_parallel_size or 1,
            self._workers or self._pending_starts or self._rendezvous.others_present(),
        )
        healthy = [rank for rank in group if self._local(rank) in self._devices.holders]
        if not self.config.allow_tensor_parallel_shrink or others or state.gang or len(healthy) == len(group):
            return False
        left = max((n for n in range(1, len(healthy) + 1) if size % n == 0), default=0)
        if not left:
            return False
        self._devices.release(map(self._local, group))
        first = replica * size
        stay, go = list(range(first, first + left)), [rank for rank in group if rank >= first + left]
        for rank in stay:
            self._devices.replace(self._local(rank))
        self._shrunk = dict.fromkeys(stay, (left, size))
        for rank in go:
            del self._generation[rank]
        self._client.drop_ranks(go)
        self._restarts += 1
        reason = f"{reason}; going on with {left} of {size} ranks"
        self._record("restart", replica=replica, reason=reason, ranks=stay)
        log.warning("%s", reason)
        self._next_generation(stay, max(self._generation[rank] for rank in stay) + 1)
        return True

    def _check_liveness(self) -> None:
        """Find who is stuck; show where it stands, and treat it as dead."""
        found = self._hang_detector.find_stuck(self._workers)
        if found is None:
            return
        rank, verdict = found
        group = self._group_of(rank, self._state)
        stacks = self._workers.dump_stacks(group)
        reason = verdict.reason
        if not verdict.sure and waits_for_others(stacks[rank]):
            # It waits in a collective: the culprit is who has not come, if anybody stands elsewhere.
            absent = next((r for r, frames in stacks.items() if frames and not waits_for_others(frames)), rank)
            if absent != rank:
                rank, reason = absent, f"rank {rank} waits for it in a collective: {reason}"
        where = stacks[rank]
        self._record("hang", rank=rank, reason=reason, phase=verdict.row.phase.name, stacks=where)
        log.error("rank %d is stuck: %s%s", rank, reason, f"; it stands at\n{where}" if where else "")
        self._on_failure(self._workers[rank], FailureKind.STUCK, reason, in_step=verdict.in_step)

    def _group_of(self, rank: int, state: JobState, with_ended: bool = False) -> list[int]:
        """Ranks of this node that share a fate: a replica; all of them while it is not known, or when training."""
        size = state.tensor_parallel_size
        if size is None or state.gang:
            group = list(self._generation)
        else:
            group = [r for r in range(rank // size * size, rank // size * size + size) if r in self._generation]
        return [r for r in group if with_ended or r not in self._ended or r == rank]

    # Devices that are about to fail, or have

    def _check_verdicts(self) -> None:
        for rank, said in self._state.verdicts.items():
            key = (rank, said.generation, said.verdict)
            if key in self._seen_verdicts or rank not in self._workers or said.generation != self._generation[rank]:
                continue
            self._seen_verdicts.add(key)
            evidence = "; ".join(said.evidence)
            if said.verdict == "failed":
                self._on_failure(self._workers[rank], FailureKind.GPU_FAILED, evidence)
            else:
                self._let_go(rank, evidence)
        for replica, leaving in list(self._leaving.items()):
            if time.monotonic() > leaving.deadline:
                del self._leaving[replica]
                size = self._state.tensor_parallel_size or 1
                late = next((self._workers[r] for r in self._workers if r // size == replica), None)
                if late is not None:  # else it has ended in another way
                    self._on_failure(late, FailureKind.GPU_FAILED, f"{leaving.reason}; it did not leave in time")

    def _let_go(self, rank: int, evidence: str) -> None:
        """Have a replica hand back what it has not begun, and leave before its device fails."""
        replica = rank // (self._state.tensor_parallel_size or 1)
        decision = self.recovery.decide(FailureKind.GPU_DRAIN, rank, evidence)
        log.warning("%s; replica %d finishes what it holds", decision.reason, replica)
        self._record("drain", reason=decision.reason)
        self._devices.condemn(self._local(rank), evidence)
        self._leaving[replica] = _Leaving(decision.reason, time.monotonic() + self.config.exit_timeout_sec)
        self._client.let_go(replica, self._generation[rank])

    def _on_left(self, replica: int, rank: int) -> None:
        """A rank of a replica that was asked to leave has done so; the last one decides what follows."""
        state = self._state
        if any(peer in self._workers for peer in self._group_of(rank, state)):
            return
        leaving, group = self._leaving.pop(replica), self._group_of(rank, state)
        self._client.end_generation(replica, self._generation[rank], {}, {})
        homeless = [r for r in group if self._local(r) not in self._devices.holders]
        if all(self._devices.replace(self._local(r)) is not None for r in homeless):
            self._restarts += 1
            self._record("restart", replica=replica, reason=f"{leaving.reason}; moved to a spare device", ranks=group)
            log.warning("%s; replica %d goes on, on a spare device", leaving.reason, replica)
            self._next_generation(group, self._generation[rank] + 1)
        else:
            self._retire(replica, group, leaving.reason)

    # Stopping on request

    def _install_signal_handlers(self) -> dict[int, Any]:
        if threading.current_thread() is not threading.main_thread():
            return {}

        def remember(number: int, frame: FrameType | None) -> None:
            self._stop_signals.append(number)

        return {number: signal.signal(number, remember) for number in (signal.SIGTERM, signal.SIGINT)}

    def _check_signals(self) -> None:
        if self._stop_signals and self._drain_deadline is None:
            name = signal.Signals(self._stop_signals[0]).name
            log.info("%s: finishing the chunks in hand", name)
            self._begin_drain(name)
        if len(self._stop_signals) > 1 or (self._drain_deadline or float("inf")) < time.monotonic():
            self._end_all(EXIT_RESUMABLE)

    def _begin_drain(self, reason: str) -> None:
        self._drain_deadline = self._drain_deadline or time.monotonic() + self.config.exit_timeout_sec
        self._client.drain()
        self._record("drain", reason=reason)
        self._check_job()

    def _end_all(self, code: int) -> None:
        self._ended.update(dict.fromkeys([*self._pending_starts.ranks, *self._workers], code))
        self._pending_starts.cancel()
        self._workers.kill(list(self._workers))

    # The end

    def _finish(self) -> int:
        """This node's ranks have ended: wait for the others, and learn or decide how the job has ended."""
        coordinator = self.coordinator
        if coordinator is None:
            records = self._state.records
            if records is not None:
                keep_records(self.run_directory, Path(records) / "runs" / self.run_id)
            return self._rendezvous.leave(self._ended, meanwhile=self._pass_on_stop)
        self._rendezvous.wait_for_others(meanwhile=self._follow_requests)
        codes = {*self._ended.values(), *coordinator.nodes.codes().values()}
        end = decide_outcome(
            coordinator, codes | {EXIT_FAILURE} if coordinator.nodes.lost_ranks() else codes, bool(self._stop_signals)
        )
        self._tell_outcome(end)
        coordinator.nodes.conclude(end.exit_code)
        return end.exit_code

    def _pass_on_stop(self) -> None:
        if self._stop_signals and not self._state.draining:
            self._client.drain()

    def _tell_outcome(self, end: Outcome) -> None:
        missing, code = end.missing, end.exit_code
        if missing is not None:
            self._missing = {"missing_samples": format_indices(missing.indices), "num_missing": len(missing.indices)}
        if end.by_failure and self._failures.first is not None:
            log.error("%s", self._failures.summary())
        elif end.mismatch is not None:
            log.error("%s", end.mismatch)
        if code == EXIT_RESUMABLE and missing is not None:
            log.info("stopped on request; the same command goes on from here")
        elif missing is not None and code in (EXIT_DATA_MISSING, EXIT_FAILURE):
            log.error("%s", missing)
        retired = len(self.coordinator.retired) if self.coordinator is not None else 0
        if code == 0 and (self._restarts or retired):
            log.info("complete after %d restarts; %d replicas retired", self._restarts, retired)

    def _record(self, kind: str, **fields: Any) -> None:
        self._events.record(kind, **fields)

    def _clean_up(self, code: int) -> None:
        self._hang_detector.close()
        self._events.close()
        coordinator = self.coordinator
        if coordinator is not None:
            for job in coordinator.jobs.values():
                for loader in range(len(job.queues)):  # every writer is gone: what it left half-written can go
                    PartJournal(loader_directory(job.directory, loader)).sweep_temporaries(0.0)
            jobs = [(job.directory, job.ephemeral) for job in coordinator.jobs.values()]
            target = records_target(self.run_id, jobs, self.run_directory)
            if target is not None:
                keep_records(self.run_directory, target)
                report_run(target)
        self._rendezvous.close()
        if self.keep_results:
            return
        if coordinator is not None:
            remove_ephemeral(coordinator.jobs, succeeded=code == 0)
        shutil.rmtree(self.run_directory, ignore_errors=True)
