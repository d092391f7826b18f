"""What all callbacks together add to a step that does nothing, over no callbacks, with this strategy on one device.

    python tests/benchmarks/callbacks.py

Both are measured in the same process, interleaved, several rounds, in CPU time and in wall time of the loop's thread;
medians of the differences between neighbours are printed, since the machine may be shared. So is what a step that is not
sampled for tracing costs.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import tempfile
import time
import warnings
from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader

from lightning_gpuorch.callbacks import JobProgressBar, default_callbacks
from lightning_gpuorch.config import OrchestratorConfig
from lightning_gpuorch.pytorch import GPUOrchStrategy
from lightning_gpuorch.telemetry.tracing import StepTrace, StepTracer
from tests.benchmarks.overhead import Nothing


class Empty(pl.LightningModule):
    """Notes wall time and CPU time of its thread at its first and last step."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))
        self.began: tuple[float, float] | None = None
        self.ended = (0.0, 0.0)

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        self.ended = (time.perf_counter(), time.thread_time())
        self.began = self.began or self.ended
        return batch


def seconds_per_step(callbacks: Sequence[Any], steps: int) -> tuple[float, float]:
    """Wall time and CPU time of the loop's thread, per step."""
    bar = any(isinstance(callback, JobProgressBar) for callback in callbacks)
    with tempfile.TemporaryDirectory() as directory:
        trainer = pl.Trainer(
            strategy=GPUOrchStrategy(output_dir=directory, log_level="ERROR"), devices=1, accelerator="cpu", logger=False,
            enable_checkpointing=False, enable_progress_bar=bar, enable_model_summary=False, callbacks=list(callbacks),
        )  # fmt: skip
        model = Empty()
        trainer.predict(model, DataLoader(Nothing(steps), batch_size=1))
    assert model.began is not None
    wall, cpu = (end - begin for begin, end in zip(model.began, model.ended, strict=True))
    return wall / (steps - 1), cpu / (steps - 1)


def unsampled_trace_seconds() -> float:
    """What a step costs the trace if it is not sampled; the best of many rounds, since others use the machine, too."""
    trace = StepTrace(StepTracer("benchmark", 0, every=10**9))
    best = float("inf")
    for _ in range(50):
        began = time.perf_counter()
        for step in range(1, 2001):
            trace.begin(step, 3, (1, 2))
            trace.computed()
            trace.end(8)
        best = min(best, (time.perf_counter() - began) / 2000)
    return best


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--each", action="store_true", help="Measure every callback alone as well.")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

    def everything() -> list[Any]:
        return default_callbacks(OrchestratorConfig(metrics_port=0))

    names = [type(callback).__name__ for callback in everything()]
    variants: dict[str, list[int]] = {"all callbacks": list(range(len(names)))}
    if options.each:
        variants |= {name: [index] for index, name in enumerate(names)}
    added: dict[str, list[tuple[float, float]]] = {name: [] for name in variants}
    bare: list[tuple[float, float]] = []
    for turn in range(options.rounds + 1):
        for name, picked in variants.items():
            without = seconds_per_step([], options.steps)
            with_them = seconds_per_step([everything()[index] for index in picked], options.steps)
            if turn:  # the first round warms up
                bare.append(without)
                added[name].append((with_them[0] - without[0], with_them[1] - without[1]))
    wall, cpu = (statistics.median(one[i] for one in bare) * 1e6 for i in (0, 1))
    print(f"no callbacks: {wall:.1f} us wall, {cpu:.1f} us CPU per step (medians over {len(bare)} runs)")
    for name, pairs in added.items():
        wall, cpu = (statistics.median(pair[i] for pair in pairs) * 1e6 for i in (0, 1))
        print(f"{name} add {wall:.1f} us wall, {cpu:.1f} us CPU per step (medians of {options.rounds} rounds)")
    print(f"all callbacks: {', '.join(names)}")
    print(
        f"a step that is not traced costs the trace {unsampled_trace_seconds() * 1e6:.2f} us (OpenTelemetry installed)"
    )


if __name__ == "__main__":
    main()
