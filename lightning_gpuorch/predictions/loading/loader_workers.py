"""Worker processes of a ``DataLoader`` end with the rank they serve, however that ends.

A rank that is killed can end nobody. torch's workers look whether their parent is there every five seconds, and go on with
what they are reading until then.
"""

from __future__ import annotations

import copy
import functools
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader

from lightning_gpuorch.predictions.loading.world_of_one import world_of_one

_LOOK_SECONDS = 0.5
_READ_SECONDS = 120
"""How long a worker that reads ahead of the job may take for one batch."""


def copy_loader(loader: DataLoader[Any], **changed: Any) -> DataLoader[Any]:
    """A copy of a loader with other attributes, whose workers end with this process.

    A copy and not a new instance, so that subclasses and all their arguments survive. ``DataLoader`` forbids setting some
    attributes after construction, because an iterator may be running; the copy has none.
    """
    clone = copy.copy(loader)
    clone._iterator = None
    for name, value in changed.items():
        object.__setattr__(clone, name, value)
    tie_workers(clone)
    return clone


def read_in_worker(loader: DataLoader[Any], **changed: Any) -> Iterator[Any]:
    """Read batches in one worker process, where the loader's own workers would read, or else in a child process.

    This process's copy of the dataset is not touched: what it opens on the first read would be shared with every worker
    that is forked later, and what it draws would be missing in the random state.

    Args:
        loader: The user's loader.
        **changed: Attributes in which it differs for this reading, such as ``collate_fn``.

    Yields:
        Batches, never pinned.

    Raises:
        Exception: What reading raised, or that the worker did not answer in time.
    """
    own: dict[str, Any] = {"num_workers": 1, "prefetch_factor": 2, "pin_memory": False, "persistent_workers": False}
    if not loader.num_workers:
        # Forked, as a Linux loader's workers are: the dataset need not be one that can be pickled.
        context = multiprocessing.get_context("fork") if sys.platform == "linux" else None
        own |= {"multiprocessing_context": context, "worker_init_fn": None, "timeout": _READ_SECONDS}
    clone = copy_loader(loader, **own, generator=torch.Generator().manual_seed(0), **changed)
    with world_of_one():
        batches = DataLoader.__iter__(clone)  # the class may have one that reads elsewhere
    yield from batches


def tie_workers(loader: DataLoader[Any]) -> None:
    """Let the workers that a loader will start end with this process.

    Not by asking the kernel for a signal: that comes when the thread that started them ends, which may be one that reads
    ahead.
    """
    if loader.num_workers:
        loader.worker_init_fn = functools.partial(_begin, loader.worker_init_fn)


def _begin(users: Callable[[int], Any] | None, worker: int) -> None:
    """In the worker, before it reads anything."""
    watch = threading.Thread(target=_end_with, args=(os.getppid(),), name="gpuorch-rank-watch", daemon=True)
    watch.start()
    if users is not None:
        users(worker)


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_LOOK_SECONDS)
    os._exit(1)
