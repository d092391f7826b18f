"""One generation of a process group's connections, which can really be given up.

A rank that leaves a step in the middle leaves its peers inside a collective. They come out when the connections are
broken under it. ``abort()`` of torch's gloo backend does not do that while anything refers to the backend (torch
2.13), so the connections are shut down below it, at their sockets.
"""

from __future__ import annotations

import contextlib
import math
import os
import socket
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup, Store

_FileDescriptor = tuple[int, str]

_construction = threading.Lock()
"""Which sockets are new is told by a look before and a look after; one at a time."""


class GroupConnections(Protocol):
    """Connections among the ranks of a group, and the process group that speaks over them.

    Attributes:
        group: Issues the collectives.
        device_type: Where their tensors are.
    """

    group: ProcessGroup | None
    device_type: str

    def wait(self, work: dist.Work, given_up: Callable[[], str | None], deadline: float) -> None:
        """Wait for a collective as long as its backend's users do; see the implementations.

        Args:
            work: What to wait for.
            given_up: Gives a reason as soon as no rank shall wait any more.
            deadline: On the clock of ``time.monotonic``.

        Raises:
            AbandonedError: ``given_up`` gave a reason.
            TimeoutError: The deadline has passed.
            RuntimeError: The collective failed.
        """
        ...

    def abort(self) -> None:
        """Break the connections: a rank that waits for a collective, here or elsewhere, gets an error."""
        ...

    def close(self) -> None:
        """Release everything; may take a while, since threads of the backend end first."""
        ...


class AbandonedError(Exception):
    """A wait was given up, for the reason in the text."""


class GlooCommunicator:
    """Connections of the gloo backend.

    Args:
        store: Through which the ranks find each other; keys must not have been used before.
        rank: This process's rank in the group.
        size: Ranks in the group.
        timeout_seconds: How long to wait for the other ranks.
    """

    device_type = "cpu"
    slice_seconds = 0.005
    """How long a wait may sleep before it looks whether it was given up. A result that comes in ends it at once."""

    def __init__(self, store: Store, rank: int, size: int, timeout_seconds: float):
        from torch.distributed import ProcessGroupGloo

        with _construction:
            before = _open_sockets()
            backend = ProcessGroupGloo(store, rank, size, timeout=timedelta(seconds=timeout_seconds))
            new = _open_sockets() - before
        backend._set_sequence_number_for_group()
        self.group: ProcessGroup | None = ProcessGroup(store, rank, size)
        self.group._set_default_backend(ProcessGroup.BackendType.GLOO)
        for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
            self.group._register_backend(torch.device(device), ProcessGroup.BackendType.GLOO, backend)
        self._connections = _between_ranks(new, store, rank, size)
        self._slice = timedelta(seconds=self.slice_seconds)

    def wait(self, work: dist.Work, given_up: Callable[[], str | None], deadline: float) -> None:
        """Block until the collective is complete; see :meth:`GroupConnections.wait`.

        Never longer than a slice inside of the backend: gloo does not wake a sender whose connection has died.
        """
        while True:
            try:
                work.wait(self._slice)
            except RuntimeError:
                if work.is_completed():
                    work.wait(self._slice)  # completed in between, or its own error
                    return
                reason = given_up()
                if reason is not None:
                    raise AbandonedError(reason) from None
                if time.monotonic() > deadline:
                    raise TimeoutError from None
            else:
                return

    def abort(self) -> None:
        """See :meth:`GroupConnections.abort`."""
        for descriptor, _ in self._connections & _open_sockets():
            with contextlib.suppress(OSError), _socket_of(descriptor) as connection:  # it has been closed since
                connection.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """See :meth:`GroupConnections.close`.

        Takes some milliseconds, but up to the timeout in the rare case that a thread of gloo was sending when its
        connection was broken, since nothing wakes it; the buffer that was being sent lives until then.
        """
        self.group = None


def _open_sockets() -> set[_FileDescriptor]:
    """Descriptors with the inode behind them, which tells a descriptor that was closed and reused."""
    found = set()
    for name in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{name}")
        except OSError:  # closed since the listing
            continue
        if target.startswith("socket:"):
            found.add((int(name), target))
    return found


def _socket_of(descriptor: int) -> socket.socket:
    return socket.socket(fileno=os.dup(descriptor))


def _between_ranks(new: set[_FileDescriptor], store: Store, rank: int, size: int) -> set[_FileDescriptor]:
    """Those of the new sockets that connect ranks of the group.

    Another thread may have opened one meanwhile. One of ours ends, here or there, at a port on which a rank of the
    group listens. The listening socket itself is left alone: gloo ends the process when its accept() fails.
    """
    listening, connected = [], {}
    for one in new:
        with contextlib.suppress(OSError), _socket_of(one[0]) as opened:
            if opened.family not in (socket.AF_INET, socket.AF_INET6):
                continue
            if opened.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                listening.append(opened.getsockname()[1])
            else:
                connected[one] = (opened.getsockname()[1], opened.getpeername()[1])
    store.set(f"listening/{rank}", ",".join(map(str, listening)))
    ports = store.multi_get([f"listening/{other}" for other in range(size)])
    everybody = {int(port) for text in ports for port in text.decode().split(",") if port}
    return {one for one, (here, there) in connected.items() if here in listening or there in everybody}


class NCCLCommunicator:
    """Connections of the NCCL backend on this process's current device. See :func:`prepare_nccl`.

    Args:
        store: See :class:`GlooCommunicator`.
        rank: See :class:`GlooCommunicator`.
        size: See :class:`GlooCommunicator`.
        timeout_seconds: See :class:`GlooCommunicator`.
    """

    device_type = "cuda"

    def __init__(self, store: Store, rank: int, size: int, timeout_seconds: float):
        from torch.distributed import ProcessGroupNCCL

        options = ProcessGroupNCCL.Options()
        options._timeout = timedelta(seconds=timeout_seconds)
        self._backend: Any = ProcessGroupNCCL(store, rank, size, options)
        self._backend._set_sequence_number_for_group()
        device = torch.device("cuda", torch.cuda.current_device())
        self.group: ProcessGroup | None = ProcessGroup(store, rank, size)
        self.group._set_default_backend(ProcessGroup.BackendType.NCCL)
        self.group._register_backend(device, ProcessGroup.BackendType.NCCL, self._backend)
        # Now rather than at the first collective: what cannot be connected shows here, where it can be tried again, and
        # no rank gives up connections that are only half made.
        self._backend.eager_connect_single_device(device)
        self._complete_first_collective(device, timeout_seconds)

    def _complete_first_collective(self, device: torch.device, timeout_seconds: float) -> None:
        """Only then is everything connected."""
        assert self.group is not None
        work = self.group.allreduce([torch.zeros(1, device=device)], dist.AllreduceOptions())
        deadline = time.monotonic() + timeout_seconds
        while not work.is_completed():
            if time.monotonic() > deadline:
                self.abort()
                raise TimeoutError(f"the ranks of the group are not connected after {timeout_seconds:g} s")
            time.sleep(2e-4)
        work.wait()

    def wait(self, work: dist.Work, given_up: Callable[[], str | None], deadline: float) -> None:
        """Let the current stream wait; the host goes on, as NCCL's users expect.

        A wait with a limit would block the host and let the backend end the process at the limit. Code that needs
        the result on the host waits there, and checks the flag afterwards: an aborted collective leaves garbage behind.
        """
        work.wait()
        reason = given_up()
        if reason is not None:
            raise AbandonedError(reason)

    def abort(self) -> None:
        """See :meth:`GroupConnections.abort`."""
        self._backend.abort()

    def close(self) -> None:
        """See :meth:`GroupConnections.close`."""
        self._backend = self.group = None


NCCL_SETTINGS = {
    # The backend's own threads must not end a process that is about to recover.
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",
    "TORCH_NCCL_ENABLE_MONITORING": "0",
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "0",
    "TORCH_NCCL_RETHROW_CUDA_ERRORS": "0",
    # Calls return at once and can be aborted while they wait for a peer.
    "TORCH_NCCL_USE_COMM_NONBLOCKING": "1",
    # Multicast memory is not given back reliably when a communicator is aborted.
    "NCCL_NVLS_ENABLE": "0",
}


def prepare_nccl(timeout_seconds: float) -> None:
    """Set what an abortable NCCL needs, where the user has not; before the first use of NCCL in this process.

    Args:
        timeout_seconds: Longest wait for the other ranks while connections are made.
    """
    for name, value in {**NCCL_SETTINGS, "TORCH_NCCL_NONBLOCKING_TIMEOUT": str(math.ceil(timeout_seconds))}.items():
        os.environ.setdefault(name, value)
