"""Faults on the last rank of a tensor-parallel group: memory, broken connections, a rank that is late, a bug.

``--faults connection:16:3`` breaks the connections in the first three tries at the batch that begins with sample 16.
"""

from __future__ import annotations

import logging
import time
from contextlib import nullcontext

import lightning.pytorch as pl
import torch
from common import parser, quiet_trainer, write_result
from torch import nn
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils.data import DataLoader

from lightning_gpuorch.callbacks import OOMBatchHalving
from lightning_gpuorch.parallel.groups.recoverable_group import live_groups
from lightning_gpuorch.pytorch import GPUOrchStrategy
from lightning_gpuorch.testing.memory import CPUMemoryBudget

TOKENS, WIDTH, HIDDEN, ROWS, BATCH = 64, 16, 128, 60, 8


class FeedForward(pl.LightningModule):
    def __init__(self, options):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)
        self.options, self.budget, self.faulty = options, None, False
        self.left = {}

    def on_predict_start(self):
        self.faulty = self.trainer.global_rank % self.options.tp == self.options.tp - 1
        if not self.faulty or self.trainer.strategy.runtime.world.generation:
            return
        for fault in self.options.faults:
            kind, sample, times = fault.split(":")
            self.left[int(sample)] = [kind, int(times)]
        if self.options.budget:
            # The hidden activations of five samples, twice, fit on this rank; the others have no limit.
            per_sample = 4 * TOKENS * HIDDEN // self.options.tp
            self.budget = CPUMemoryBudget(0, resident=self)
            self.budget.limit_bytes = self.budget.used_bytes + 12 * per_sample

    def predict_step(self, batch, batch_idx):
        samples = batch[:, 0, 0]
        with self.budget or nullcontext():
            hidden = torch.relu(self.up(batch[:, 1:]))
            fault = self.left.get(int(samples[0]))
            if fault is not None and fault[1]:
                fault[1] -= 1
                self.fail(fault[0])
            if self.faulty and self.options.too_large in samples.tolist():
                raise torch.OutOfMemoryError("CUDA out of memory. (simulated)")
            return {"index": samples, "value": self.down(hidden)}

    def fail(self, kind):
        if kind == "connection":
            live_groups()[0]._inner.abort()
        elif kind == "memory":
            torch.empty(10**14, dtype=torch.uint8, device=self.device)
        elif kind == "late":
            time.sleep(1.5 * self.trainer.strategy.config.timeout_sec)
        else:
            raise RuntimeError("shapes do not match (simulated)")


def parallelize(module, mesh):
    plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
    return parallelize_module(module, mesh["tensor_parallel"], plan)


def main():
    options = parser()
    options.add_argument("--faults", nargs="*", default=[])
    options.add_argument("--budget", action="store_true")
    options.add_argument("--timeout", type=float, default=30.0)
    options.add_argument("--restarts", type=int, default=3)
    options.add_argument("--too-large", type=float, default=None)
    options = options.parse_args()
    logging.getLogger("lightning_gpuorch").setLevel(logging.INFO)
    data = torch.randn(ROWS, TOKENS + 1, WIDTH, generator=torch.Generator().manual_seed(1))
    data[:, 0] = torch.arange(float(ROWS)).unsqueeze(1)
    model = FeedForward(options)
    with torch.no_grad():
        expected = model.down(torch.relu(model.up(data[:, 1:])))
    strategy = GPUOrchStrategy(
        tensor_parallel_size=options.tp,
        parallelize_fn=parallelize,
        output_dir=options.output,
        timeout_sec=options.timeout,
        max_restart_attempts=options.restarts,
    )
    callback = OOMBatchHalving()
    trainer = quiet_trainer(strategy, options.devices, callbacks=[callback])
    got = trainer.predict(model, DataLoader(data, batch_size=BATCH))
    everyone = strategy.runtime.world.collectives.all_gather_object(
        {
            "generation": strategy.runtime.world.generation,
            "recoveries": strategy.runtime.world.recovery.num_recoveries,
            "ooms": callback.num_ooms,
            "splits": callback.num_splits,
        }
    )
    if trainer.is_global_zero:
        values = torch.cat([batch["value"] for batch in got])
        write_result(
            options,
            {
                "difference": float((values - expected).abs().max()),
                "order": torch.cat([batch["index"] for batch in got]).tolist() == data[:, 0, 0].tolist(),
                "batches": len(got),
                "ranks": everyone,
            },
        )


if __name__ == "__main__":
    main()
