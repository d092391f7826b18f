"""Starts a job's workers, watches them, and brings back what dies. Imports neither torch nor Lightning.

One supervisor per node. It hosts the head, so leases and decided collectives outlive every worker. Workers are
grouped into replicas; when a rank dies, its whole replica is killed and started again as the next *generation*, and
no other replica notices. A worker that ends its script with exit code 0 while a job is open counts as dead.
"""

from __future__ import annotations

import atexit
import json
import logging
import os
import secrets
import shlex
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from lightning_gpuorch._bootstrap import DUMP_FILE, DUMP_SIGNAL, ERROR_FILE
from lightning_gpuorch.config import OrchestratorConfig
from lightning_gpuorch.distributed.wire import ControlServer
from lightning_gpuorch.environment import WorkerEnvironment
from lightning_gpuorch.errors import (
    EXIT_CONFIGURATION,
    EXIT_DATA_MISSING,
    EXIT_FAILURE,
    EXIT_RESUMABLE,
    EXIT_STORAGE,
    FINAL_EXIT_CODES,
    MissingPredictionsError,
)
from lightning_gpuorch.head import Head
from lightning_gpuorch.liveness import HeartbeatTable, Judge, Limits, Row, main_thread_of_dump
from lightning_gpuorch.predictions.parts import PartStore, loader_directory
from lightning_gpuorch.recovery import Action, FailureKind, FailureRecoveryManager
from lightning_gpuorch.run_directory import RunDirectory, sweep
from lightning_gpuorch.spawn import Process, Spawner
from lightning_gpuorch.telemetry.events import EventLog
from lightning_gpuorch.telemetry.report import write_report
from lightning_gpuorch.world import new_run_id, remove_ephemeral

log = logging.getLogger(__name__)

POLL_SECONDS = 0.02
JUDGE_SECONDS = 0.2
DUMP_SECONDS = 1.0
"""How long stuck workers get to write their stacks."""
_FINAL_KINDS = {
    EXIT_CONFIGURATION: FailureKind.CONFIGURATION,
    EXIT_STORAGE: FailureKind.STORAGE,
    EXIT_DATA_MISSING: FailureKind.MISSING_DATA,
    EXIT_RESUMABLE: FailureKind.STOP_REQUESTED,
}


@dataclass
class _Worker:
    rank: int
    process: Process
    error_file: Path
    dump_file: Path
    started_ns: int = field(default_factory=time.monotonic_ns)


class Supervisor:
    """Runs a job of several workers on this node.

    Args:
        spawner: Starts workers.
        world_size: Number of workers.
        config: Settings.
        tensor_parallel_size: Ranks per replica, if known before the script says so.
        device_indices: Device of each local rank; None lets each take its local rank's.
        environment: More variables for the workers.
    """

    def __init__(
        self,
        spawner: Spawner,
        world_size: int,
        config: OrchestratorConfig,
        *,
        tensor_parallel_size: int | None = None,
        device_indices: Sequence[int] | None = None,
        environment: dict[str, str] | None = None,
    ):
        self.run_id = new_run_id()
        self.config = config
        self.head = Head(world_size, config.max_chunk_failures, self._on_event)
        self.head.tensor_parallel_size = tensor_parallel_size
        self.recovery = FailureRecoveryManager(config.max_restart_attempts, config.enable_auto_restart)
        sweep()
        self._home = RunDirectory(self.run_id)
        self.run_directory = self._home.path
        self._events = EventLog(self.run_directory / "events", "supervisor")
        self._spawner, self._world_size = spawner, world_size
        self._device_indices, self._environment = device_indices, dict(environment or {})
        self._token = secrets.token_hex(16)
        self._server = ControlServer(self.head, token=self._token)
        self._table = HeartbeatTable(str(self._home.table), world_size, create=True)
        limits = Limits(
            alive=config.heartbeat_timeout_sec,
            start=config.start_timeout_sec,
            step=config.step_timeout_sec,
            commit=config.commit_timeout_sec,
            exit=config.exit_timeout_sec,
        )
        self._judge = Judge(self._table, limits)
        self._next_judgement = 0.0
        self._workers: dict[int, _Worker] = {}
        self._generation = dict.fromkeys(range(world_size), 0)
        self._ended: dict[int, int] = {}
        self._retired: set[int] = set()
        self._first_failure: dict[str, Any] | None = None
        self._stop_signals: list[int] = []
        self._drain_deadline: float | None = None
        self._progress: dict[int, int] = {}
        self._restarts = 0
        self.keep_results = False
        """Leave results nobody asked to keep for :meth:`clean_up_at_exit`: the caller is this process."""

    def add_environment(self, variables: dict[str, str]) -> None:
        """Give more variables to workers that are started from now on."""
        self._environment.update(variables)

    def clean_up_at_exit(self) -> None:
        """Remove what :attr:`keep_results` has left: logs now, results when this process ends."""
        self._home.remove()
        atexit.register(remove_ephemeral, self.head)

    def run(self) -> int:
        """Run the job to its end.

        Returns:
            The exit code: 0 if and only if every opened job is complete.
        """
        previous = self._install_signal_handlers()
        self._on_event(
            "run", world_size=self._world_size, tensor_parallel_size=self.head.tensor_parallel_size or 1,
            command=shlex.join(sys.argv), run_id=self.run_id, host=socket.gethostname(),
        )  # fmt: skip
        code = EXIT_FAILURE
        try:
            for rank in range(self._world_size):
                self._start(rank)
            while self._workers:
                time.sleep(POLL_SECONDS)
                self._check_signals()
                self._check_progress()
                self._reap()
                self._check_liveness()
            code = self._conclude()
        finally:
            self._kill(list(self._workers))
            self._on_event("end", exit_code=code)
            for number, handler in previous.items():
                signal.signal(number, handler)
            self._spawner.close()
            self._server.close()
            self._clean_up()
        return code

    # Starting and stopping

    def _start(self, rank: int) -> None:
        generation = self._generation[rank]
        name = f"rank{rank}-generation{generation}"
        error_file, dump_file = self.run_directory / f"error-{name}.json", self.run_directory / f"stacks-{name}.txt"
        worker = WorkerEnvironment(
            rank=rank,
            world_size=self._world_size,
            local_rank=rank,
            node_rank=0,
            control=self._server.address,
            token=self._token,
            generation=generation,
            device_index=self._device_indices[rank] if self._device_indices else None,
            run_id=self.run_id,
            host="127.0.0.1",
            heartbeat=self._table.path,
            run_directory=str(self.run_directory),
            local_world_size=self._world_size,
        )
        threads = os.environ.get("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // self._world_size)))
        variables = {
            **self._environment,
            **worker.variables(),
            ERROR_FILE: str(error_file),
            DUMP_FILE: str(dump_file),
            "OMP_NUM_THREADS": threads,
        }
        self._table.clear(rank)
        self._judge.forget(rank)
        self._workers[rank] = _Worker(rank, self._spawner.spawn(variables), error_file, dump_file)
        log.debug("rank %d started as process %d, generation %d", rank, self._workers[rank].process.pid, generation)

    def _kill(self, ranks: Sequence[int]) -> None:
        """Kill workers with everything they started, also stopped ones, and wait until they are gone."""
        doomed = [self._workers.pop(rank) for rank in ranks if rank in self._workers]
        for worker in doomed:
            for number in (signal.SIGCONT, signal.SIGKILL):
                _signal_group(worker.process.pid, number)
        deadline = time.monotonic() + 10
        while any(worker.process.poll() is None for worker in doomed) and time.monotonic() < deadline:
            time.sleep(0.005)

    # Watching

    def _reap(self) -> None:
        for rank, worker in list(self._workers.items()):
            code = worker.process.poll()
            if code is None or rank not in self._workers:
                continue
            _signal_group(worker.process.pid, signal.SIGKILL)  # what it started dies with it
            self._on_exit(worker, code)

    def _on_exit(self, worker: _Worker, code: int) -> None:
        rank = worker.rank
        unfinished = self.head.unfinished_jobs_of(rank)
        if code == 0 and not unfinished:
            self._workers.pop(rank)
            self._ended[rank] = 0
            self.head.ledger.leave(rank, "has ended")
            return
        if code in FINAL_EXIT_CODES:
            self._on_final_exit(worker, code)
            return
        kind = FailureKind.EARLY_EXIT if code == 0 else FailureKind.RANK_DEATH
        self._on_failure(worker, kind, _describe_exit(code))

    def _on_final_exit(self, worker: _Worker, code: int) -> None:
        """An end that a restart would only repeat."""
        rank = worker.rank
        self._workers.pop(rank)
        self._ended[rank] = code
        self.head.ledger.leave(rank, f"ended with exit code {code}")
        if code == EXIT_RESUMABLE:
            return
        self._remember_failure(worker, _FINAL_KINDS[code].value)
        if code == EXIT_CONFIGURATION:
            self._kill(list(self._workers))
        elif code == EXIT_STORAGE:
            self._begin_drain()

    def _on_failure(self, worker: _Worker, kind: FailureKind, evidence: str, in_step: bool = True) -> None:
        rank = worker.rank
        size = self.head.tensor_parallel_size
        group = self._group_of(rank, size)
        replica, generation = rank // (size or 1), self._generation[rank]
        self.recovery.tensor_parallel_size = size or 1
        blamed, positions = self._blame(rank, group) if in_step else ({}, {})
        if self._killed_before(blamed, positions) and any(self._table.row(member).progress for member in group):
            # The replica does work, and has died in the same samples before: it is the samples' fault.
            kind = FailureKind.POISON
        unfinished = self.head.unfinished_jobs_of(rank)
        decision = self.recovery.decide(kind, rank, evidence)
        if decision.action is Action.RETIRE_REPLICA:
            blamed = {}  # the replica is to blame, not what it happened to compute
        self._remember_failure(worker, evidence)
        self._kill(group)
        for member in {r // (size or 1) for r in group}:
            self.head.end_generation(member, generation, blamed, positions)
        if self._drain_deadline is not None:
            self._ended.update(dict.fromkeys(group, EXIT_RESUMABLE))
            return
        if any(self._ended.get(peer) == 0 for peer in self._group_of(rank, size, with_ended=True)):
            # Its peers have left in good order, so they cannot form a group with it again, nor did they need it.
            complete = bool(unfinished) and all(self.head.jobs[number].finished for number in unfinished)
            self._ended[rank] = 0 if complete else EXIT_FAILURE
            log.warning(
                "%s; the others of replica %d are done, so it is ended, not restarted", decision.reason, replica
            )
            return
        if decision.action is Action.RESTART_REPLICA:
            self._restarts += 1
            self._on_event(
                "restart", replica=replica, reason=decision.reason, attempt=decision.attempt,
                max_attempts=self.recovery.max_restart_attempts, ranks=group,
            )  # fmt: skip
            log.warning(
                "%s; restarting replica %d (attempt %d of %d)",
                decision.reason,
                replica,
                decision.attempt,
                self.recovery.max_restart_attempts,
            )
            for member_rank in group:
                self._generation[member_rank] = generation + 1
                self._start(member_rank)
            return
        self._retire(replica, group, decision.reason)

    def _retire(self, replica: int, group: Sequence[int], reason: str) -> None:
        self._retired.add(replica)
        self._on_event("retire", replica=replica, reason=reason, ranks=list(group))
        self._ended.update(dict.fromkeys(group, EXIT_FAILURE))
        self.head.retire(replica)
        if self._workers and not self.head.gang and not self.head.needs_every_replica:
            log.error("%s; replica %d is retired, %d workers go on", reason, replica, len(self._workers))
            return
        log.error("%s; no replica is left to go on", reason) if not self._workers else log.error(
            "%s; the others cannot go on without it", reason
        )
        self._kill(list(self._workers))

    def _check_liveness(self) -> None:
        """Find who is stuck; show where it stands, and treat it as dead."""
        if time.monotonic() < self._next_judgement:
            return
        self._next_judgement = time.monotonic() + JUDGE_SECONDS
        pids = {rank: worker.process.pid for rank, worker in self._workers.items()}
        started = {rank: worker.started_ns for rank, worker in self._workers.items()}
        verdict = self._judge.check(pids, started)
        if verdict is None:
            return
        group = self._group_of(verdict.rank, self.head.tensor_parallel_size)
        where = self._dump_stacks(group, verdict.rank)
        self._on_event("hang", rank=verdict.rank, reason=verdict.reason, phase=verdict.row.phase.name, stacks=where)
        log.error("rank %d is stuck: %s%s", verdict.rank, verdict.reason, f"; it stands at\n{where}" if where else "")
        self._on_failure(self._workers[verdict.rank], FailureKind.STUCK, verdict.reason, in_step=verdict.in_step)

    def _dump_stacks(self, group: Sequence[int], culprit: int) -> str:
        """Ask all ranks of a replica for their stacks; returns the culprit's main thread."""
        members = [self._workers[rank] for rank in group if rank in self._workers]
        before = {worker.rank: _size(worker.dump_file) for worker in members}
        for worker in members:
            # A stopped process handles the pending signal as soon as it is continued.
            for number in (DUMP_SIGNAL, signal.SIGCONT):
                _signal(worker.process.pid, number)
        deadline = time.monotonic() + DUMP_SECONDS
        while time.monotonic() < deadline and any(_size(w.dump_file) == before[w.rank] for w in members):
            time.sleep(0.01)
        time.sleep(0.05)  # the last one may still be writing
        return main_thread_of_dump(self._workers[culprit].dump_file)

    def _blame(
        self, culprit: int, group: Sequence[int]
    ) -> tuple[dict[tuple[int, int], int], dict[tuple[int, int], tuple[int, int]]]:
        """The chunk and the position the culprit was computing, else its group, by (job, loader)."""
        for rank in (culprit, *group):
            row: Row = self._table.row(rank)
            if row.pid and row.chunk >= 0:
                key = (row.job, row.loader)
                return {key: row.chunk}, {key: (row.unit_start, row.unit_stop)}
        return {}, {}

    def _group_of(self, rank: int, size: int | None, with_ended: bool = False) -> list[int]:
        """Ranks that share a fate: a replica; everybody while it is not known, or when training."""
        if size is None or self.head.gang:
            group = range(self._world_size)
        else:
            first = rank // size * size
            group = range(first, first + size)
        return [r for r in group if with_ended or r not in self._ended or r == rank]

    def _killed_before(
        self, blamed: dict[tuple[int, int], int], positions: dict[tuple[int, int], tuple[int, int]]
    ) -> bool:
        """Whether workers have died in the same samples before."""
        for (job, loader), chunk in blamed.items():
            fault = self.head.jobs[job].queues[loader].faults.get(chunk)
            if fault is not None and any(fault.deaths_of[unit] for unit in range(*positions[job, loader])):
                return True
        return False

    def _check_progress(self) -> None:
        for replica, chunks in self.head.chunks_by_replica.items():
            if chunks != self._progress.get(replica):
                self._progress[replica] = chunks
                self.recovery.record_progress(replica)

    # Stopping on request

    def _install_signal_handlers(self) -> dict[int, Any]:
        if threading.current_thread() is not threading.main_thread():
            return {}

        def remember(number: int, frame: FrameType | None) -> None:
            self._stop_signals.append(number)

        return {number: signal.signal(number, remember) for number in (signal.SIGTERM, signal.SIGINT)}

    def _check_signals(self) -> None:
        if self._stop_signals and self._drain_deadline is None:
            log.info("%s: finishing the chunks in hand", signal.Signals(self._stop_signals[0]).name)
            self._begin_drain()
        if len(self._stop_signals) > 1 or (self._drain_deadline or float("inf")) < time.monotonic():
            self._ended.update(dict.fromkeys(self._workers, EXIT_RESUMABLE))
            self._kill(list(self._workers))

    def _begin_drain(self) -> None:
        self.head.drain()
        self._on_event("drain", reason=str([signal.Signals(number).name for number in self._stop_signals]))
        if self._drain_deadline is None:
            self._drain_deadline = time.monotonic() + self.config.exit_timeout_sec
        if not self.head.jobs:  # nobody has begun to work: nothing to finish
            self._ended.update(dict.fromkeys(self._workers, EXIT_RESUMABLE))
            self._kill(list(self._workers))

    # The end

    def _conclude(self) -> int:
        codes = set(self._ended.values())
        try:
            self.head.verify()
        except MissingPredictionsError as error:
            if self._stop_signals:
                log.info("stopped on request; the same command goes on from here")
                return EXIT_RESUMABLE
            self._show_first_failure()
            for code in (EXIT_CONFIGURATION, EXIT_STORAGE):
                if code in codes:
                    return code
            log.error("%s", error)
            return EXIT_DATA_MISSING if codes <= {0, EXIT_DATA_MISSING} else EXIT_FAILURE
        whole = self.head.gang or self.head.needs_every_replica  # a stage that a retired replica leaves incomplete
        others_finished = bool(self.head.jobs and self._retired) and 0 in codes and codes <= {0, EXIT_FAILURE}
        if codes <= {0} or (others_finished and not whole):
            if self._restarts or self._retired:
                log.info("complete after %d restarts; %d replicas retired", self._restarts, len(self._retired))
            return 0
        if self._stop_signals:
            return EXIT_RESUMABLE
        self._show_first_failure()
        return max(codes - {0})

    def _remember_failure(self, worker: _Worker, reason: str) -> None:
        record: dict[str, Any] = {"rank": worker.rank, "reason": reason, "generation": self._generation[worker.rank]}
        try:
            record.update(json.loads(worker.error_file.read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:  # killed before it could write one
            log.debug("rank %d left no error record: %s", worker.rank, error)
        self._on_event("failure", **record)
        if self._first_failure is None:
            self._first_failure = record

    def _show_first_failure(self) -> None:
        failure = self._first_failure
        if failure is None:
            return
        said = f": {failure['type']}: {failure['message']}" if "type" in failure else ""
        log.error(
            "first failure: rank %d, generation %d, %s%s",
            failure["rank"],
            failure["generation"],
            failure["reason"],
            said,
        )

    def _on_event(self, kind: str, **fields: Any) -> None:
        self._events.record(kind, **fields)

    def _clean_up(self) -> None:
        for job in self.head.jobs.values():
            for loader in range(len(job.queues)):  # every writer is gone: what it left half-written can go
                PartStore(loader_directory(job.directory, loader)).sweep_temporaries(0.0)
        self._table.close()
        self._home.table.unlink(missing_ok=True)
        self._events.close()
        self._keep_records()
        if not self.keep_results:
            remove_ephemeral(self.head)
            self._home.remove()

    def _keep_records(self) -> None:
        """Put the run's events, logs and report beside the predictions that are kept. Never ends the run."""
        kept = [job.directory for job in self.head.jobs.values() if not job.ephemeral and job.directory.is_dir()]
        if not kept:
            return
        target = kept[0] / "runs" / self.run_id
        try:
            for name in ("events", "logs"):
                if (self.run_directory / name).is_dir():
                    shutil.copytree(self.run_directory / name, target / name)
            write_report(target, target / "report.html")
            log.info("the report of this run is %s", target / "report.html")
        except Exception as error:  # noqa: BLE001 - a report that cannot be written costs nobody a prediction
            log.warning("no report of this run: %s: %s", type(error).__name__, error)


def _describe_exit(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    try:
        return f"killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"killed by signal {-code}"


def _signal(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return  # it has just ended


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _signal_group(pid: int, number: int) -> None:
    try:
        os.killpg(pid, number)
    except (ProcessLookupError, PermissionError):
        return  # nobody is left in that session
