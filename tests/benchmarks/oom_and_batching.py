"""What halving costs when nothing fails, what the memory model costs, and how well they do.

python -m tests.benchmarks.oom_and_batching
"""

from __future__ import annotations

import logging
import timeit
from collections.abc import Callable

import numpy as np
import torch

from lightning_gpuorch.worker.batching.memory_model import BatchSizer
from lightning_gpuorch.worker.oom.halving import BatchHalver
from tests.worker.batching.test_memory_model import LAWS, simulate


def microseconds(call: Callable[[], object], number: int = 20_000) -> float:
    """Best of five rounds."""
    return 1e6 * min(timeit.repeat(call, number=number, repeat=5)) / number


def halving() -> None:
    """Added cost per step, measured beside the bare step."""
    batch = {"x": torch.zeros(32, 128), "names": ["n"] * 32}

    def step(batch: dict[str, object]) -> dict[str, object]:
        return batch

    halver = BatchHalver()
    halver.run(step, batch, size=32)
    bare = microseconds(lambda: step(batch))
    print(f"halver, no error ever: {microseconds(lambda: halver.run(step, batch, size=32)) - bare:.2f} us per step")

    halver.limits.failed(3, 10**6)  # somewhere a failure is remembered that does not limit this batch
    cost = microseconds(lambda: halver.run(step, batch, size=32), 400) - bare
    print(f"halver, limits known, batch not cut: {cost:.1f} us per step")

    def limited(batch: torch.Tensor) -> torch.Tensor:
        if len(batch) > 20:
            raise torch.OutOfMemoryError
        return batch

    rows = torch.zeros(32, 128)
    halver = BatchHalver()
    halver.run(limited, rows, size=32)
    print(f"halver, batch cut in two: {microseconds(lambda: halver.run(limited, rows, size=32), 300):.1f} us per step")


def sizing() -> None:
    """The simulated device of the tests, three seeds."""
    sizer = BatchSizer(1e9)
    random = np.random.default_rng(0)
    shapes = [
        (int(b), int(s)) for b, s in zip(random.integers(1, 99, 2000), random.integers(8, 512, 2000), strict=True)
    ]
    steps = iter(shapes)

    def one() -> None:
        count, length = next(steps)
        sizer.choose(length)
        sizer.fitted(count, length, 1e6 + 1e3 * count * length)

    print(f"batch sizer: {1e6 * timeit.timeit(one, number=2000) / 2000:.0f} us per step, a new shape every time")
    for name, law in LAWS.items():
        for lognormal in (False, True):
            plain = [simulate(law, seed, lognormal) for seed in range(3)]
            shrunk = [simulate(law, seed, lognormal, shrink_at=1000) for seed in range(3)]
            kind = "lognormal" if lognormal else "fixed"
            for label, runs in (("steady", plain), ("budget -20% half-way", shrunk)):
                shares = [round(float(run.throughput), 3) for run in runs]
                print(f"{name}, {kind} lengths, {label}: OOMs {[run.num_ooms for run in runs]}, of the oracle {shares}")


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    halving()
    sizing()
