"""What the strategy adds to a step that does nothing, over stock ``Trainer.predict`` on one device.

    python tests/benchmarks/overhead.py

Both are measured in the same process, interleaved, several rounds; medians are printed.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import tempfile
import time
import warnings

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader, Dataset

from lightning_gpuorch.pytorch import GPUOrchStrategy


class Nothing(Dataset):
    def __init__(self, length: int):
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> int:
        return index


class Empty(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))
        self.began = self.ended = 0.0

    def predict_step(self, batch, batch_idx):
        now = time.perf_counter()
        self.began = self.began or now
        self.ended = now
        return batch


def seconds_per_step(strategy, steps: int) -> float:
    trainer = pl.Trainer(
        strategy=strategy, devices=1, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    model = Empty()
    trainer.predict(model, DataLoader(Nothing(steps), batch_size=1))
    return (model.ended - model.began) / (steps - 1)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    figures: dict[str, list[float]] = {"stock": [], "gpuorch": []}
    for turn in range(options.rounds + 1):
        with tempfile.TemporaryDirectory() as directory:
            strategy = GPUOrchStrategy(output_dir=directory, log_level="ERROR")
            both = {
                "stock": seconds_per_step("auto", options.steps),
                "gpuorch": seconds_per_step(strategy, options.steps),
            }
        if turn:  # the first round warms up
            for name, value in both.items():
                figures[name].append(value)
    stock, ours = (statistics.median(figures[name]) * 1e6 for name in ("stock", "gpuorch"))
    added = statistics.median(b - a for a, b in zip(figures["stock"], figures["gpuorch"], strict=True)) * 1e6
    print(
        f"stock {stock:.1f} us, gpuorch {ours:.1f} us, added {added:.1f} us per step (medians of {options.rounds} rounds)"
    )


if __name__ == "__main__":
    main()
