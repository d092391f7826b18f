"""Tensor parallelism with torch's own DTensor API: 2 ranks share a model, replicas share the data.

python examples/tensor_parallel.py --devices 4
"""

from __future__ import annotations

import argparse

import lightning.pytorch as pl
import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils.data import DataLoader

from lightning_gpuorch.pytorch import GPUOrchStrategy


class FeedForward(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(32, 128)
        self.down = nn.Linear(128, 32)

    def predict_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return self.down(torch.relu(self.up(batch)))


def parallelize(module: nn.Module, mesh: DeviceMesh) -> nn.Module:
    return parallelize_module(module, mesh["tensor_parallel"], {"up": ColwiseParallel(), "down": RowwiseParallel()})


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--devices", type=int, default=4)
    options = parser.parse_args()

    pl.seed_everything(0, verbose=False)
    data = torch.randn(256, 32)
    model = FeedForward()
    with torch.no_grad():
        expected = model.predict_step(data, 0)

    strategy = GPUOrchStrategy(tensor_parallel_size=2, parallelize_fn=parallelize)
    trainer = pl.Trainer(
        strategy=strategy, devices=options.devices, logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    predictions = trainer.predict(model, DataLoader(data, batch_size=16))
    if trainer.is_global_zero:
        difference = (torch.cat(list(predictions)) - expected).abs().max().item()
        print(f"{trainer.world_size} ranks, 2 per model; largest difference to the unsharded model: {difference:.1e}")


if __name__ == "__main__":
    main()
