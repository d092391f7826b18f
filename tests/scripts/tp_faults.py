"""Faults on one rank of a tensor-parallel group under the Trainer: memory, a broken connection, a slow rank, a bug."""

from __future__ import annotations

import logging
import time
from contextlib import nullcontext
from pathlib import Path

import lightning.pytorch as pl
import torch
from common import parser, quiet_trainer, write_result
from torch import nn
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils.data import DataLoader

from lightning_gpuorch.callbacks import OOMBatchHalving
from lightning_gpuorch.distributed.recoverable_group import live_groups
from lightning_gpuorch.pytorch import GPUOrchStrategy
from lightning_gpuorch.testing.memory import CPUMemoryBudget

TOKENS, WIDTH, HIDDEN, ROWS, BATCH = 64, 16, 128, 60, 8


class FeedForward(pl.LightningModule):
    def __init__(self, options):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)
        self.options, self.struck = options, 0
        self.budget = None

    def on_predict_start(self):
        rank = self.trainer.global_rank
        self.faulty = rank % self.options.tp == self.options.tp - 1
        if self.options.fault == "memory" and self.faulty:
            # The hidden activations of five samples, twice, fit on this rank; the others have no limit.
            per_sample = 4 * TOKENS * HIDDEN // self.options.tp
            self.budget = CPUMemoryBudget(0, resident=self)
            self.budget.limit_bytes = self.budget.used_bytes + 12 * per_sample

    def predict_step(self, batch, batch_idx):
        first = float(batch[0, 0, 0])
        with self.budget or nullcontext():
            hidden = torch.relu(self.up(batch[:, 1:]))
            if self.options.too_large is not None and self.faulty and self.options.too_large in batch[:, 0, 0].tolist():
                raise torch.OutOfMemoryError("CUDA out of memory. (simulated)")
            if self.faulty and first == 16 and self.options.fault not in ("memory", "none"):
                self.fail()
            return {"index": batch[:, 0, 0], "value": self.down(hidden)}

    def fail(self):
        self.struck += 1
        fault, times = self.options.fault, self.options.times
        if self.struck > times or Path(self.options.once).exists():
            return
        if fault == "connection":
            live_groups()[0]._inner.abort()
        elif fault == "slow":
            time.sleep(1.5 * self.trainer.strategy.config.timeout_sec)
        elif fault == "bug":
            raise RuntimeError("shapes do not match (simulated bug)")
        elif fault == "stop-iteration":
            raise StopIteration
        if self.struck == times and times > 1:
            Path(self.options.once).touch()


def parallelize(module, mesh):
    plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
    return parallelize_module(module, mesh["tensor_parallel"], plan)


def main():
    options = parser()
    options.add_argument("--fault", default="none")
    options.add_argument("--times", type=int, default=1)
    options.add_argument("--once", default="once")
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
