"""A process group that stays the same object while the connections under it are given up and made again.

Device meshes, DTensors, sharded layers and compiled modules refer to a process group by the object or by its name. So
recovery must not replace it. :class:`RecoverableProcessGroup` is registered with torch.distributed as a backend of its
own and passes every collective on to the :class:`~lightning_gpuorch.parallel.groups.communicators.GroupConnections` of the
current epoch. Giving up an epoch makes every wait for its collectives raise; :meth:`RecoverableProcessGroup.rebuild`
begins the next one.

A collective costs about ten microseconds more than without (``tests/benchmarks/group_recovery.py`` measures it).
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
import weakref
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, ProcessGroup, Store

from lightning_gpuorch.errors import CollectiveError, CollectiveTimeoutError, StepAbortedError
from lightning_gpuorch.parallel.groups.communicators import (
    AbandonedError,
    GlooCommunicator,
    GroupConnections,
    NCCLCommunicator,
    prepare_nccl,
)

log = logging.getLogger(__name__)

BACKENDS = {"gloo": "gpuorch_gloo", "nccl": "gpuorch_nccl"}
"""Name under which the recoverable form of a backend is registered with torch.distributed."""

CollectiveHook = Callable[[str, int, float], Any]
"""``hook(op, num_bytes, seconds)``, called when a collective is seen to be complete."""

collective_hooks: list[CollectiveHook] = []
"""Told of every collective of a recoverable gloo group. NCCL's complete on the device, unseen by the host."""

IssueHook = Callable[["RecoverableProcessGroup", str, tuple[Any, ...], dict[str, Any]], Any]
"""``hook(group, method, args, kwargs)``, called when a collective has been issued, with its arguments."""

issue_hooks: list[IssueHook] = []

_groups: weakref.WeakSet[RecoverableProcessGroup] = weakref.WeakSet()
_numbers = itertools.count()


def live_groups() -> list[RecoverableProcessGroup]:
    """The recoverable groups of this process, in the order they were made, which is the same on every rank."""
    return sorted(_groups, key=lambda group: group.number)


def register_backends() -> None:
    """Make the recoverable backends known to ``torch.distributed.init_process_group``; safe to call again."""
    if BACKENDS["gloo"].upper() in dist.Backend._plugins:
        return
    dist.Backend.register_backend(BACKENDS["gloo"], _create_gloo, devices=["cpu", "cuda"])
    dist.Backend.register_backend(BACKENDS["nccl"], _create_nccl, devices=["cuda"])


def _create_gloo(store: Store, rank: int, size: int, timeout: timedelta) -> RecoverableProcessGroup:
    return RecoverableProcessGroup(GlooCommunicator, store, rank, size, timeout)


def _create_nccl(store: Store, rank: int, size: int, timeout: timedelta) -> RecoverableProcessGroup:
    prepare_nccl(timeout.total_seconds())
    return RecoverableProcessGroup(NCCLCommunicator, store, rank, size, timeout)


class RecoverableWork(dist.Work):
    """A collective on its way.

    torch keeps a work that was not waited for until the process ends, and with it the tensors; this one releases
    everything when its epoch is given up.
    """

    def __init__(self, inner: dist.Work, group: RecoverableProcessGroup, op: str, num_bytes: int, began: float):
        super().__init__()
        self._inner: dist.Work | None = inner
        self._group, self._epoch = group, group.epoch
        self._op, self._num_bytes, self._began = op, num_bytes, began
        group._in_flight.add(self)

    def wait(self, timeout: timedelta | None = None) -> bool:
        """Wait for completion.

        Args:
            timeout: Longest wait; None, or nothing at all, stands for the group's.

        Raises:
            StepAbortedError: The epoch was given up.
            CollectiveTimeoutError: The other ranks did not take part in time.
            CollectiveError: The collective failed.
        """
        inner, group = self._inner, self._group
        if inner is None:
            if self._epoch == group.epoch and group.aborted is None:
                return True  # waited for already
            raise StepAbortedError(f"{self._op} was given up: {group.aborted or 'its epoch is over'}")
        seconds = timeout.total_seconds() if timeout else group.timeout_seconds
        try:
            group._wait(inner, self._op, self._epoch, time.monotonic() + seconds, seconds)
        finally:
            self.drop()
        if collective_hooks:
            group._observe(self._op, self._num_bytes, time.perf_counter() - self._began)
        return True

    def drop(self) -> None:
        """Release the tensors."""
        self._inner = None
        self._group._in_flight.discard(self)

    def _required(self) -> dist.Work:
        if self._inner is None:
            raise StepAbortedError(f"{self._op} is over or was given up.")
        return self._inner

    def is_completed(self) -> bool:
        """Whether it is complete, or over in any other way."""
        return self._inner is None or self._inner.is_completed()

    def is_success(self) -> bool:
        """Whether it is complete without an error."""
        return self._inner is None or self._inner.is_success()

    def exception(self) -> Any:
        """Its error, if it has one."""
        return None if self._inner is None else self._inner.exception()

    def source_rank(self) -> int:
        """Who sent what was received from anybody."""
        return self._required()._source_rank()

    _source_rank = source_rank

    def result(self) -> Any:
        """Its output tensors."""
        return self._required().result()

    def synchronize(self) -> None:
        """Let the current stream wait for it."""
        self.wait()

    def get_future(self) -> Any:
        """A future of its output; it does not know of epochs."""
        return self._required().get_future()


class RecoverableProcessGroup(ProcessGroup):
    """A process group with replaceable connections.

    Args:
        connect: Makes the connections of one epoch.
        store: Shared by the ranks of the group.
        rank: This process's rank in the group.
        size: Ranks in the group.
        timeout: Longest wait for a collective.

    Attributes:
        epoch: Number of the present connections.
        aborted: Why the present epoch was given up; None while it is in use.
        num_collectives: Collectives begun so far.
        num_failed: Those of them that failed before they were on their way.
    """

    def __init__(
        self,
        connect: Callable[[Store, int, int, float], GroupConnections],
        store: Store,
        rank: int,
        size: int,
        timeout: timedelta,
    ):
        super().__init__(rank, size)  # type: ignore[call-arg]
        self._connect, self._store, self._rank, self._size = connect, store, rank, size
        self.timeout_seconds = timeout.total_seconds()
        self.number = next(_numbers)
        self.epoch = self.num_collectives = self.num_failed = 0
        self.aborted: str | None = None
        self._name = self._description = ""
        self._in_flight: weakref.WeakSet[RecoverableWork] = weakref.WeakSet()
        self._lock = threading.Lock()
        self._reapers: list[threading.Thread] = []
        self._inner: GroupConnections | None = connect(PrefixStore("epoch-0", store), rank, size, self.timeout_seconds)
        _groups.add(self)

    # Epochs

    def give_up(self, reason: str = "given up", epoch: int | None = None) -> bool:
        """Give up the present epoch: waits for its collectives raise, here and on the other ranks.

        Args:
            reason: For the errors.
            epoch: Do nothing if another one has begun; a late message must not hit it.

        Returns:
            Whether this call gave it up.
        """
        with self._lock:
            if self._inner is None or self.aborted is not None or epoch not in (None, self.epoch):
                return False
            self.aborted = reason  # first: a caller that then gets an error or garbage finds the reason
            if self._size > 1:
                self._inner.abort()
            return True

    def rebuild(self, epoch: int) -> None:
        """Reconnect, with the other ranks that do the same.

        Args:
            epoch: Number of the new epoch, never used before.

        Raises:
            RuntimeError: The other ranks could not be reached; may be tried again with a higher number.
        """
        self.give_up("a new epoch begins")
        with self._lock:
            old, self._inner = self._inner, None
            self.aborted = self.aborted or "a new epoch begins"
        for work in list(self._in_flight):
            work.drop()
        if old is not None:
            self._release(old)
        connections = self._connect(
            PrefixStore(f"epoch-{epoch}", self._store), self._rank, self._size, self.timeout_seconds
        )
        with self._lock:
            self._inner, self.epoch, self.aborted = connections, epoch, None

    def wait_until_released(self, timeout_seconds: float) -> None:
        """Wait until the connections of former epochs are gone, with the threads behind them."""
        deadline = time.monotonic() + timeout_seconds
        for reaper in self._reapers:
            reaper.join(max(0.0, deadline - time.monotonic()))

    def shutdown(self) -> None:
        """Close the connections."""
        with self._lock:
            old, self._inner = self._inner, None
            self.aborted = self.aborted or "the group is shut down"
        if old is not None:
            old.close()
        _groups.discard(self)

    def _release(self, old: GroupConnections) -> None:
        # Off the critical path: the threads of the backend end first, which takes up to 150 ms. Not a daemon thread:
        # one that Python stops inside of the backend at exit would abort the process.
        box = [old]
        reaper = threading.Thread(target=lambda: box.pop().close(), name="gpuorch-reaper")
        self._reapers = [*(one for one in self._reapers if one.is_alive()), reaper]
        del old
        reaper.start()

    # Collectives

    def _current(self) -> ProcessGroup:
        inner = self._inner
        if self.aborted is not None or inner is None or inner.group is None:
            raise StepAbortedError(f"the ranks of this group left the step: {self.aborted}")
        return inner.group

    def _wait(self, work: dist.Work, op: str, epoch: int, deadline: float, limit_seconds: float) -> None:
        inner = self._inner
        if inner is None:
            raise StepAbortedError(f"{op} was given up: {self.aborted}")
        try:
            inner.wait(work, lambda: self._reason_to_stop(epoch), deadline)
        except AbandonedError as reason:
            raise StepAbortedError(f"{op} was given up: {reason}") from None
        except TimeoutError:
            raise CollectiveTimeoutError(
                f"rank {self._rank} of {self._size} waited {limit_seconds:g} s in {op} for the other ranks."
            ) from None
        except RuntimeError as error:
            raise self._failed(op, epoch, error) from None

    def _reason_to_stop(self, epoch: int) -> str | None:
        if self.epoch != epoch:
            return "its epoch is over"
        return self.aborted

    def _failed(self, op: str, epoch: int, error: Exception) -> Exception:
        """The error a failed collective raises: its own, or that of the rank that gave up."""
        reason = self._reason_to_stop(epoch)
        if reason is not None:
            return StepAbortedError(f"{op} was given up: {reason}")
        # gloo goes on with advice that fits a dead process, which this seldom is.
        text = str(error).partition(". This is")[0].partition("\n")[0] or type(error).__name__
        kind = CollectiveTimeoutError if "timed out" in text.lower() else CollectiveError
        return kind(f"{op} failed on rank {self._rank} of {self._size}: {text}")

    def _observe(self, op: str, num_bytes: int, seconds: float) -> None:
        for hook in collective_hooks:
            try:
                hook(op, num_bytes, seconds)
            except Exception:  # an observer never kills the job
                log.exception("a hook for collectives failed and is removed")
                collective_hooks.remove(hook)
                return

    # What torch asks of a process group. Names are torch's.

    def abort(self) -> None:  # noqa: D102
        self.give_up("abort() was called")

    def getBackendName(self) -> str:  # noqa: N802, D102
        return "gpuorch"

    def name(self) -> str:  # noqa: D102
        return "gpuorch"

    _get_backend_name = name

    def rank(self) -> int:  # noqa: D102
        return self._rank

    def size(self) -> int:  # noqa: D102
        return self._size

    getRank, getSize = rank, size  # noqa: N815

    def getGroupName(self) -> str:  # noqa: N802, D102
        return self._name

    def setGroupName(self, name: str) -> None:  # noqa: N802, D102
        self._name = name

    _set_group_name = setGroupName

    def getGroupDesc(self) -> str:  # noqa: N802, D102
        return self._description

    def setGroupDesc(self, desc: str) -> None:  # noqa: N802, D102
        self._description = desc

    _set_group_desc = setGroupDesc

    @property
    def group_name(self) -> Any:  # noqa: D102
        return self._name

    @property
    def group_desc(self) -> str:  # noqa: D102
        return self._description

    @property  # type: ignore[misc]
    def bound_device_id(self) -> torch.device | None:  # noqa: D102
        return torch.device("cuda", torch.cuda.current_device()) if self._device_type == "cuda" else None

    @property
    def _device_type(self) -> str:
        return "cuda" if self._connect is NCCLCommunicator else "cpu"

    @property
    def _device_types(self) -> list[torch.device]:
        return [torch.device(self._device_type)]

    def _get_backend(self, device: torch.device) -> Any:
        return self._current()._get_backend(device)

    def _has_hooks(self) -> bool:
        return False

    def get_group_store(self) -> Store:  # noqa: D102
        return self._store

    def set_timeout(self, timeout: timedelta) -> None:  # noqa: D102
        self.timeout_seconds = timeout.total_seconds()


def _num_bytes(value: Any) -> int:
    """Bytes of the tensors among a collective's first argument, which is what it sends or receives."""
    if isinstance(value, torch.Tensor):
        return value.nbytes
    if isinstance(value, (list, tuple)):
        return sum(_num_bytes(item) for item in value)
    return 0


def _collective(method: str, op: str) -> Callable[..., Any]:
    def issue(self: RecoverableProcessGroup, *args: Any, **kwargs: Any) -> RecoverableWork | None:
        began = time.perf_counter()
        group, epoch = self._current(), self.epoch
        self.num_collectives += 1
        try:
            work = getattr(group, method)(*args, **kwargs)
        except RuntimeError as error:
            self.num_failed += 1
            if _is_of_the_connection(error):
                raise self._failed(op, epoch, error) from None
            raise  # a wrong argument, or memory ran out: the caller has to know
        for hook in issue_hooks:
            hook(self, method, args, kwargs)
        if work is None:
            return None
        num_bytes = _num_bytes(args[0]) if collective_hooks and args else 0
        return RecoverableWork(work, self, op, num_bytes, began)

    issue.__name__ = issue.__qualname__ = method
    return issue


def _is_of_the_connection(error: RuntimeError) -> bool:
    if isinstance(error, torch.OutOfMemoryError):
        return False
    return isinstance(error, dist.DistBackendError) or "gloo/transport" in str(error)


_COLLECTIVES = {
    "allreduce": "all_reduce",
    "allreduce_coalesced": "all_reduce",
    "allgather": "all_gather",
    "allgather_coalesced": "all_gather",
    "allgather_into_tensor_coalesced": "all_gather",
    "all_gather_single": "all_gather",
    "all_gather_single_coalesced": "all_gather",
    "_allgather_base": "all_gather",
    "alltoall": "all_to_all",
    "alltoall_base": "all_to_all",
    "all_to_all_single": "all_to_all",
    "barrier": "barrier",
    "broadcast": "broadcast",
    "gather": "gather",
    "recv": "recv",
    "recv_anysource": "recv",
    "reduce": "reduce",
    "reduce_scatter": "reduce_scatter",
    "_reduce_scatter_base": "reduce_scatter",
    "reduce_scatter_single": "reduce_scatter",
    "reduce_scatter_single_coalesced": "reduce_scatter",
    "reduce_scatter_tensor_coalesced": "reduce_scatter",
    "scatter": "scatter",
    "send": "send",
}
"""Methods of a process group that communicate, each with the name its latency is reported under."""

for _method, _op in _COLLECTIVES.items():
    if hasattr(ProcessGroup, _method):  # torch renames some from release to release
        setattr(RecoverableProcessGroup, _method, _collective(_method, _op))
