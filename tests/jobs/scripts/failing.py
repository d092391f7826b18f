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
    def __init__(self, size, damaged):
        super().__init__(size)
        self.damaged = damaged

    def __getitem__(self, index):
        if index in self.damaged:
            raise OSError(f"image {index} is damaged")
        return super().__getitem__(index)


def main():
    options = parser()
    options.add_argument("--how", default="")
    options.add_argument("--workers", type=int, default=0)
    options.add_argument("--dynamic", action="store_true")
    options = options.parse_args()
    strategy = GPUOrchStrategy(
        output_dir=options.output,
        tensor_parallel_size=options.tp,
        parallelize_fn=lambda module, mesh: module,
        enable_dynamic_batching=options.dynamic,
        length_fn=(lambda row: 1 + int(row[0]) % 5) if options.dynamic else None,
    )
    damaged = {
        "read": (3, 57),
        # Ranks whose disks are damaged in different places: one sample, a whole batch, halves of one that make it up.
        "disks": ((5, 8, 9, 10, 11, 16, 17), (30, 18, 19))[int(os.environ.get("RANK", "0")) % 2],
    }
    rows = Damaged(80, damaged.get(options.how, ()))
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
