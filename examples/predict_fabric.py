"""The Fabric loop: a plain torch module over scikit-learn's digits, every prediction durable.

lightning run examples/predict_fabric.py --devices 2
python examples/predict_fabric.py
"""

from __future__ import annotations

import argparse

import torch
from lightning.fabric import Fabric
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader

from lightning_gpuorch import MultiGPUOrchestrator


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--devices", default="auto")
    parser.add_argument("--output", default=None)
    options = parser.parse_args()

    fabric = Fabric(strategy="gpuorch", devices=options.devices)
    fabric.launch()
    fabric.seed_everything(0, verbose=False)

    images = torch.tensor(load_digits().data / 16, dtype=torch.float32)
    orchestrator = MultiGPUOrchestrator(fabric=fabric, output_dir=options.output)
    orchestrator.initialize()
    model = orchestrator.load_distributed_model(nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8)))

    mine = 0
    for output in orchestrator.predict(model, DataLoader(images, batch_size=32)):
        mine += len(output)  # the batches this replica computes, as they come
    print(f"rank {fabric.global_rank} computed {mine} of {len(images)} samples")
    if fabric.is_global_zero:
        everything = torch.cat(list(orchestrator.predictions))
        print(f"all predictions, in dataset order: {tuple(everything.shape)}")


if __name__ == "__main__":
    main()
