"""Faults inside of a tensor-parallel group: how many are repaired in place, how long it takes, what it costs without any.

python -m tests.benchmarks.group_recovery campaign --ranks 2 3 4 --faults 200 --ways drain abort measured
python -m tests.benchmarks.group_recovery cost

With ``--backend nccl`` all ranks share the first GPU, and memory really runs out.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import logging
import math
import multiprocessing
import os
import random
import statistics
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from lightning_gpuorch.control.coordinator import Coordinator
from lightning_gpuorch.control.handshake import Peer
from lightning_gpuorch.control.messages.base import Sender
from lightning_gpuorch.control.server import ControlServer
from lightning_gpuorch.control.transport import RemoteChannel
from lightning_gpuorch.parallel.groups import recoverable_group as groups
from lightning_gpuorch.parallel.groups.process_group import ProcessGroupManager
from lightning_gpuorch.parallel.tensor_parallel import Communicator
from lightning_gpuorch.predictions.samples.tensors import digest, whole
from lightning_gpuorch.testing.shared_gpu import share_gpu
from lightning_gpuorch.worker.group_recovery.recovery import GroupRecovery, Recovery
from lightning_gpuorch.worker.group_store import CoordinatorStore
from lightning_gpuorch.worker.oom.detection import freeze_objects
from lightning_gpuorch.worker.oom.halving import BatchHalver

WIDTH, HIDDEN, LAYERS, BATCH = 64, 96, 4, 24
STEPS_IN_A_ROW = 10
WAYS = {"drain": math.inf, "abort": 0.0, "measured": None}
"""What connecting again is said to cost, so that a failed step is always drained, never, or as the measured cost tells."""
KINDS = ("plain", "dtensor", "compiled")
PLACES = ("before", "issue", "wait", "after")
"""Where a fault strikes: before a layer's collective, as it is issued, while it is on its way, after it."""


class Block(nn.Module):
    """Two layers of which the second needs an all-reduce when they are cut."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(x)))


class PlainBlock(nn.Module):
    """A rank's part of a block, on plain tensors."""

    def __init__(self, whole_block: Block, communicator: Communicator):
        super().__init__()
        rank, size = communicator.rank, communicator.size
        edges = [HIDDEN * k // size for k in range(size + 1)]
        own = slice(edges[rank], edges[rank + 1])
        self.up_weight, self.up_bias = whole_block.up.weight.detach()[own], whole_block.up.bias.detach()[own]
        self.down_weight, self.down_bias = whole_block.down.weight.detach()[:, own], whole_block.down.bias.detach()
        self.communicator = communicator

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.relu(nn.functional.linear(x, self.up_weight, self.up_bias))
        return x + self.communicator.all_reduce(nn.functional.linear(hidden, self.down_weight)) + self.down_bias


def make_model(kind: str, mesh: Any, device: torch.device) -> nn.Module:
    """The same weights on every rank, cut by the kind's own means."""
    torch.manual_seed(0)
    blocks = [Block().to(device) for _ in range(LAYERS)]
    axis = mesh["tensor_parallel"]
    if kind == "dtensor":
        for block in blocks:
            parallelize_module(block, axis, {"up": ColwiseParallel(), "down": RowwiseParallel()})
        return nn.Sequential(*blocks)
    communicator = Communicator(axis.get_group())
    model = nn.Sequential(*(PlainBlock(block, communicator) for block in blocks))
    if kind == "compiled":
        for block in model:
            block.compile(backend="aot_eager", dynamic=True)
    return model


class Injector:
    """Has memory run out where it is told to; on the CPU there is only the error."""

    def __init__(self, model: nn.Module, device: torch.device):
        self.place: str | None = None
        self.countdown = 0
        self._device = device
        for layer in model:
            layer.register_forward_pre_hook(lambda *_: self._at("before"))
            layer.register_forward_hook(lambda *_: self._at("after"))
        injector, issue, wait = self, groups.RecoverableProcessGroup._current, groups.RecoverableWork.wait

        def faulty_issue(group: Any) -> Any:
            injector._at("issue")
            return issue(group)

        def faulty_wait(work: Any, timeout: Any = None) -> bool:
            injector._at("wait")
            return wait(work, timeout)

        groups.RecoverableProcessGroup._current = faulty_issue  # type: ignore[method-assign]
        groups.RecoverableWork.wait = faulty_wait  # type: ignore[method-assign]

    def arm(self, place: str, countdown: int) -> None:
        self.place, self.countdown = place, countdown

    def _at(self, place: str) -> None:
        if self.place != place:
            return
        self.countdown -= 1
        if self.countdown < 0:
            self.place = None
            if self._device.type == "cuda":
                torch.empty(2**45, dtype=torch.uint8, device=self._device)
            raise torch.OutOfMemoryError("CUDA out of memory. (injected)")


class Rank:
    """One rank of a group with everything it needs."""

    def __init__(
        self,
        rank: int,
        size: int,
        address: str,
        store_path: str,
        way: str = "measured",
        timeout_seconds: float = 10.0,
        backend: str = "gloo",
    ):
        self.device = torch.device("cpu")
        if backend == "nccl":
            share_gpu(rank)
            self.device = torch.device("cuda", 0)
            torch.cuda.set_per_process_memory_fraction(0.9 / size, self.device)
        torch.set_num_threads(1)
        logging.getLogger("lightning_gpuorch").setLevel(logging.ERROR)  # hundreds of faults are not news here
        freeze_objects()  # as a worker does
        self.rank, self.size = rank, size
        self.manager = ProcessGroupManager(backend, timeout_seconds, self.device, recoverable=True)
        self.channel = RemoteChannel(address, Peer("rank", rank), "secret")
        store: Any = (
            CoordinatorStore(self.channel, "store/", timeout_seconds)
            if backend == "gloo"
            else dist.FileStore(store_path, size)
        )
        self.manager.initialize(rank, size, store=store, is_replica=True)
        self.mesh = self.manager.device_mesh(1, size)
        self.group: groups.RecoverableProcessGroup = self.mesh.get_group("tensor_parallel")  # type: ignore[assignment]
        self.recoveries: list[Recovery] = []
        self.recovery = GroupRecovery(
            self.channel,
            Sender(rank=rank, replica=0, generation=0),
            rank,
            size,
            self.group,
            timeout_seconds,
            self.recoveries.append,
            WAYS[way],
        )

    def same_input(self, batch: torch.Tensor) -> None:
        mine = torch.tensor([digest(batch)], device=self.device)
        digests = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(digests, mine, group=self.group)
        assert len({int(value) for value in digests}) == 1, "the ranks cut the batch in different ways"

    def step(self, call: Callable[[Any], Any], batch: torch.Tensor) -> torch.Tensor:
        """As a predict step does it."""

        def compute() -> Any:
            self.same_input(batch)
            return whole(call(batch))

        return self.recovery.attempt(compute, batch)

    def close(self) -> None:
        self.recovery.close()
        self.group.wait_until_released(15)
        self.manager.finalize()
        self.channel.close()


def usage() -> dict[str, int]:
    """Threads, file descriptors and memory of this process."""
    status = Path("/proc/self/status").read_text()
    resident = next(line for line in status.splitlines() if line.startswith("RssAnon"))
    return {
        "threads": len(os.listdir("/proc/self/task")),
        "descriptors": len(os.listdir("/proc/self/fd")),
        "anonymous_kib": int(resident.split()[1]),
        "device_kib": torch.cuda.memory_allocated() // 1024 if torch.cuda.is_initialized() else 0,
    }


def campaign(node: Rank, faults: int, kind: str, seed: int) -> dict[str, Any]:
    """Inject faults on any subset of ranks; every rank draws the same ones."""
    draw, rank = random.Random(f"{seed}/{kind}"), node.rank
    # On NCCL nobody waits for a collective: the device does.
    places = [place for place in PLACES if place != "wait" or node.device.type == "cpu"]
    model = make_model(kind, node.mesh, node.device)
    data = torch.randn(512, WIDTH, generator=torch.Generator().manual_seed(1)).to(node.device)
    injector = Injector(model, node.device)
    outputs: list[tuple[int, torch.Tensor]] = []
    parts: list[list[int]] = []
    waits: list[float] = []
    node.recoveries.clear()
    struck = injected = 0
    at_start: dict[str, int] = {}
    left_at: list[float] = []

    def call(part: torch.Tensor) -> torch.Tensor:
        if left_at:
            waits.append(time.perf_counter() - left_at.pop())
        return model(part)

    def watched(part: torch.Tensor, sizes: list[int]) -> torch.Tensor:
        try:
            output = node.step(call, part)
        except MemoryError:
            left_at[:] = [time.perf_counter() - node.recoveries[-1].seconds]
            raise
        sizes.append(len(part))
        return output

    with torch.no_grad():
        node.step(model, data[:BATCH])  # warm
        while injected < faults:
            start = draw.randrange(len(data) - BATCH)
            victims = draw.sample(range(node.size), draw.randint(1, node.size))
            for victim in range(node.size):
                place, countdown = draw.choice(places), draw.randrange(LAYERS)
                if victim == rank and victim in victims:
                    injector.arm(place, countdown)
            sizes: list[int] = []
            before = len(node.recoveries)
            # A fresh halver forgets the fault: every batch begins whole.
            output = BatchHalver().run(functools.partial(watched, sizes=sizes), data[start : start + BATCH], size=BATCH)
            injected += 1
            struck += len(node.recoveries) > before
            assert injector.place is None or rank not in victims or len(node.recoveries) > before
            injector.place = None
            outputs.append((start, output))
            parts.append(sizes)
            if injected == min(50, faults // 2):
                node.group.wait_until_released(15)  # see GlooCommunicator.close
                at_start = usage()
                node.step(model, data[:BATCH])  # that all ranks have waited is not part of the next fault's time
        node.group.wait_until_released(15)  # see GlooCommunicator.close
        at_end, deadline = usage(), time.monotonic() + 5
        while at_end["threads"] > at_start["threads"] and time.monotonic() < deadline:
            time.sleep(0.01)  # a joined thread is gone for Python a moment before it is for the system
            at_end = usage()
        # The same parts, undisturbed.
        equal = 0
        for (start, output), sizes in zip(outputs, parts, strict=True):
            pieces, position = [], start
            for size in sizes:
                pieces.append(node.step(model, data[position : position + size]))
                position += size
            assert position == start + BATCH
            equal += torch.equal(torch.cat(pieces), output)
    registry = torch._C._distributed_c10d._get_work_registry_size()
    return {
        "injected": injected,
        "recovered_batches": struck,
        "recoveries": len(node.recoveries),
        "drained": sum(one.drained for one in node.recoveries),
        "own": sum(one.own for one in node.recoveries),
        "equal": equal,
        "checksum": sum(digest(output) % 1000003 for _, output in outputs),
        "seconds": [one.seconds for one in node.recoveries],
        "until_retry_seconds": waits,
        "cut": sum(len(sizes) > 1 for sizes in parts),
        "start": at_start,
        "end": at_end,
        "unfinished_works": registry,
    }


def cost_of_a_collective(node: Rank, rounds: int, calls: int) -> dict[str, float]:
    """CPU seconds of the calling thread per all-reduce, through the recoverable group and around it, in turns."""
    tensor, options = torch.zeros(1024, device=node.device), dist.AllreduceOptions()
    inner = node.group._inner.group  # type: ignore[union-attr]
    times: dict[str, list[float]] = {"recoverable": [], "bare": []}
    for number in range(2 * rounds):
        name, group = (("recoverable", node.group), ("bare", inner))[number % 2]
        began = time.thread_time()
        for _ in range(calls):
            group.allreduce([tensor], options).wait()  # type: ignore[union-attr]
        times[name].append((time.thread_time() - began) / calls)
        if node.device.type == "cuda":
            torch.cuda.synchronize(node.device)
    return {name: statistics.median(values) for name, values in times.items()}


def cost_of_a_step(node: Rank, pairs: int) -> dict[str, Any]:
    """What a step costs more as an attempt: both ways in turns, and what an attempt adds, timed by itself.

    In turns of ten steps, since a rank that has not waited at the end of a step does so at the beginning of the next.
    """
    torch.manual_seed(0)
    width, tokens = 384, 512
    inner = 4 * width // node.size
    weights = [torch.randn(shape).to(node.device) for shape in ((width, inner), (inner, width))]
    x = torch.ones(tokens, width, device=node.device)

    def compute(x: torch.Tensor) -> torch.Tensor:
        node.same_input(x)
        for _ in range(6):
            y = torch.relu(x @ weights[0]) @ weights[1]
            dist.all_reduce(y, group=node.group)
            x = torch.nn.functional.layer_norm(x + y, (width,))
        return x

    ways = (lambda: node.recovery.attempt(functools.partial(compute, x), x), lambda: compute(x))
    times = []
    own: dict[str, list[float]] = {"wait": [], "begin": [], "end": []}

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> None:
            began = time.perf_counter()
            function(*args, **kwargs)
            own[name].append(time.perf_counter() - began)

        return call

    recovery: Any = node.recovery
    recovery._await_others = timed("wait", recovery._await_others)
    recovery._traces.begin = timed("begin", recovery._traces.begin)
    recovery._traces.end = timed("end", recovery._traces.end)
    with torch.no_grad():
        for number in range(pairs + 1):
            pair = [0.0, 0.0]
            for way in ((0, 1), (1, 0))[number % 2]:
                began = time.perf_counter()
                for _ in range(STEPS_IN_A_ROW):
                    ways[way]().cpu()  # a step's output goes to the host
                pair[way] = (time.perf_counter() - began) / STEPS_IN_A_ROW
            times.append((pair[0], pair[1]))
    medians = {name: statistics.median(values) for name, values in own.items()}
    return {"times": times[1:], "wait": medians["wait"], "traces": medians["begin"] + 2 * medians["end"]}


def run_cost(pairs: int, backend: str) -> None:
    for result in on_ranks(2, cost_of_a_collective, 40, 100, backend=backend):
        added = result["recoverable"] - result["bare"]
        print(
            f"all-reduce of 4 KiB, 2 ranks, CPU time of the caller: {1e6 * result['recoverable']:.1f} us through the "
            f"recoverable group, {1e6 * result['bare']:.1f} us around it, {1e6 * added:.1f} us more"
        )
    for result in on_ranks(2, cost_of_a_step, pairs, backend=backend):
        times = result["times"]
        bare = statistics.median(without for _, without in times)
        added = sorted(attempt - without for attempt, without in times)
        half = math.sqrt(pairs)  # ranks of the median's 95% interval lie 0.98 sqrt(n) around the middle
        low, high = added[max(0, int((pairs - half) / 2))], added[min(pairs - 1, int((pairs + half) / 2))]
        print(
            f"step with 7 collectives, 2 ranks, {pairs} pairs of {STEPS_IN_A_ROW} steps: {1e3 * bare:.2f} ms without, as "
            f"an attempt {1e6 * statistics.median(added):+.0f} us ({statistics.median(added) / bare:+.2%}; the median's "
            f"95% interval is {low / bare:+.2%} to {high / bare:+.2%}); by itself, the wait for the other rank takes "
            f"{1e6 * result['wait']:.0f} us ({result['wait'] / bare:.2%}), watching the collectives "
            f"{1e6 * result['traces']:.0f} us ({result['traces'] / bare:.2%})"
        )


def campaigns(node: Rank, faults: int, kinds: tuple[str, ...], seed: int) -> list[dict[str, Any]]:
    """A campaign per kind of model, one after the other in the same processes."""
    return [campaign(node, faults, kind, seed) for kind in kinds]


def _serve(
    rank: int,
    size: int,
    address: str,
    store_path: str,
    way: str,
    backend: str,
    work: Callable[..., Any],
    arguments: tuple[Any, ...],
    end: Connection,
) -> None:
    try:
        node = Rank(rank, size, address, store_path, way, backend=backend)
        result = work(node, *arguments)
        node.close()
        end.send((result, None))
    except BaseException:  # noqa: BLE001 - handed to the parent
        end.send((None, traceback.format_exc()))


def on_ranks(
    size: int,
    work: Callable[..., Any],
    *arguments: Any,
    way: str = "measured",
    backend: str = "gloo",
    timeout_seconds: float = 600.0,
) -> list[Any]:
    """Run ``work(node, *arguments)`` on ranks with a coordinator outside of them; give the results by rank."""
    context = multiprocessing.get_context("spawn")
    server = ControlServer(Coordinator(size), token="secret")
    scratch = tempfile.TemporaryDirectory(prefix="group-recovery-")
    processes: list[Any] = []
    ends: list[Connection] = []
    results: dict[int, Any] = {}
    try:
        for rank in range(size):
            here, there = context.Pipe()
            processes.append(
                context.Process(
                    target=_serve,
                    args=(rank, size, server.address, f"{scratch.name}/store", way, backend, work, arguments, there),
                    daemon=True,
                )
            )
            processes[-1].start()
            there.close()
            ends.append(here)
        deadline = time.monotonic() + timeout_seconds
        while len(results) < size:
            running = [end for rank, end in enumerate(ends) if rank not in results]
            ready = wait(running, max(0.0, deadline - time.monotonic()))
            if not ready:
                raise TimeoutError(f"ranks {sorted(set(range(size)) - set(results))} run for {timeout_seconds:g} s")
            for end in ready:
                rank = ends.index(end)  # type: ignore[arg-type]
                try:
                    results[rank], error = ends[rank].recv()
                except EOFError:
                    raise RuntimeError(f"rank {rank} of {size} died") from None
                if error is not None:
                    raise RuntimeError(f"rank {rank} of {size}: {error}")
        return [results[rank] for rank in range(size)]
    finally:
        for process in processes:
            process.join(10 if len(results) == size else 0)
            if process.is_alive():
                process.kill()
                process.join(10)
        server.close()
        scratch.cleanup()


def percentile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def run_campaign(sizes: list[int], faults: int, kinds: list[str], ways: list[str], seed: int, backend: str) -> None:
    for size in sizes:
        for kind, way in itertools.product(kinds, ways):
            results = on_ranks(size, campaign, faults, kind, seed, way=way, backend=backend)
            first = results[0]
            seconds = [value for result in results for value in result["seconds"]]
            waits = [value for result in results for value in result["until_retry_seconds"]]
            growth = {
                key: max(result["end"][key] - result["start"][key] for result in results) for key in first["start"]
            }
            ready, until_retry = (
                f"p50 {1e3 * percentile(values, 0.5):.1f} ms, p99 {1e3 * percentile(values, 0.99):.1f} ms"
                for values in (seconds, waits)
            )
            print(
                f"{size} ranks, {backend}, {kind}, {way}: {first['injected']} batches with injected faults, "
                f"{sum(result['own'] for result in results)} errors, {first['recoveries']} recoveries, {first['drained']} "
                f"of them by drain; {first['cut']} batches cut; outputs equal to the undisturbed ones: "
                f"{[result['equal'] for result in results]}; same on all ranks: "
                f"{len({result['checksum'] for result in results}) == 1}; error to ready {ready}; to the next attempt "
                f"{until_retry}; growth {json.dumps(growth)}; works kept "
                f"{max(result['unfinished_works'] for result in results)}",
                flush=True,
            )


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("what", choices=["campaign", "cost"])
    options.add_argument("--ranks", type=int, nargs="+", default=[2, 3, 4])
    options.add_argument("--faults", type=int, default=200)
    options.add_argument("--pairs", type=int, default=40, help="of ten steps, for the cost")
    options.add_argument("--kinds", nargs="+", default=list(KINDS))
    options.add_argument("--ways", nargs="+", choices=list(WAYS), default=["measured"])
    options.add_argument("--backend", choices=["gloo", "nccl"], default="gloo")
    options.add_argument("--seed", type=int, default=0)
    chosen = options.parse_args()
    if chosen.what == "cost":
        run_cost(chosen.pairs, chosen.backend)
        return
    run_campaign(chosen.ranks, chosen.faults, chosen.kinds, chosen.ways, chosen.seed, chosen.backend)


if __name__ == "__main__":
    main()
