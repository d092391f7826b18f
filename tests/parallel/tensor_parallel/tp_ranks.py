"""Ranks for tests: as threads of this process (quick, any size) and as real gloo processes."""

from __future__ import annotations

import copy
import multiprocessing
import threading
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from lightning_gpuorch.parallel.tensor_parallel import Communicator, TensorParallelPlan, apply_plan

TIMEOUT_SECONDS = 60.0


class ThreadCommunicator(Communicator):
    """Collectives among threads: every rank writes its tensor, a barrier, every rank reads all."""

    def __init__(self, rank: int, size: int, slots: list[Any], barrier: threading.Barrier) -> None:
        super().__init__(None, rank, size)
        self.slots, self.barrier = slots, barrier
        self.num_collectives = 0

    def _exchange(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        self.num_collectives += 1
        self.slots[self.rank] = tensor
        self.barrier.wait(TIMEOUT_SECONDS)
        everybody = list(self.slots)
        self.barrier.wait(TIMEOUT_SECONDS)
        return everybody

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        return torch.stack(self._exchange(tensor.contiguous())).sum(0)

    def all_gather_last(self, tensor: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
        pieces = self._exchange(tensor)
        assert [piece.shape[-1] for piece in pieces] == list(sizes)
        return torch.cat(pieces, -1)


def on_threads(size: int, work: Callable[[Communicator], Any]) -> list[Any]:
    """Run ``work`` as every rank of a group of threads; the first error is raised."""
    slots: list[Any] = [None] * size
    results: list[Any] = [None] * size
    errors: list[BaseException] = []
    barrier = threading.Barrier(size)

    def run(rank: int) -> None:
        try:
            results[rank] = work(ThreadCommunicator(rank, size, slots, barrier))
        except BaseException as error:  # noqa: BLE001 - handed to the caller
            if not isinstance(error, threading.BrokenBarrierError):
                errors.insert(0, error)
            else:
                errors.append(error)
            barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT_SECONDS)
        assert not thread.is_alive(), "a rank hangs"
    if errors:
        raise errors[0]
    return results


def sharded_outputs(
    model: nn.Module, plan: TensorParallelPlan, call: Callable[[nn.Module], Any], inference_mode: bool = False
) -> list[Any]:
    """Run ``call`` on every rank's part of a copy of the model."""
    mode = torch.inference_mode if inference_mode else torch.no_grad

    def work(communicator: Communicator) -> Any:
        part = copy.deepcopy(model)
        apply_plan(part, plan, communicator.rank, communicator)
        with mode():
            return call(part)

    return on_threads(plan.tensor_parallel_size, work)


def relative_error(value: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference relative to the largest value."""
    assert value.shape == expected.shape, (value.shape, expected.shape)
    scale = expected.abs().max().item()
    return (value - expected).abs().max().item() / max(scale, 1e-12)


def _serve(rank: int, size: int, store_path: str, connection: Any) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(store_path, size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=TIMEOUT_SECONDS))
    while (job := connection.recv()) is not None:
        function, arguments = job
        try:
            connection.send((function(rank, *arguments), None))
        except BaseException:  # noqa: BLE001 - handed to the test
            connection.send((None, traceback.format_exc()))
    dist.destroy_process_group()


class ProcessRanks:
    """A group of real gloo processes that run module-level functions for tests."""

    def __init__(self, size: int, folder: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self.connections, self.processes = [], []
        for rank in range(size):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(rank, size, str(folder / "store"), there), daemon=True)
            process.start()
            there.close()
            self.connections.append(here)
            self.processes.append(process)

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Call ``function(rank, *arguments)`` on every rank and give the results by rank."""
        for connection in self.connections:
            connection.send((function, arguments))
        results = []
        for rank, connection in enumerate(self.connections):
            assert connection.poll(2 * TIMEOUT_SECONDS), f"rank {rank} does not answer"
            results.append(connection.recv())
        for rank, (_, error) in enumerate(results):
            assert error is None, f"rank {rank}: {error}"
        return [result for result, _ in results]

    def close(self) -> None:
        for connection in self.connections:
            connection.send(None)
        for process in self.processes:
            process.join(20)
            if process.is_alive():
                process.kill()
                process.join(10)
        for connection in self.connections:
            connection.close()
