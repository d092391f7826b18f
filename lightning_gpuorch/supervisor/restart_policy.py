"""The one place where a failure becomes a decision.

The rules are a table: kind of failure to what is done, and to what is done once the restart budget is spent. Nothing
here touches a process; the caller carries the decision out.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from dataclasses import dataclass
from enum import Enum

from lightning_gpuorch.control.error_record import PREDICT_STEP, ErrorRecord
from lightning_gpuorch.errors import (
    EXIT_CONFIGURATION,
    EXIT_DATA_MISSING,
    EXIT_RESUMABLE,
    EXIT_STORAGE,
    CollectiveTimeoutError,
)

log = logging.getLogger(__name__)


class FailureKind(Enum):
    """What went wrong."""

    OUT_OF_MEMORY = "out of memory"
    COMMUNICATION_TIMEOUT = "communication timeout"
    RANK_DEATH = "rank death"
    EARLY_EXIT = "left with exit code 0 in the middle of a job"
    ENVIRONMENT_EXCEPTION = "an exception that tells of the device, the network or the machine"
    STEP_EXCEPTION = "an exception in a step"
    EXCEPTION = "an exception outside of a step, as in a callback"
    DETERMINISTIC_EXCEPTION = "an exception that a restart would only repeat"
    STUCK = "no progress"
    GPU_FAILED = "GPU failed"
    GPU_DRAIN = "GPU is about to fail"
    POISON = "a chunk that kills its workers"
    CONFIGURATION = "bad input"
    STORAGE = "predictions cannot be written"
    MISSING_DATA = "predictions are missing"
    STOP_REQUESTED = "asked to stop"


class Action(Enum):
    """What is done about it."""

    RETRY_IN_PLACE = "retry in place"
    RESTART_REPLICA = "restart the replica"
    REPLACE_DEVICE = "move to a spare device"
    RETIRE_REPLICA = "retire the replica"
    END_RANK = "let the rank end; the others go on"
    DRAIN = "have the whole job finish what it holds"
    FAIL = "fail the job"


@dataclass(frozen=True)
class Rule:
    """What a kind of failure leads to.

    Attributes:
        action: While the budget lasts.
        when_spent: Once it does not.
        costs_budget: Whether it counts against the replica's restarts.
    """

    action: Action
    when_spent: Action
    costs_budget: bool = True


RULES: dict[FailureKind, Rule] = {
    # Carried out where it happens: the worker halves the batch and reports nothing (worker/oom).
    FailureKind.OUT_OF_MEMORY: Rule(Action.RETRY_IN_PLACE, Action.RETRY_IN_PLACE, costs_budget=False),
    FailureKind.COMMUNICATION_TIMEOUT: Rule(Action.RESTART_REPLICA, Action.RETIRE_REPLICA),
    FailureKind.RANK_DEATH: Rule(Action.RESTART_REPLICA, Action.RETIRE_REPLICA),
    FailureKind.EARLY_EXIT: Rule(Action.RESTART_REPLICA, Action.RETIRE_REPLICA),
    FailureKind.ENVIRONMENT_EXCEPTION: Rule(Action.RESTART_REPLICA, Action.RETIRE_REPLICA),
    FailureKind.STEP_EXCEPTION: Rule(Action.RESTART_REPLICA, Action.RETIRE_REPLICA),
    FailureKind.EXCEPTION: Rule(Action.RESTART_REPLICA, Action.RETIRE_REPLICA),
    FailureKind.DETERMINISTIC_EXCEPTION: Rule(Action.FAIL, Action.FAIL, costs_budget=False),
    FailureKind.STUCK: Rule(Action.RESTART_REPLICA, Action.RETIRE_REPLICA),
    # Without a spare the replica is retired; with DRAIN, after it has finished the chunks it holds.
    FailureKind.GPU_FAILED: Rule(Action.REPLACE_DEVICE, Action.RETIRE_REPLICA, costs_budget=False),
    FailureKind.GPU_DRAIN: Rule(Action.REPLACE_DEVICE, Action.RETIRE_REPLICA, costs_budget=False),
    # A poison chunk has a budget of its own, in the lease queue; it ends in quarantine.
    FailureKind.POISON: Rule(Action.RESTART_REPLICA, Action.RESTART_REPLICA, costs_budget=False),
    FailureKind.CONFIGURATION: Rule(Action.FAIL, Action.FAIL, costs_budget=False),
    FailureKind.STORAGE: Rule(Action.DRAIN, Action.DRAIN, costs_budget=False),
    FailureKind.MISSING_DATA: Rule(Action.END_RANK, Action.END_RANK, costs_budget=False),
    FailureKind.STOP_REQUESTED: Rule(Action.END_RANK, Action.END_RANK, costs_budget=False),
}


EXCEPTIONS = frozenset(
    {
        FailureKind.COMMUNICATION_TIMEOUT,
        FailureKind.ENVIRONMENT_EXCEPTION,
        FailureKind.STEP_EXCEPTION,
        FailureKind.EXCEPTION,
        FailureKind.DETERMINISTIC_EXCEPTION,
    }
)
"""Kinds whose evidence is the exception itself, which says more than the kind."""


@dataclass(frozen=True)
class Evidence:
    """What shows why a worker has ended by itself.

    Attributes:
        exit_code: Its exit code.
        record: What it has left about its exception, if anything.
        generation: How often its replica was started before.
        has_worked: Whether its replica has completed a step in this life.
        in_batch: Whether it had a batch in hand: in its step, or in a callback of it.
        has_open_jobs: Whether it has opened a predict call and not closed it.
        has_closed_jobs: Whether predict calls were opened, and it has closed all of its own.
        is_repeated: Whether the same exception was seen before, and no rank has made progress since.
    """

    exit_code: int
    record: ErrorRecord | None
    generation: int = 0
    has_worked: bool = False
    in_batch: bool = False
    has_open_jobs: bool = True
    has_closed_jobs: bool = False
    is_repeated: bool = False


REPORTED: dict[int, FailureKind] = {
    EXIT_CONFIGURATION: FailureKind.CONFIGURATION,
    EXIT_STORAGE: FailureKind.STORAGE,
    EXIT_DATA_MISSING: FailureKind.MISSING_DATA,
    EXIT_RESUMABLE: FailureKind.STOP_REQUESTED,
}
"""Kinds that a worker reports itself; its exit code alone says nothing."""


def classify(evidence: Evidence) -> FailureKind:
    """Tell what kind of failure the evidence shows."""
    record, code = evidence.record, evidence.exit_code
    if record is None:
        return FailureKind.EARLY_EXIT if code == 0 else FailureKind.RANK_DEATH
    if record.exit_code is not None and record.exit_code == code and code in REPORTED:
        return REPORTED[code]
    if record.is_final:
        return FailureKind.DETERMINISTIC_EXCEPTION
    if record.type == CollectiveTimeoutError.__name__:
        return FailureKind.COMMUNICATION_TIMEOUT
    if record.is_environment:
        return FailureKind.ENVIRONMENT_EXCEPTION
    if code < 0 or record.exited_with == 0:
        return FailureKind.RANK_DEATH
    # The first batch may hold a bad sample; whatever comes before it is the same in every life.
    in_batch = evidence.in_batch or record.doing == PREDICT_STEP
    before_first_batch = not (evidence.generation or evidence.has_worked or in_batch)
    after_the_work = evidence.has_closed_jobs and not evidence.has_open_jobs
    if before_first_batch or after_the_work or evidence.is_repeated:
        return FailureKind.DETERMINISTIC_EXCEPTION
    return FailureKind.STEP_EXCEPTION if record.units is not None else FailureKind.EXCEPTION


@dataclass(frozen=True)
class Decision:
    """A failure and what follows from it.

    Attributes:
        kind: What went wrong.
        action: What is done.
        replica: Whose failure it is.
        attempt: Restarts of this replica since it last made progress, this one included.
        reason: For the log.
    """

    kind: FailureKind
    action: Action
    replica: int
    attempt: int
    reason: str


class FailureRecoveryManager:
    """Decides about failures and keeps the restart budgets.

    Args:
        max_restart_attempts: Restarts of one replica without progress in between.
        enable_auto_restart: False turns every restart into a retirement.
        tensor_parallel_size: Ranks per replica, to find a rank's replica.
    """

    def __init__(self, max_restart_attempts: int = 3, enable_auto_restart: bool = True, tensor_parallel_size: int = 1):
        self.max_restart_attempts = max_restart_attempts
        self.enable_auto_restart = enable_auto_restart
        self.tensor_parallel_size = tensor_parallel_size
        self.counts: Counter[FailureKind] = Counter()
        self._attempts: Counter[int] = Counter()
        self._lock = threading.Lock()

    def decide(self, kind: FailureKind, rank: int, evidence: str = "") -> Decision:
        """Turn a failure into a decision.

        Args:
            kind: What went wrong.
            rank: Global rank it was seen on.
            evidence: What shows it, for the log.
        """
        replica = rank // self.tensor_parallel_size
        rule = RULES[kind]
        with self._lock:
            self.counts[kind] += 1
            action = rule.action
            if action in (Action.RESTART_REPLICA, Action.REPLACE_DEVICE) and not self.enable_auto_restart:
                action = Action.RETIRE_REPLICA
            elif rule.costs_budget:
                self._attempts[replica] += 1
                if self._attempts[replica] > self.max_restart_attempts:
                    action = rule.when_spent
            attempt = self._attempts[replica]
        reason = f"rank {rank}: {evidence or kind.value}"
        if evidence and kind not in EXCEPTIONS:
            reason = f"rank {rank}: {kind.value} ({evidence})"
        return Decision(kind, action, replica, attempt, reason)

    def handle_gpu_oom(self, rank: int) -> Decision:
        """Decide about an out-of-memory error on a rank: free, halve, retry where it happened."""
        return self.decide(FailureKind.OUT_OF_MEMORY, rank)

    def handle_communication_timeout(self, rank: int) -> Decision:
        """Decide about a collective that did not complete in time: restart the ranks concerned."""
        return self.decide(FailureKind.COMMUNICATION_TIMEOUT, rank)

    def record_progress(self, replica: int) -> None:
        """Refill a replica's restart budget: it has made something durable."""
        with self._lock:
            self._attempts[replica] = 0

    def reset(self) -> None:
        """Forget all failures and refill all budgets."""
        with self._lock:
            self.counts.clear()
            self._attempts.clear()
