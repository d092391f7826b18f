"""While data is read, the process looks like the only one: a stream that is read whole must not shard itself.

Streams commonly shard themselves by what they find in the environment, in torch.distributed or in the Trainer. Every
replica here reads the whole stream and computes the chunks it leases, so a stream that returns one rank's share would
lose the rest. :func:`world_of_one` hides the job from code that runs inside of it, and from worker processes that are
started inside of it. What was told its share before, when it was built, is found by :func:`undo_split`, or else by the
digests that replicas compare.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
from collections.abc import Callable, Generator, Iterator, Mapping
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from lightning_gpuorch.predictions.loading.dataloaders import end_workers

log = logging.getLogger(__name__)

_RANKS = (
    "RANK", "LOCAL_RANK", "GLOBAL_RANK", "NODE_RANK", "GROUP_RANK", "ROLE_RANK",
    "SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID",
    "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_NODE_RANK",
    "MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_LOCAL_RANK", "PMI_RANK", "PMIX_RANK", "JSM_NAMESPACE_RANK",
)  # fmt: skip
_SIZES = (
    "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE", "ROLE_WORLD_SIZE", "NNODES", "NUM_NODES",
    "SLURM_NTASKS", "SLURM_NPROCS", "SLURM_NNODES", "SLURM_JOB_NUM_NODES", "SLURM_STEP_NUM_TASKS",
    "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_LOCAL_SIZE",
    "PMI_SIZE", "JSM_NAMESPACE_SIZE",
)  # fmt: skip
_ALONE = {**dict.fromkeys(_RANKS, "0"), **dict.fromkeys(_SIZES, "1")}
_MAX_OBJECTS = 1000
"""Objects to look at, in search of a dataset that was split when it was built."""

T = TypeVar("T")


class _Job:
    """What shows the other ranks to code in this process, and hides them."""

    def __init__(self) -> None:
        self.hidden = False
        self._environment: dict[str, str] = {}
        self._group: Any = None
        self._codes = (dist.get_rank.__code__, dist.get_world_size.__code__)
        self._shown: list[tuple[Any, str, Any]] = []
        self.attributes: dict[tuple[int, str], tuple[Any, str, Any]] = {}
        """Attributes of other objects that tell a rank, and what each is while the job is hidden."""

    def hide(self) -> None:
        self._environment = {name: os.environ[name] for name in _ALONE if name in os.environ}
        os.environ.update({name: _ALONE[name] for name in self._environment})
        self._group, distributed_c10d._world.default_pg = distributed_c10d._world.default_pg, None
        # Code that comes from ddp asks for the rank without looking whether there is a process group. It may have imported
        # the functions themselves, so they are not replaced but changed.
        self._codes = (dist.get_rank.__code__, dist.get_world_size.__code__)
        dist.get_rank.__code__, dist.get_world_size.__code__ = _rank_of_one.__code__, _size_of_one.__code__
        self._shown = [(owner, name, getattr(owner, name)) for owner, name, _ in self.attributes.values()]
        for owner, name, alone in self.attributes.values():
            setattr(owner, name, alone)
        self.hidden = True

    def show(self) -> None:
        os.environ.update(self._environment)
        distributed_c10d._world.default_pg = self._group
        dist.get_rank.__code__, dist.get_world_size.__code__ = self._codes
        for owner, name, shown in self._shown:
            setattr(owner, name, shown)
        self.hidden = False


_job = _Job()


def job_is_hidden() -> bool:
    """Whether this process reads data just now, or is a worker process that does nothing else."""
    return _job.hidden


def hide_as_well(owner: Any, name: str, alone: Any) -> None:
    """Hide the job in one more place.

    Args:
        owner: Has an attribute that tells a rank, or a number of ranks.
        name: The attribute.
        alone: What it is for a process that is alone.
    """
    _job.attributes[id(owner), name] = (owner, name, alone)


@contextlib.contextmanager
def world_of_one(hide: bool = True) -> Iterator[None]:
    """Hide the other ranks from what runs inside; with ``hide=False``, show them again for a while.

    The environment says rank 0 of 1, torch.distributed has no process group, and the strategies' ``global_rank`` and
    ``world_size`` are 0 and 1. Child processes that are started inside stay in such a world.
    """
    if hide == _job.hidden:
        yield
        return
    enter, leave = (_job.hide, _job.show) if hide else (_job.show, _job.hide)
    enter()
    try:
        yield
    finally:
        leave()


class read_alone(Iterator[T]):  # noqa: N801 - called like the generator function that it is
    """Iterate with the job hidden. An item that cannot be read raises, and the iteration goes on behind it if it can.

    Args:
        make: Starts the iteration.
        in_this_process: Items are made here, so that the job is hidden for each of them; otherwise worker processes
            make them, which inherit what they were started in.
    """

    def __init__(self, make: Callable[[], Iterator[T]], in_this_process: bool):
        self._make, self._in_this_process = make, in_this_process
        self._items: Iterator[T] | None = None

    def __next__(self) -> T:
        with world_of_one(hide=self._in_this_process or self._items is None):
            if self._items is None:
                self._items = self._make()  # a loader may start its workers no sooner than with the first item
            return next(self._items)

    def close(self) -> None:
        """End the iteration, and the worker processes that serve it."""
        if isinstance(self._items, Generator):  # a loader of another library around torch's iterator
            self._items.close()
        end_workers(self._items)


def undo_split(loader: Any, rank: int, world_size: int) -> None:
    """Give a dataset that was split by rank when it was built the whole of its data again.

    Known are Hugging Face's ``split_dataset_by_node`` on an ``IterableDataset`` and litdata's ``StreamingDataset``. A
    split for other ranks than the job's is left alone: the job as a whole is to compute that share.

    Args:
        loader: The user's dataloader; datasets in it are changed in place.
        rank: Global rank of this process.
        world_size: Ranks in the job.
    """
    for dataset in _datasets_in(loader):
        split = getattr(dataset, "_distributed", None)
        if (getattr(split, "rank", None), getattr(split, "world_size", 1)) == (rank, world_size) and world_size > 1:
            dataset._distributed = None
            _tell(dataset)
        detected: Any = getattr(dataset, "distributed_env", None)
        if getattr(detected, "world_size", 1) == world_size and world_size > 1:  # found in the environment, never given
            dataset.distributed_env = type(detected)(1, 0, 1)
            dataset.drop_last = False  # litdata sets it where it finds several ranks
            dataset.shuffler = None  # it was made with both
            _tell(dataset)


def _tell(dataset: Any) -> None:
    log.info(
        "%s was split by rank; every replica reads the whole of it and computes the batches it leases, so the split is "
        "undone",
        type(dataset).__name__,
    )


def _datasets_in(loader: Any) -> Iterator[Any]:
    """A loader, and what is found in its attributes and theirs."""
    seen: set[int] = set()
    waiting = [loader]
    while waiting and len(seen) < _MAX_OBJECTS:
        current = waiting.pop()
        if id(current) in seen or isinstance(current, (str, bytes, type, torch.Tensor, torch.nn.Module)):
            continue
        seen.add(id(current))
        if isinstance(current, (list, tuple)):
            waiting.extend(current[:_MAX_OBJECTS])
        elif isinstance(current, Mapping):
            waiting.extend(itertools.islice(current.values(), _MAX_OBJECTS))
        elif isinstance(getattr(current, "__dict__", None), dict):
            yield current
            waiting.extend(vars(current).values())


def _rank_of_one(group: Any = None) -> int:
    return 0


def _size_of_one(group: Any = None) -> int:
    return 1
