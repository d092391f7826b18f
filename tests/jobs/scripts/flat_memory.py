"""More than 700 MiB of predictions; how much does the process grow?"""

import os

import lightning.pytorch as pl
import psutil
import torch
from common import parser, quiet_trainer, write_result
from torch.utils.data import DataLoader, Dataset

from lightning_gpuorch.pytorch import GPUOrchStrategy


class Numbers(Dataset):
    def __len__(self):
        return 190_000

    def __getitem__(self, index):
        return index

    def __getitems__(self, indices):
        return indices


class Wide(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))
        self.low = None
        self.high = 0

    def predict_step(self, batch, batch_idx):
        resident = psutil.Process().memory_info().rss
        if batch_idx == 40:
            self.low = resident
        self.high = max(self.high, resident)
        return torch.zeros(len(batch), 1000)


def main():
    options = parser().parse_args()
    model = Wide()
    strategy = GPUOrchStrategy(output_dir=options.output, chunk_size=4, max_pending_bytes=8 * 2**20)
    trainer = quiet_trainer(strategy, options.devices)
    got = trainer.predict(model, DataLoader(Numbers(), batch_size=500, collate_fn=torch.tensor))
    total = 0
    for batch in got:
        total += batch.numel() * 4
        model.high = max(model.high, psutil.Process(os.getpid()).memory_info().rss)
    write_result(options, {"predicted_mib": total / 2**20, "growth_mib": (model.high - model.low) / 2**20})


if __name__ == "__main__":
    main()
