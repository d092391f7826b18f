"""A predict run that fails in one of several ways, on purpose."""

import os
import sys
from pathlib import Path

import torch
from common import Doubler, Rows, parser, quiet_trainer, write_result
from torch.utils.data import DataLoader

from lightning_gpuorch.pytorch import GPUOrchStrategy


class Failing(Doubler):
    def __init__(self, how):
        super().__init__()
        self.how, self.steps = how, 0

    def setup(self, stage):
        if self.how == "setup" and os.environ.get("RANK") == "1":
            raise ValueError("label 17 is unknown")

    def predict_step(self, batch, batch_idx):
        self.steps += 1
        if self.how == "bug":
            raise KeyError("logits")
        if self.how == "sample" and (batch[:, 0] == 57).any():
            raise ValueError("prompt is too long")
        if self.how in ("65", "75") and self.steps == 3 and os.environ.get("_GPUORCH_GENERATION") == "0":
            os._exit(int(self.how))
        return super().predict_step(batch, batch_idx)


class Damaged(Rows):
    def __getitem__(self, index):
        if index in (3, 57):
            raise OSError(f"image {index} is damaged")
        return super().__getitem__(index)


def main():
    options = parser()
    options.add_argument("--how", default="")
    options.add_argument("--workers", type=int, default=0)
    options = options.parse_args()
    strategy = GPUOrchStrategy(
        output_dir=options.output, tensor_parallel_size=options.tp, parallelize_fn=lambda module, mesh: module
    )
    rows = Damaged(80) if options.how == "read" else Rows(80)
    trainer = quiet_trainer(strategy, options.devices)
    predictions = trainer.predict(Failing(options.how), DataLoader(rows, batch_size=4, num_workers=options.workers))
    if trainer.is_global_zero:
        write_result(options, torch.cat(list(predictions))[:, 0].tolist())
    if options.how == "after":
        Path("nowhere/out.csv").write_text("")
    if options.how == "exit":
        sys.exit(3)


if __name__ == "__main__":
    main()
