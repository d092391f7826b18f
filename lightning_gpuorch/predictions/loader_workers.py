"""Worker processes of a ``DataLoader`` end with the rank they serve, however that ends.

A rank that is killed can end nobody. torch's workers look whether their parent is there every five seconds, and go on with
what they are reading until then.
"""

from __future__ import annotations

import functools
import os
import threading
import time
from collections.abc import Callable
from typing import Any

from torch.utils.data import DataLoader

_LOOK_SECONDS = 0.5


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
