"""A complete predict call, then a validation in which one rank always dies."""

import os

import torch
from common import Doubler, Rows, parser, quiet_trainer
from torch.utils.data import DataLoader

from lightning_gpuorch.pytorch import GPUOrchStrategy


class Harmed(Doubler):
    def validation_step(self, batch, batch_idx):
        if self.trainer.global_rank == 1:
            os._exit(9)
        return batch.sum() * torch.zeros(1)


def main():
    options = parser().parse_args()
    trainer = quiet_trainer(GPUOrchStrategy(output_dir=options.output), options.devices)
    model, loader = Harmed(), DataLoader(Rows(40), batch_size=4)
    trainer.predict(model, loader)
    trainer.validate(model, loader, verbose=False)


if __name__ == "__main__":
    main()
