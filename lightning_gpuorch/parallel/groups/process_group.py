"""The data plane of one replica: torch.distributed over its tensor-parallel group."""

from __future__ import annotations

import errno
import logging
import socket
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_gpuorch.errors import ConfigurationError, ControlPlaneError

if TYPE_CHECKING:
    import torch
    from torch.distributed import Store
    from torch.distributed.device_mesh import DeviceMesh

log = logging.getLogger(__name__)

MESH_AXES = ("data_parallel", "tensor_parallel")


class ProcessGroupManager:
    """Sets up and takes down torch.distributed's world.

    Args:
        backend: ``nccl``, ``gloo``, or ``auto``: nccl on CUDA, gloo elsewhere.
        timeout_seconds: Longest wait for one collective.
        device: Device this rank computes on; it is bound before the first collective.
        recoverable: Tensor-parallel groups survive a rank that leaves a step; see
            :mod:`lightning_gpuorch.parallel.groups.recoverable_group`.
    """

    def __init__(
        self,
        backend: str = "auto",
        timeout_seconds: float = 30.0,
        device: torch.device | None = None,
        recoverable: bool = False,
    ):
        self._backend, self._timeout_seconds, self._device = backend, timeout_seconds, device
        self._recoverable = recoverable
        self._owns_world = False
        self._store: Store | None = None
        """Torch keeps the C++ half of a store alive, and not the methods of one that is written in Python."""

    @property
    def timeout_seconds(self) -> float:
        """Longest wait for the other ranks while a group is formed, and for a collective."""
        return self._timeout_seconds

    @property
    def backend(self) -> str:
        """The backend in force on this device."""
        if self._backend != "auto":
            return self._backend
        return "nccl" if self._device is not None and self._device.type == "cuda" else "gloo"

    @property
    def initialized(self) -> bool:
        """Whether torch.distributed has a world."""
        import torch.distributed as dist

        return dist.is_available() and dist.is_initialized()

    def initialize(
        self,
        rank: int,
        world_size: int,
        master_addr: str = "127.0.0.1",
        master_port: int = 29500,
        *,
        store: Store | None = None,
        is_replica: bool = False,
    ) -> None:
        """Form the world. Does nothing if one of the same shape already exists.

        Args:
            rank: This process's rank in the world.
            world_size: Number of ranks.
            master_addr: Host of rank 0's store, if no ``store`` is given.
            master_port: Port of rank 0's store, if no ``store`` is given.
            store: A store that all ranks already share.
            is_replica: The world is one tensor-parallel group, and recoverable if such groups are.

        Raises:
            ConfigurationError: Rank out of range, nccl without CUDA, or a world of another shape exists.
            ControlPlaneError: The other ranks did not come in time.
        """
        import torch
        import torch.distributed as dist

        if not 0 <= rank < world_size:
            raise ConfigurationError(f"rank={rank} is outside a world of {world_size} ranks.")
        if self.backend == "nccl" and not torch.cuda.is_available():
            raise ConfigurationError(
                f"backend='nccl' needs CUDA, which rank {rank} does not see; use 'auto' or 'gloo'."
            )
        if dist.is_initialized():
            if (dist.get_rank(), dist.get_world_size()) != (rank, world_size):
                raise ConfigurationError(
                    f"torch.distributed is already initialised as rank {dist.get_rank()} of {dist.get_world_size()}; "
                    f"the job needs rank {rank} of {world_size}. Do not call init_process_group yourself."
                )
            return
        if self._device is not None and self._device.type == "cuda":
            torch.cuda.set_device(self._device)
        timeout = timedelta(seconds=self._timeout_seconds)
        if store is None:
            store = self.create_store(master_addr, master_port, rank == 0, world_size)
        self._store = store
        backend = self._tensor_parallel_backend() if is_replica else self.backend
        options: dict[str, Any] = {}
        if backend == "nccl":
            options["device_id"] = self._device
        try:
            dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout, **options)
        except (dist.DistError, RuntimeError) as error:
            raise ControlPlaneError(
                f"rank {rank} of {world_size} could not join its {self.backend} group within "
                f"{self._timeout_seconds:g} s: {error}"
            ) from error
        self._owns_world = True
        log.debug("rank %d of %d joined a %s group", rank, world_size, backend)

    def _tensor_parallel_backend(self) -> str:
        if not self._recoverable:
            return self.backend
        from lightning_gpuorch.parallel.groups.recoverable_group import BACKENDS, register_backends

        register_backends()
        return BACKENDS[self.backend]

    def create_store(self, host: str, port: int, is_master: bool, world_size: int) -> Store:
        """Open the key-value store through which the ranks of a group find each other.

        Args:
            host: Host of the master.
            port: Port of the master; 0 lets the master take a free one (``store.port`` tells which).
            is_master: Whether this process hosts the store.
            world_size: Ranks that will connect.

        Raises:
            ControlPlaneError: The store cannot be reached.
        """
        import torch.distributed as dist

        options: dict[str, Any] = {}
        try:
            if is_master:
                # By itself the store listens on all interfaces. It takes the socket over, and closes it.
                listening = _listen(host, port)
                port = listening.getsockname()[1]
                options["master_listen_fd"] = listening.detach()
            return dist.TCPStore(
                host,
                port,
                world_size,
                is_master=is_master,
                wait_for_workers=False,
                timeout=timedelta(seconds=self._timeout_seconds),
                **options,
            )
        except (dist.DistError, RuntimeError, OSError) as error:
            raise ControlPlaneError(f"no store at {host}:{port}: {error}") from error

    def create_local_store(self, path: Path, world_size: int) -> Store:
        """Open a store for ranks of one host, in a file.

        A store that listens can be read and changed by every user of the host, its list of keys included.

        Args:
            path: In a directory of this user's alone; not used before.
            world_size: Ranks that will open it.
        """
        import torch.distributed as dist

        store = dist.FileStore(str(path), world_size)
        store.set_timeout(timedelta(seconds=self._timeout_seconds))
        return store

    def device_mesh(self, data_parallel_size: int, tensor_parallel_size: int) -> DeviceMesh:
        """The mesh handed to ``parallelize_fn``, with axes named ``data_parallel`` and ``tensor_parallel``.

        A replica is a world of its own, so inside it ``data_parallel_size`` is 1, and its world is the mesh's
        tensor-parallel group.
        """
        import torch
        import torch.distributed as dist
        from torch.distributed.device_mesh import DeviceMesh

        kind = self._device.type if self._device is not None else "cpu"
        ranks = torch.arange(data_parallel_size * tensor_parallel_size).view(data_parallel_size, tensor_parallel_size)
        timeout = timedelta(seconds=self._timeout_seconds)
        if data_parallel_size == 1:
            tensor_parallel: Any = dist.group.WORLD
        else:
            backend = self._tensor_parallel_backend()
            tensor_parallel = _own_group(ranks.tolist(), backend, timeout)
        data_parallel = _own_group(ranks.T.tolist(), self.backend, timeout)
        return DeviceMesh.from_group([data_parallel, tensor_parallel], kind, ranks, mesh_dim_names=MESH_AXES)

    def barrier(self) -> None:
        """Wait for all ranks of the world; a world of one needs no process group."""
        import torch.distributed as dist

        if self.initialized:
            if self.backend == "nccl" and self._device is not None:
                dist.barrier(device_ids=[self._device.index])
            else:
                dist.barrier()

    def broadcast_object(self, obj: Any, src_rank: int = 0) -> Any:
        """Return rank ``src_rank``'s object on every rank of the world.

        Raises:
            ConfigurationError: ``src_rank`` is outside the world.
        """
        import torch.distributed as dist

        world_size = dist.get_world_size() if self.initialized else 1
        if not 0 <= src_rank < world_size:
            raise ConfigurationError(f"src_rank={src_rank} is outside a world of {world_size} ranks.")
        if not self.initialized:
            return obj
        box = [obj]
        dist.broadcast_object_list(box, src_rank)
        return box[0]

    def finalize(self) -> None:
        """Take down the world this object made; safe to call again."""
        import torch.distributed as dist

        if self._owns_world and dist.is_initialized():
            dist.destroy_process_group()
        self._owns_world, self._store = False, None


def _own_group(groups: list[list[int]], backend: str, timeout: timedelta) -> Any:
    """Make groups of global ranks, as every rank of the world must, and give the one this rank is in."""
    import torch.distributed as dist

    own = None
    for ranks in groups:
        group = dist.new_group(ranks, timeout=timeout, backend=backend)
        if dist.get_rank() in ranks:
            own = group
    return own


def _listen(host: str, port: int) -> socket.socket:
    """Listen on the address that a host's name stands for, and on no other if it is one of this host's."""
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    listening = socket.socket(family, kind, protocol)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind(address)
        except OSError as error:
            if error.errno != errno.EADDRNOTAVAIL:
                raise
            listening.bind(("", port))  # the name stands for a gateway: others reach this host through it
        listening.listen(128)
    except BaseException:
        listening.close()
        raise
    return listening
