"""Makes the faults of a plan happen inside a worker.

A worker that finds ``_GPUORCH_INJECT=lightning_gpuorch.testing.injection:install`` in its environment calls
:func:`install` before the user's script runs. Nothing in the product knows of faults: the functions in which they
happen are wrapped in this process only.

The chaos directory (``_GPUORCH_CHAOS``) holds ``plan.txt``, and a file ``fired-N`` for each fault that has happened.
Making that file claims the fault, so that it happens once, whatever rank is restarted.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lightning_gpuorch.control.environment import WorkerEnvironment
from lightning_gpuorch.control.messages.collectives import Gather
from lightning_gpuorch.testing.faults import Fault, FaultKind, FaultPlan, When

CHAOS_DIRECTORY = "_GPUORCH_CHAOS"
ENTRY_POINT = f"{__name__}:install"
TOPOLOGY_NAME = "topology.json"
PLAN_NAME = "plan.txt"
_WAIT_TO_BE_KILLED_SECONDS = 10.0
_FOREVER_SECONDS = 10 * 365 * 86400.0


def marker(directory: Path, index: int) -> Path:
    """The file that says that fault ``index`` of the plan has happened."""
    return directory / f"fired-{index}"


class InjectedFaultError(RuntimeError):
    """What the fault ``exception`` raises."""


def install() -> None:
    """Make this worker's share of the plan happen. Called in a worker before the user's script."""
    directory = Path(os.environ[CHAOS_DIRECTORY])
    worker = WorkerEnvironment.read()
    rank, generation = (worker.rank, worker.generation) if worker is not None else (0, 0)
    plan = FaultPlan.parse((directory / PLAN_NAME).read_text(encoding="utf-8"))
    _Injector(directory, plan, rank, generation).wrap()


class _Injector:
    def __init__(self, directory: Path, plan: FaultPlan, rank: int, generation: int):
        self._directory, self._rank, self._generation = directory, rank, generation
        self._mine = {index: fault for index, fault in enumerate(plan) if fault.rank == rank}
        self._job: Any = None
        self._steps = 0
        self._topology_known = False
        self._finishing = False
        self._committing = threading.local()

    def wrap(self) -> None:
        """Wrap the places in which faults happen."""
        from lightning_gpuorch.predictions.storage import files
        from lightning_gpuorch.predictions.storage.parts import PartStore
        from lightning_gpuorch.worker.predict import PredictionJob
        from lightning_gpuorch.worker.runtime import Runtime

        _replace(PredictionJob, "run_step", self._run_step)
        _replace(PredictionJob, "finish", self._finish)
        _replace(PredictionJob, "close", self._close)
        _replace(Runtime, "check_same_input", self._check_same_input)
        _replace(PartStore, "commit", self._commit)
        _replace(files, "_temporary_file", self._temporary_file)

    # The wrapped functions

    def _run_step(self, original: Callable[..., Any], job: Any, call: Callable[[Any], Any], *rest: Any) -> Any:
        self._job = job
        self._tell_topology(job)
        first = self._steps == 0
        self._steps += 1
        fired = False

        def harmed(batch: Any) -> Any:
            nonlocal fired
            if not fired:  # a step wrapper may call it for parts of the batch
                fired = True
                self._in_step(job, first, skip_collective=False)
            return call(batch)

        return original(job, harmed, *rest)

    def _check_same_input(self, original: Callable[..., Any], runtime: Any, *args: Any) -> Any:
        if runtime.job is not None:
            self._in_step(runtime.job, self._steps == 1, skip_collective=True)
        return original(runtime, *args)

    def _in_step(self, job: Any, first: bool, skip_collective: bool) -> None:
        for index, fault in self._pending():
            if (fault.kind is FaultKind.SKIP_COLLECTIVE) is not skip_collective:
                continue
            when = fault.moment.when
            due = (
                (when is When.START and first)
                or (when is When.RESTART and first and self._generation > 0)
                or (when is When.SHARE and self._share(job) >= fault.moment.percent)
            )
            if due:
                self._fire(index, fault)
                return

    def _commit(self, original: Callable[..., Any], *args: Any) -> Any:
        self._committing.now = True
        try:
            return original(*args)
        finally:
            self._committing.now = False

    @contextlib.contextmanager
    def _temporary_file(self, original: Callable[..., Any], *args: Any, **options: Any) -> Iterator[Any]:
        with original(*args, **options) as temporary:
            if getattr(self._committing, "now", False):
                self._fail_in_commit()
            yield temporary

    def _fail_in_commit(self) -> None:
        for index, fault in self._pending():
            if fault.moment.when is When.COMMIT and self._share(self._job) >= fault.moment.percent:
                self._fire(index, fault)
                return

    def _finish(self, original: Callable[..., Any], job: Any) -> Any:
        self._finishing = True
        try:
            return original(job)
        finally:
            self._finishing = False

    def _close(self, original: Callable[..., Any], job: Any) -> None:
        original(job)
        for index, fault in self._pending() if self._finishing else ():
            if fault.moment.when is When.END:
                self._job = job
                self._fire(index, fault)
                return

    # What they share

    def _pending(self) -> list[tuple[int, Fault]]:
        pending = [(i, fault) for i, fault in self._mine.items() if not marker(self._directory, i).exists()]
        self._mine = dict(pending)
        return pending

    @staticmethod
    def _share(job: Any) -> float:
        """Percent of the job's chunks that are durable; -1 while their number is not known (streams)."""
        progress = job.progress()
        return 100.0 * progress["chunks_done"] / progress["chunks"] if progress.get("chunks") else -1.0

    def _tell_topology(self, job: Any) -> None:
        if self._topology_known:
            return
        self._topology_known = True
        topology = job._world.topology
        temporary = self._directory / f"{TOPOLOGY_NAME}.{os.getpid()}"
        temporary.write_text(json.dumps([topology.world_size, topology.tensor_parallel_size]), encoding="utf-8")
        temporary.replace(self._directory / TOPOLOGY_NAME)

    def _fire(self, index: int, fault: Fault) -> None:
        record = {"time": time.time(), "pid": os.getpid(), "generation": self._generation, "step": self._steps}
        try:
            with open(marker(self._directory, index), "x", encoding="utf-8") as file:
                json.dump(record, file)
        except FileExistsError:  # another thread of this process was quicker
            return
        _ACTIONS[fault.kind](fault, self._job)


def _replace(owner: Any, name: str, wrapper: Callable[..., Any]) -> None:
    original = getattr(owner, name)

    @functools.wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return wrapper(functools.partial(original, **kwargs), *args)

    setattr(owner, name, wrapped)


def _kill(_fault: Fault, _job: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(_FOREVER_SECONDS)


def _stop(_fault: Fault, _job: Any) -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def _raise(fault: Fault, _job: Any) -> None:
    raise InjectedFaultError(f"injected on purpose: {fault}")


def _exit0(_fault: Fault, _job: Any) -> None:
    os._exit(0)


def _hang(_fault: Fault, _job: Any) -> None:
    while True:
        time.sleep(1)


def _hang_with_the_gil(_fault: Fault, _job: Any) -> None:
    while True:  # a signal ends the sleep early
        ctypes.PyDLL(None).sleep(3600)


def _block_in_a_communication(_fault: Fault, job: Any) -> None:
    import torch
    import torch.distributed as dist

    topology = job._world.topology
    if topology.tensor_parallel_size > 1 and dist.is_initialized():
        peer = (dist.get_rank() + 1) % dist.get_world_size()
        dist.recv(torch.zeros(1, device=job._runtime.device), src=peer)
    else:  # no data plane: a job-wide collective in which no other rank takes part
        request = Gather(number=2**40 + topology.rank, kind="chaos", rank=topology.rank)
        job._world.channel.call(request, timeout_seconds=_FOREVER_SECONDS)


def _wait_to_be_killed(_fault: Fault, _job: Any) -> None:
    time.sleep(_WAIT_TO_BE_KILLED_SECONDS)  # the runner has seen the marker by then


_ACTIONS: dict[FaultKind, Callable[[Fault, Any], None]] = {
    FaultKind.KILL: _kill,
    FaultKind.STOP: _stop,
    FaultKind.EXCEPTION: _raise,
    FaultKind.EXIT0: _exit0,
    FaultKind.HANG: _hang,
    FaultKind.GIL_HANG: _hang_with_the_gil,
    FaultKind.SKIP_COLLECTIVE: _hang,
    FaultKind.BLOCK_COLLECTIVE: _block_in_a_communication,
    FaultKind.KILL_SUPERVISOR: _wait_to_be_killed,
    FaultKind.TERM_SUPERVISOR: lambda fault, job: None,
}
