"""Worker processes of a ``DataLoader`` end with the rank they serve, however that ends.

A rank that is killed can end nobody. torch's workers look whether their parent is there every five seconds, and go on with
what they are reading until then.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
import logging
import multiprocessing
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import FrameType
from typing import Any

import torch
from torch.utils.data import DataLoader, Sampler
from torch.utils.data._utils import signal_handling

from lightning_gpuorch.predictions.loading.dataloaders import end_workers
from lightning_gpuorch.predictions.loading.world_of_one import world_of_one

log = logging.getLogger(__name__)

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


@contextlib.contextmanager
def reading_in_worker(loader: DataLoader[Any], **changed: Any) -> Iterator[Iterator[Any]]:
    """Read batches in one worker process, where the loader's own workers would read, or else in a child process.

    This process's copy of the dataset is not touched: what it opens on the first read would be shared with every worker
    that is forked later, and what it draws would be missing in the random state.

    Args:
        loader: The user's loader.
        **changed: Attributes in which it differs for this reading, such as ``collate_fn``.

    Yields:
        The batches, never pinned. A batch that cannot be read raises; the next one can be asked for unless
        :func:`worker_is_lost`.

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
        reader = DataLoader.__iter__(clone)  # the class may have one that reads elsewhere
    try:
        yield reader
    finally:
        end_workers(reader)


def read_in_worker(loader: DataLoader[Any], **changed: Any) -> list[Any]:
    """Read batches in one worker process, all of them; see :func:`reading_in_worker`."""
    with reading_in_worker(loader, **changed) as reader:
        return list(reader)


def outcomes_in_worker(loader: DataLoader[Any], batches: Sequence[list[Any]], **changed: Any) -> Iterator[Any]:
    """Read batches in one worker process; where one cannot be read, give the exception in its place.

    A batch that ends its worker is read once more, by a worker that reads nothing else: of a worker that has ended it is not
    known how far it had come.

    Args:
        loader: The user's loader.
        batches: Dataset indices of each batch.
        **changed: Attributes in which the loader differs for this reading.
    """
    position, alone = 0, False
    while position < len(batches):
        part = batches[position : position + 1 if alone else len(batches)]
        with reading_in_worker(loader, **fed_by(loader, part), **changed) as reader:
            for _ in part:
                try:
                    with _worker_deaths_raise():
                        outcome = next(reader)
                except Exception as error:  # noqa: BLE001 - whatever reading raises is the outcome
                    if worker_is_lost(error) and not alone:
                        alone = True
                        break
                    outcome = error
                yield outcome
                position, alone = position + 1, False


def fed_by(loader: DataLoader[Any], batches: Iterable[list[Any]]) -> dict[str, Any]:
    """Attributes of a copy of a loader that reads given batches of dataset indices, as many as the loader makes of one."""
    return {"batch_sampler": batches} if loader.batch_sampler is not None else {"sampler": Flattened(batches)}


class Flattened(Sampler[Any]):
    """Single indices out of batches of one."""

    def __init__(self, batches: Iterable[list[Any]]):
        self._batches = batches

    def __iter__(self) -> Iterator[Any]:
        return itertools.chain.from_iterable(self._batches)


def worker_is_lost(error: BaseException) -> bool:
    """Whether an error says that a worker process has ended or does not answer, so that its loader gives nothing more."""
    if isinstance(
        error, (ConnectionError, EOFError)
    ):  # of what it had read, the tensors were still to be fetched from it
        return not str(error).startswith(_RAISED_IN_WORKER)
    return isinstance(error, RuntimeError) and bool(_LOST_WORKER.match(str(error)))


_RAISED_IN_WORKER = "Caught "
"""How torch begins the text of what was raised in a worker."""
_LOST_WORKER = re.compile(r"DataLoader (worker \(pid|timed out after)")


def end_reading(loader: DataLoader[Any]) -> None:
    """End the workers of a copy of a loader, which outlive one iteration.

    A caught exception may still refer to the iterator. If its workers lasted until it is collected, some other thread would
    wait for them, and a process that was forked meanwhile would try to.
    """
    end_workers(loader._iterator)
    loader._iterator = None


def _hold_worker_deaths() -> None:
    """Keep the end of a worker process from raising in whatever the main thread does at that moment.

    torch raises from its handler of SIGCHLD, which may interrupt a step, or a request to the coordinator, that has nothing
    to do with it. The loader finds out by itself when the next batch does not come.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    signal_handling._set_SIGCHLD_handler()
    torchs = signal.getsignal(signal.SIGCHLD)
    if not callable(torchs) or getattr(torchs, "__module__", None) != signal_handling.__name__:
        return

    def handler(number: int, frame: FrameType | None) -> None:
        try:
            torchs(number, frame)
        except RuntimeError as error:
            if _deaths_raise:
                raise
            log.debug("found when the next batch is read: %s", error)

    signal.signal(signal.SIGCHLD, handler)


_deaths_raise = False


@contextlib.contextmanager
def _worker_deaths_raise() -> Iterator[None]:
    """Within, the end of a worker raises at once where the main thread waits for it, and not only after seconds."""
    global _deaths_raise
    _deaths_raise = threading.current_thread() is threading.main_thread()
    try:
        yield
    finally:
        _deaths_raise = False


def tie_workers(loader: DataLoader[Any]) -> None:
    """Let the workers that a loader will start end with this process.

    Not by asking the kernel for a signal: that comes when the thread that started them ends, which may be one that reads
    ahead.
    """
    if loader.num_workers:
        _hold_worker_deaths()
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
