"""A complete predict call, then a validation in which one rank always dies: at once, or when the other is gone."""

import os
import time
from pathlib import Path

import torch
from common import Doubler, Rows, parser, quiet_trainer
from torch.utils.data import DataLoader

from lightning_gpuorch.pytorch import GPUOrchStrategy

OTHER = Path("pid-of-rank-0")


def wait_for_end_of_other():
    pid, deadline = int(OTHER.read_text()), time.monotonic() + 30
    while time.monotonic() < deadline and os.path.exists(f"/proc/{pid}"):
        time.sleep(0.01)


class Harmed(Doubler):
    def __init__(self, late):
        super().__init__()
        self.late = late

    def on_predict_start(self):
        if self.trainer.global_rank == 0:
            OTHER.write_text(str(os.getpid()))

    def validation_step(self, batch, batch_idx):
        if self.trainer.global_rank == 1:
            if self.late:
                wait_for_end_of_other()
            os._exit(9)
        return batch.sum() * torch.zeros(1)


def main():
    arguments = parser()
    arguments.add_argument("--late", action="store_true")
    options = arguments.parse_args()
    trainer = quiet_trainer(GPUOrchStrategy(output_dir=options.output), options.devices)
    model, loader = Harmed(options.late), DataLoader(Rows(40), batch_size=4)
    trainer.predict(model, loader)
    trainer.validate(model, loader, verbose=False)


if __name__ == "__main__":
    main()
