"""A dataset that is slow to read: does dynamic batching read while it computes, as the loader's own batches do?

    python -m tests.benchmarks.read_ahead [--samples 3000] [--rounds 2]

Reading a sample sleeps, in two workers of the loader or, from a stream, in one; a step sleeps in proportion to its samples.
So the figures depend little on how busy the machine is, and what would be seen is waiting. Both take equally long, so the
ideal is the time of one of the two. The loops run interleaved; the figure is from the first to the last hook of predict.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator
from typing import Any

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from lightning_gpuorch.pytorch import GPUOrchStrategy

SECONDS_PER_SAMPLE = 0.002


def sample(index: int, num_workers: int) -> torch.Tensor:
    """Read one, in one of so many workers."""
    time.sleep(SECONDS_PER_SAMPLE * num_workers)
    return torch.full((1 + index * 7919 % 50,), index)


class Slow(Dataset[torch.Tensor]):
    """Can be read at any place."""

    def __init__(self, length: int):
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> torch.Tensor:
        return sample(index, 2)


class SlowStream(IterableDataset[torch.Tensor]):
    """Can be read from its beginning."""

    def __init__(self, length: int):
        self.length = length

    def __iter__(self) -> Iterator[torch.Tensor]:
        return (sample(index, 1) for index in range(self.length))


class Sleeper(pl.LightningModule):
    """Takes its time for each sample."""

    def predict_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        time.sleep(SECONDS_PER_SAMPLE * len(batch))
        return batch[:, :1].clone()

    def on_predict_start(self) -> None:
        self.began = time.perf_counter()

    def on_predict_end(self) -> None:
        self.seconds = time.perf_counter() - self.began


def run(samples: int, stream: bool, dynamic: bool) -> float:
    """Predict; returns the seconds it took."""
    loader: DataLoader[Any] = DataLoader(
        SlowStream(samples) if stream else Slow(samples),
        batch_size=32,
        num_workers=1 if stream else 2,
        collate_fn=lambda rows: torch.nn.utils.rnn.pad_sequence(rows, batch_first=True),
    )
    trainer = pl.Trainer(
        strategy=GPUOrchStrategy(enable_dynamic_batching=dynamic, log_level="WARNING"),
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    model = Sleeper()
    got = torch.cat(list(trainer.predict(model, loader))).flatten()
    assert got.tolist() == list(range(samples))
    return model.seconds


def main() -> None:
    """Run and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=3000)
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    ideal = options.samples * SECONDS_PER_SAMPLE
    kinds = [(stream, dynamic) for stream in (False, True) for dynamic in (True, False)]
    seconds: dict[tuple[bool, bool], list[float]] = {kind: [] for kind in kinds}
    for _ in range(options.rounds):
        for kind in kinds:
            seconds[kind].append(run(options.samples, *kind))
    for (stream, dynamic), took in seconds.items():
        print(
            f"{'stream, one worker' if stream else 'dataset, two workers':21}"
            f"{'dynamic batches' if dynamic else 'batches of 32':16} {statistics.median(took):6.2f} s, "
            f"{statistics.median(took) / ideal:.2f} of the ideal {ideal:.2f} s"
        )


if __name__ == "__main__":
    main()
