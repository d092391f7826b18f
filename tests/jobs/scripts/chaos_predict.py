"""A quick predict run for fault campaigns: many small chunks; its arithmetic gives the same bits in every batch size."""

import time

import lightning.pytorch as pl
import torch
from common import Rows, parser, quiet_trainer
from lightning.fabric import Fabric
from torch.utils.data import DataLoader, IterableDataset

import lightning_gpuorch
from lightning_gpuorch import read_predictions
from lightning_gpuorch.pytorch import GPUOrchStrategy


class Stream(IterableDataset):
    def __init__(self, length):
        self.length = length

    def __iter__(self):
        rows = Rows(self.length)
        return (rows[index] for index in range(self.length))


class Model(pl.LightningModule):
    def __init__(self, options):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.full((2,), 0.1))
        self.options = options

    def predict_step(self, batch, batch_idx):
        return self(batch)

    def forward(self, batch):
        time.sleep(self.options.step)
        if self.options.tp > 1:  # each rank has a share of the product, and all need the sum
            share = batch * self.weight / 4
            torch.distributed.all_reduce(share)
            batch = share
        if self.options.careless and self.trainer.strategy.runtime.generation > 0:
            batch = batch + 1
        return {"row": batch * self.weight, "name": [f"sample {row[0]:g}" for row in batch.tolist()]}


def main():
    options = parser()
    options.add_argument("--samples", type=int, default=240)
    options.add_argument("--batch", type=int, default=2)
    options.add_argument("--chunk", type=int, default=2)
    options.add_argument("--step", type=float, default=0.01)
    options.add_argument("--dynamic", action="store_true", help="windows of many chunks, four samples at a time")
    options.add_argument("--stream", action="store_true", help="rows come from an IterableDataset")
    options.add_argument("--fabric", action="store_true", help="Fabric and MultiGPUOrchestrator, not the Trainer")
    options.add_argument("--workers", type=int, default=0, help="processes of the DataLoader")
    options.add_argument("--careless", action="store_true", help="compute something else after a restart")
    options = options.parse_args()
    settings = {
        "tensor_parallel_size": options.tp,
        "chunk_size": options.chunk,
        "enable_dynamic_batching": options.dynamic,
        "max_batch_tokens": 8,
        # Each step of a stream is one unit, so three faults that happen to hit the same one would be blamed on it.
        "max_chunk_failures": 10 if options.stream else 3,
        "parallelize_fn": lambda module, mesh: module,  # its collectives are its own
    }
    rows = Stream(options.samples) if options.stream else Rows(options.samples)
    # With a worker windows are read on a thread of their own.
    loader = DataLoader(rows, batch_size=options.batch, num_workers=max(options.workers, int(options.dynamic)))
    if options.fabric:
        predict_with_fabric(options, settings, loader)
        return
    trainer = quiet_trainer(GPUOrchStrategy(output_dir=options.output, **settings), options.devices)
    trainer.predict(Model(options), loader)
    if trainer.is_global_zero:
        print(len(read_predictions(options.output)), "batches")


def predict_with_fabric(options, settings, loader):
    fabric = Fabric(strategy=lightning_gpuorch.GPUOrchStrategy(**settings), devices=options.devices, accelerator="cpu")
    fabric.launch()
    orchestrator = lightning_gpuorch.MultiGPUOrchestrator(fabric=fabric, output_dir=options.output)
    orchestrator.initialize()
    model = orchestrator.load_distributed_model(Model(options))
    for _ in orchestrator.predict(model, loader):
        pass
    orchestrator.cleanup()


if __name__ == "__main__":
    main()
