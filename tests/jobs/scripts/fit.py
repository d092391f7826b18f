"""fit in one job-wide world, then predict in the same script."""

import os
from pathlib import Path

import lightning.pytorch as pl
import torch
from common import Rows, parser, quiet_trainer, write_result
from torch.utils.data import DataLoader


class Trained(pl.LightningModule):
    def __init__(self, dies_once: str | None):
        super().__init__()
        self.dies_once = dies_once
        torch.manual_seed(0)
        self.net = torch.nn.Linear(2, 1)
        self.gradient = None

    def training_step(self, batch, batch_idx):
        if self.dies_once and self.trainer.global_rank == 1 and batch_idx == 2 and not Path(self.dies_once).exists():
            Path(self.dies_once).touch()
            os._exit(9)
        return (self.net(batch) - batch.sum(1, keepdim=True)).pow(2).mean()

    def on_after_backward(self):
        self.gradient = self.net.weight.grad.clone()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-6)

    def predict_step(self, batch, batch_idx):
        return self.net(batch)


def main():
    options = parser()
    options.add_argument("--dies-once", default=None)
    options = options.parse_args()
    model = Trained(options.dies_once)
    loader = DataLoader(Rows(32), batch_size=4)
    trainer = quiet_trainer("gpuorch", options.devices, max_epochs=1)
    trainer.fit(model, loader)
    world = trainer.strategy.runtime.world
    weights = world.collectives.all_gather_object(model.net.weight.detach().tolist())
    gradients = world.collectives.all_gather_object(model.gradient.tolist())
    got = trainer.predict(model, loader)
    if trainer.is_global_zero:
        write_result(
            options,
            {
                "weights_agree": all(w == weights[0] for w in weights),
                "gradients_synced": all(g == gradients[0] for g in gradients),
                "complete": sum(len(batch) for batch in got) == 32,
            },
        )


if __name__ == "__main__":
    main()
