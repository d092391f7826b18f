"""From the end of a worker to what follows: evidence is gathered, the policy decides, and the decision is carried out."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable, Mapping, Sequence

from lightning_gpuorch.control.error_record import ErrorRecord
from lightning_gpuorch.control.heartbeat import waits_for_others
from lightning_gpuorch.errors import EXIT_FAILURE, EXIT_RESUMABLE, MissingPredictionsError
from lightning_gpuorch.supervisor.device_drain import DeviceDrain
from lightning_gpuorch.supervisor.job_drain import JobDrain
from lightning_gpuorch.supervisor.node import Node
from lightning_gpuorch.supervisor.node_drain import NodeDrain
from lightning_gpuorch.supervisor.replica import ReplicaState
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
from lightning_gpuorch.supervisor.retirement import retire
from lightning_gpuorch.supervisor.run_records import failure_record
from lightning_gpuorch.supervisor.workers import Worker, describe_exit

log = logging.getLogger(__name__)


class FailureHandler:
    """Handles what goes wrong with the workers of a node.

    Args:
        node: The node.
        job_drain: Drains the job.
        node_drain: Takes the node out of a job that goes on.
    """

    def __init__(self, node: Node, job_drain: JobDrain, node_drain: NodeDrain):
        self._node, self._job_drain, self._node_drain = node, job_drain, node_drain
        self._recovery = FailureRecoveryManager(node.config.max_restart_attempts, node.config.enable_auto_restart)
        self._device_drain = DeviceDrain(node, self._recovery)
        self._raised_at: dict[str, int] = {}
        """Progress of the job when an exception was seen last, by its signature."""
        self._progress: dict[int, int] = {}

    def follow_progress(self, progress_by_replica: Mapping[int, int]) -> None:
        """Refill the restart budgets of replicas that have made something durable."""
        for replica, progress in progress_by_replica.items():
            if progress != self._progress.get(replica):
                self._progress[replica] = progress
                self._recovery.record_progress(replica)

    def check_devices(self) -> None:
        """Act on verdicts about devices."""
        for worker, evidence in self._device_drain.check():
            self._on_failure(worker, FailureKind.GPU_FAILED, evidence)

    def check_liveness(self) -> None:
        """Find the rank that is stuck; show where it stands, and treat it as dead."""
        node = self._node
        found = node.hang_detector.find_stuck(node.workers)
        if found is None:
            return
        rank, verdict = found
        stacks = node.workers.dump_stacks(node.group_of(rank))
        reason = verdict.reason
        if not verdict.sure and waits_for_others(stacks[rank]):
            # It waits in a collective: the culprit is a rank that has not come, if one stands elsewhere.
            absent = next((r for r, frames in stacks.items() if frames and not waits_for_others(frames)), rank)
            if absent != rank:
                rank, reason = absent, f"rank {rank} waits for it in a collective: {reason}"
        where = stacks[rank]
        node.record("hang", rank=rank, reason=reason, phase=verdict.row.phase.name, stacks=where)
        log.error("rank %d is stuck: %s%s", rank, reason, f"; it stands at\n{where}" if where else "")
        self._on_failure(node.workers[rank], FailureKind.STUCK, reason, in_step=verdict.in_step)

    def on_exit(self, worker: Worker, code: int) -> None:
        """A worker has ended by itself."""
        node, rank = self._node, worker.rank
        state = node.state(fresh=True)  # what it has closed just now counts
        if code == 0 and rank not in state.open_ranks:
            node.replicas.end([rank], 0)
            node.client.rank_left(rank, "has ended")
            return
        record = worker.error_record()
        progress = sum(state.progress_by_replica.values())
        repeated = record is not None and self._raised_at.get(record.signature) == progress
        if record is not None:
            self._raised_at[record.signature] = progress
        works = node.hang_detector.have_worked(node.group_of(rank))
        evidence = Evidence(
            code,
            record,
            generation=worker.generation,
            has_worked=works,
            in_batch=bool(node.hang_detector.in_work(rank, ())[0]),
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
        node, rank, record = self._node, worker.rank, worker.error_record()
        assert record is not None
        replica = node.replicas.of(rank)
        if kind is FailureKind.STOP_REQUESTED and replica.state is ReplicaState.DRAINING:
            (self._node_drain if self._node_drain.under_way else self._device_drain).on_left(replica)
            return
        node.replicas.end([rank], code)
        node.client.rank_left(rank, f"ended with exit code {code}")
        if not any(peer in node.workers for peer in node.group_of(rank)):
            node.client.end_generation(replica.index, replica.generation, {}, {})  # what it holds is for others to try
        if kind is FailureKind.STOP_REQUESTED:
            return
        decision = self._recovery.decide(kind, rank)
        is_missing = record.type == MissingPredictionsError.__name__  # told in full when all ranks have ended
        failure = failure_record(worker, kind.value)
        node.record("failure", **failure)
        if not is_missing:
            node.failures.show(failure, logging.ERROR, f"rank {rank}: {record.headline}")
        if decision.action is Action.FAIL or record.is_final:
            node.client.abort(code)
        elif decision.action is Action.DRAIN:
            peers = [peer for peer in node.group_of(rank) if peer in node.workers]
            node.workers.kill(peers)  # they wait for it, and cannot finish what they hold
            node.replicas.end(peers, EXIT_RESUMABLE)
            self._job_drain.begin(kind.value)

    def _on_failure(
        self,
        worker: Worker,
        kind: FailureKind,
        evidence: str,
        in_step: bool = True,
        record: ErrorRecord | None = None,
    ) -> None:
        node, rank, state = self._node, worker.rank, self._node.state(fresh=True)
        group, replica = node.group_of(rank), node.replicas.of(rank)
        generation = replica.generation
        self._recovery.tensor_parallel_size = state.tensor_parallel_size or 1
        by_device = kind in (FailureKind.GPU_FAILED, FailureKind.GPU_DRAIN)
        blamed, positions = node.hang_detector.in_work(rank, group) if in_step and not by_device else ({}, {})
        works = node.hang_detector.have_worked(group)
        complete = state.open_ranks.get(rank, False)
        node.workers.kill(group)
        raised = (
            None if record is None or kind is not FailureKind.STEP_EXCEPTION else (record.signature, record.summary)
        )
        decided = kind
        if kind is not FailureKind.DETERMINISTIC_EXCEPTION and works and node.client.deaths_before(blamed, positions):
            # The replica can compute, and this is not the first death in the same samples: it is their fault.
            decided = FailureKind.POISON
        decision = self._recovery.decide(decided, rank, evidence)
        if kind in EXCEPTIONS:
            decision = dataclasses.replace(decision, reason=f"rank {rank}: {evidence}")
        if decision.action is Action.RETIRE_REPLICA:
            blamed = {}  # it is the replica's fault, not that of what it happened to compute
        for member in node.replicas.replicas_of(group):
            node.client.end_generation(member.index, generation, blamed, positions, raised)
        failure = failure_record(worker, evidence)
        node.record("failure", **failure)
        show = functools.partial(node.failures.show, failure)
        if decision.action is Action.FAIL:
            show(logging.ERROR, f"{decision.reason}; the job ends")
            code = (record.exited_with if record is not None else None) or EXIT_FAILURE
            node.replicas.end(group, code)
            node.client.abort(code)
        elif self._node_drain.under_way:
            show(logging.WARNING, decision.reason)
            self._node_drain.on_left(replica)
        elif self._job_drain.under_way:
            show(logging.WARNING, decision.reason)
            node.replicas.end(group, EXIT_RESUMABLE)
        elif (state.gang or node.replicas.size is None) and any(
            node.replicas.exit_codes.get(peer) == 0 for peer in node.group_of(rank, with_ended=True)
        ):
            # All ranks share its fate, and some have come to their end: training or an unknown script is not run twice.
            node.replicas.end(group, 0 if complete else EXIT_FAILURE)
            show(logging.WARNING, f"{decision.reason}; other ranks have ended their script, so it is not restarted")
        else:
            self._carry_out(decision, rank, group, evidence, show)

    def _carry_out(
        self, decision: Decision, rank: int, group: Sequence[int], evidence: str, show: Callable[[int, str], None]
    ) -> None:
        """Restart, move or retire a replica whose workers have been killed."""
        node = self._node
        moved = decision.action is Action.REPLACE_DEVICE and node.pending_starts.replace_device(rank, evidence)
        if decision.action is Action.RESTART_REPLICA and node.state().gang:
            self._tell_restart(decision, group, show)
            node.restart_gang(node.client.restart_gang(node.gang_generation))
        elif decision.action is Action.RESTART_REPLICA or moved:
            self._tell_restart(decision, group, show)
            node.next_generation(group, node.replicas.of(rank).generation + 1)
        else:
            show(logging.ERROR, decision.reason)
            retire(node, decision.replica, group, decision.reason)

    def _tell_restart(self, decision: Decision, group: Sequence[int], show: Callable[[int, str], None]) -> None:
        self._node.restarts += 1
        most = self._recovery.max_restart_attempts
        self._node.record(
            "restart", replica=decision.replica, reason=decision.reason, attempt=decision.attempt, max_attempts=most,
            ranks=list(group),
        )  # fmt: skip
        show(
            logging.WARNING,
            f"{decision.reason}; restarting replica {decision.replica} (attempt {decision.attempt} of {most})",
        )
