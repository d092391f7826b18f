"""A fault inside a tensor-parallel group is repaired in place: all its ranks leave the step, agree, and try again.

The protocol, for a fault in epoch e. The coordinator stands outside of the group and answers while the group's own
connections are broken. Every rank has a request waiting at it, through which it hears of the others' faults.

1. The rank that fails releases the failed step's memory. If its memory ran out and it knows what the step would still
   have communicated (:mod:`lightning_gpuorch.parallel.groups.collective_trace`), it *drains* the step: it tells all ranks
   through the coordinator that this attempt does not count, and when they know, takes part in the rest of it with zeros. The
   others come to its end as always, and the connections stay whole.
2. Otherwise, or if that takes too long, it *aborts*: it gives up epoch e's connections and tells the coordinator. The other
   ranks hear of it and give up theirs as well: a wait inside a collective raises.
3. Every rank hands in its vote (:class:`~lightning_gpuorch.worker.group_recovery.agreement.Vote`) and gets all of them. If
   one is known to be dead, or does not come in time, the process ends and the replica is restarted.
4. :func:`~lightning_gpuorch.worker.group_recovery.agreement.decide` turns the votes into the same decision everywhere.
5. Unless the connections are whole on every rank, all reconnect, as epoch e + 1, and wait for each other's word that
   it worked: three tries.
6. They go on: repeat the attempt; or raise :class:`~lightning_gpuorch.errors.GroupOutOfMemoryError` at it on every
   rank, whereupon every rank cuts the batch in the same way; or fail together.

A drain costs what is left of the step, an abort what it takes to reconnect: some 10 ms on gloo, and on NCCL far more.
The cheaper one is taken.

An attempt counts as done when all ranks have computed it. That takes one more collective per attempt, and in return no
output leaves this module before it is certain that no rank needs to repeat it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch

from lightning_gpuorch.control.messages.base import Sender
from lightning_gpuorch.control.transport import Channel
from lightning_gpuorch.errors import (
    CollectiveError,
    CollectiveTimeoutError,
    ControlPlaneError,
    ControlPlaneTimeoutError,
    GPUOrchError,
    GroupOutOfMemoryError,
    GroupRecoveryError,
    InputMismatchError,
    PeerFailedError,
    StepAbortedError,
)
from lightning_gpuorch.parallel.groups.collective_trace import StepTraces
from lightning_gpuorch.parallel.groups.recoverable_group import RecoverableProcessGroup
from lightning_gpuorch.worker.group_recovery.agreement import Agreement, Cause, GroupAction, Vote, decide
from lightning_gpuorch.worker.group_recovery.connections import GroupEpochs, summary, waiting
from lightning_gpuorch.worker.oom.detection import is_out_of_memory, release

log = logging.getLogger(__name__)

T = TypeVar("T")

MAX_TRIES = 2
"""Repetitions of one attempt after failed communication, before the replica is restarted."""
_RECONNECT_SECONDS = {"cpu": 0.015, "cuda": 0.6}
"""What it takes to reconnect, until it has been measured."""
_SHORTEST_DRAIN_SECONDS = 1.0
"""The other ranks get at least so long for each collective of a step that is drained, and to come to its end."""


@dataclass(frozen=True)
class Recovery:
    """One fault and its outcome, for statistics.

    Attributes:
        decision: What was decided.
        seconds: From the moment this rank left the step until it was ready to go on.
        own: Whether the fault was on this rank.
        drained: Whether the step was drained and the connections are the same as before.
    """

    decision: Agreement
    seconds: float
    own: bool
    drained: bool = False


@dataclass
class _Run:
    """One run of an attempt: its output, and if it does not count, why not."""

    output: Any = None
    computed: bool = False
    cause: Cause | None = None
    error: BaseException | None = None
    left_at: float = 0.0
    intact: bool = False


class GroupRecovery:
    """Runs the steps of one rank of a tensor-parallel group so that the group survives their faults.

    Args:
        channel: Line to the coordinator.
        sender: This process.
        rank: Rank in the group.
        size: Ranks in the group.
        group: The group over which ranks wait for each other at the end of an attempt.
        timeout_seconds: Longest wait for the other ranks to say something.
        on_recovery: Told of each fault after it was repaired; must not raise.
        reconnect_seconds: What reconnecting is taken to cost: a step that takes longer is aborted rather than
            drained. None measures it.
    """

    def __init__(
        self,
        channel: Channel,
        sender: Sender,
        rank: int,
        size: int,
        group: RecoverableProcessGroup,
        timeout_seconds: float,
        on_recovery: Callable[[Recovery], None] = lambda recovery: None,
        reconnect_seconds: float | None = None,
    ):
        self._size, self._group = size, group
        self._global_rank = sender.rank  # in messages; the group's own numbers mean nothing to a reader
        self._timeout_seconds = timeout_seconds
        self.on_recovery = on_recovery
        self.num_recoveries = self.num_drains = 0
        self.last: Recovery | None = None
        self._reconnect_seconds = reconnect_seconds
        self._measured_seconds = _RECONNECT_SECONDS[group._device_type]
        self._attempt_seconds = 0.0
        self._traces = StepTraces()
        self._position = 0
        self._foreseen: Agreement | None = None
        self._agreed: int | None = None
        self._token: torch.Tensor | None = None
        name = f"rank {self._global_rank}"
        self.epochs = GroupEpochs(channel, sender, rank, size, timeout_seconds, name)

    # Steps

    def attempt(self, call: Callable[[], T], inputs: Any = None) -> T:
        """Compute something together with the other ranks; every rank must make the same attempts.

        Args:
            call: Computes it. Called again if communication fails.
            inputs: What it is computed from: nested tensors. Their sizes tell which collectives are to be expected.

        Returns:
            What ``call`` returned, once all ranks have computed theirs.

        Raises:
            GroupOutOfMemoryError: Memory ran out on one of the ranks; raised on all.
            PeerFailedError: ``call`` raised on another rank.
            GroupRecoveryError: The group cannot go on in place; this process has to end.
            Exception: What ``call`` raised here, if a repetition cannot repair it.
        """
        self._position += 1
        tries = 0
        decision, self._foreseen = self._foreseen, None
        error: BaseException | None = None
        while True:
            if decision is not None:
                tries = decision.tries
                self._raise(decision, error)
            run = self._run(call, inputs)
            if run.cause is None:
                return run.output  # type: ignore[no-any-return]
            if run.cause is Cause.OUT_OF_MEMORY and not run.computed:
                run.intact = self._drain()  # outside of the handler, which keeps the failed step alive
            decision, error = self._agree(run, tries), run.error
            # If the others are at the next attempt already, this one is complete, and theirs is decided.
            foreseen = decision.position > self._position and decision.verdict is not GroupAction.RESTART
            if foreseen:
                self._foreseen = decision
            if foreseen or decision.verdict is GroupAction.COMPLETE:
                return run.output  # type: ignore[no-any-return]
            run.output = None

    def abandon(self, error: BaseException) -> None:
        """Tell the other ranks that this one leaves the step outside of an attempt, so that they need not find out.

        Args:
            error: Why. What :meth:`attempt` raised is known to them already.
        """
        if self._agreed == id(error) or self.epochs.closed:
            return
        vote = Vote(
            self._global_rank, self._position + 1, Cause.ERROR,
            message=summary(error), error=type(error).__name__, exit_code=_exit_code(error),
        )  # fmt: skip
        try:
            self.epochs.abort(vote.message)
            self.epochs.vote(vote.to_dict(), wait=False)
        except ControlPlaneError as lost:  # the coordinator is gone: so are we, soon
            log.debug("rank %d could not say that it leaves: %s", self._global_rank, lost)

    def close(self) -> None:
        """Stop watching; safe to call again."""
        self.epochs.close()

    def _run(self, call: Callable[[], Any], inputs: Any) -> _Run:
        run = _Run()
        began = time.perf_counter()
        self._traces.begin(inputs)
        try:
            run.output = call()
            self._traces.end(completed=True)
            self._await_device(self._timeout_seconds)
            run.computed = True
            self._await_others(self._timeout_seconds)
        except Exception as error:  # noqa: BLE001 - every cause has to be agreed on; the step's own are raised again
            run.left_at, run.error = time.perf_counter(), error
            run.cause = _cause_of(error)
            if run.cause is Cause.ERROR and (self._is_drained() or self._is_garbled()):
                run.cause = Cause.PEER  # it had zeros or garbage to compute with
            if run.cause is not Cause.ERROR:
                release(error)  # its frames hold the step's activations
        else:
            if not self._is_drained():
                self._attempt_seconds = time.perf_counter() - began
                return run
            run.left_at, run.cause, run.intact = time.perf_counter(), Cause.PEER, True
        finally:
            self._traces.end(completed=False)
        run.computed = run.computed and not self._is_drained()
        return run

    def _is_drained(self) -> bool:
        return self.epochs.is_drained(self._position)

    def _is_garbled(self) -> bool:
        """Whether collectives of this attempt may have been cut off without a word, as NCCL's are."""
        return self._group._device_type == "cuda" and self._group.aborted is not None

    @property
    def _drain_seconds(self) -> float:
        """How long the other ranks get for what should be there at once."""
        return min(self._timeout_seconds, max(_SHORTEST_DRAIN_SECONDS, 4 * self._attempt_seconds))

    def _drain(self) -> bool:
        """Take part in what is left of the failed attempt; returns whether that brought all ranks to its end."""
        rest = self._traces.rest()
        known = self._reconnect_seconds
        if rest is None or self._attempt_seconds > (self._measured_seconds if known is None else known):
            return False
        limit = self._drain_seconds
        try:
            # Answered when all ranks know that the attempt does not count, and not before may anything be issued.
            if not self.epochs.announce_drain(self._position, limit):
                return False
            with waiting():
                rest.issue(limit)
                self._await_device(limit)
                self._await_others(limit)
        except StepAbortedError:
            return False
        except Exception as error:  # noqa: BLE001 - whatever goes wrong, there is the other way
            log.debug("rank %d could not drain the step: %s", self._global_rank, error)
            if isinstance(error, CollectiveTimeoutError):  # the others issue something else
                self._traces.distrust()
            release(error)
            return False
        self.num_drains += 1
        return True

    def _await_device(self, limit_seconds: float) -> None:
        """Wait until the device has computed what was issued, without getting stuck in it."""
        if self._group._device_type == "cuda":
            event: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()
            deadline = time.monotonic() + limit_seconds
            while not event.query():
                if self._group.aborted is not None:
                    break
                if time.monotonic() > deadline:
                    raise CollectiveTimeoutError(
                        f"rank {self._global_rank} of {self._size}: the device did not complete the step within "
                        f"{limit_seconds:g} s."
                    )
                time.sleep(5e-5)
        # A collective that was given up leaves garbage behind, and says nothing on NCCL.
        if self._group.aborted is not None:
            raise StepAbortedError(f"the ranks of this group left the step: {self._group.aborted}")

    def _await_others(self, limit_seconds: float) -> None:
        """Return when every rank has come here, which means that all have computed the attempt."""
        if self._token is None:
            self._token = torch.zeros(1, dtype=torch.int32, device=self._group._device_types[0])
        with waiting():
            self._group.allreduce([self._token]).wait(timedelta(seconds=limit_seconds))
            self._await_device(limit_seconds)

    def _raise(self, decision: Agreement, error: BaseException | None) -> None:
        """Raise what a decision says about the present attempt, if it says so."""
        if decision.verdict is GroupAction.RETRY:
            return
        raised: BaseException
        if decision.verdict is GroupAction.SMALLER:
            raised = GroupOutOfMemoryError(f"out of memory on {decision.reason}")
        elif decision.verdict is GroupAction.FAIL:
            if error is not None and self._global_rank in decision.culprits:
                raised = error
            elif decision.error == InputMismatchError.__name__:  # every rank finds it, but the first one ends the step
                raised = InputMismatchError(decision.reason)
            else:
                raised = PeerFailedError(f"the step failed on {decision.reason}", decision.culprits[0])
                raised.exit_code = decision.exit_code
        else:
            raised = GroupRecoveryError(
                f"rank {self._global_rank}: {decision.reason}; {decision.tries} tries in place did not help"
                if decision.tries
                else f"rank {self._global_rank}: the ranks of the group are out of step ({decision.reason})"
            )
        self._agreed = id(raised)
        raise raised

    # Agreement

    def _agree(self, run: _Run, tries: int) -> Agreement:
        cause, error = run.cause, run.error
        assert cause is not None
        message = "" if cause is Cause.PEER or error is None else summary(error)
        try:
            if not run.intact:
                self.epochs.abort(f"{cause.value} on rank {self._global_rank}")
            vote = Vote(
                self._global_rank, self._position, cause, run.computed, tries, message, type(error).__name__,
                _exit_code(error),
            )  # fmt: skip
            votes, aborted = self._vote(vote, drained=run.intact and cause is Cause.OUT_OF_MEMORY)
            decision = decide(votes, MAX_TRIES)
            if aborted and decision.verdict in (GroupAction.COMPLETE, GroupAction.RETRY, GroupAction.SMALLER):
                self._measured_seconds = self.epochs.connect()
        except ControlPlaneError as lost:
            raised = GroupRecoveryError(
                f"rank {self._global_rank} could not agree with the other ranks of its group: {lost}"
            )
            self._agreed = id(raised)
            raise raised from None
        except GroupRecoveryError as lost:
            self._agreed = id(lost)
            raise
        self.num_recoveries += 1
        seconds = time.perf_counter() - run.left_at
        own = self._global_rank in decision.culprits
        log.log(
            logging.WARNING if own else logging.DEBUG,
            "%s: %s; ready after %.1f ms", decision.reason, decision.verdict.value, 1e3 * seconds,
        )  # fmt: skip
        self.last = Recovery(decision, seconds, own, not aborted)
        self.on_recovery(self.last)
        return decision

    def _vote(self, vote: Vote, drained: bool) -> tuple[list[Vote], bool]:
        """Get the votes of all ranks, and whether the epoch is given up."""
        ballot = vote.to_dict()
        try:
            votes, aborted = self.epochs.vote(ballot, self._drain_seconds if drained else None)
        except ControlPlaneTimeoutError:
            if not drained:
                raise
            # The others still communicate: this step is not as it was foretold. That sets them free.
            self._traces.distrust()
            self.epochs.abort(f"{vote.cause.value} on rank {self._global_rank}")
            votes, aborted = self.epochs.vote(ballot)
        return [Vote.from_dict(one) for one in votes], aborted


def _cause_of(error: BaseException) -> Cause:
    """What an error says about the attempt. The chain counts: DTensor wraps what its operators raise."""
    one: BaseException | None = error
    seen: set[int] = set()
    while one is not None and id(one) not in seen:
        if isinstance(one, StepAbortedError):
            return Cause.PEER
        if isinstance(one, CollectiveTimeoutError):
            return Cause.TIMEOUT
        if isinstance(one, CollectiveError):
            return Cause.OUT_OF_MEMORY if "out of memory" in str(one) else Cause.COLLECTIVE
        seen.add(id(one))
        one = one.__cause__ or (None if one.__suppress_context__ else one.__context__)
    return Cause.OUT_OF_MEMORY if is_out_of_memory(error) else Cause.ERROR


def _exit_code(error: BaseException | None) -> int:
    return error.exit_code if isinstance(error, GPUOrchError) else 1
