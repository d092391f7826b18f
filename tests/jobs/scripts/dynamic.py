"""Predict on sequences of skewed length with dynamic batching, and tell which batches were computed where."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from common import parser, quiet_trainer, write_result
from torch.utils.data import DataLoader, Dataset, IterableDataset

from lightning_gpuorch.pytorch import GPUOrchStrategy
from lightning_gpuorch.testing.memory import CPUMemoryBudget


def tokens(index: int) -> list[int]:
    """Sample ``index``: mostly short, sometimes long."""
    length = 1 + (index * 7919) % 23 + (index % 17 == 0) * 60
    return [1 + (index * 31 + place) % 97 for place in range(length)]


class Sequences(Dataset[Any]):
    def __init__(self, length: int):
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < self.length:
            raise IndexError(index)
        return {"input_ids": tokens(index), "index": index}


class Stream(IterableDataset[Any]):
    def __init__(self, length: int):
        self.length = length

    def __iter__(self) -> Any:
        return (Sequences(self.length)[index] for index in range(self.length))


def collate(samples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    longest = max(len(sample["input_ids"]) for sample in samples)
    ids = torch.zeros(len(samples), longest, dtype=torch.long)
    for row, sample in enumerate(samples):
        ids[row, : len(sample["input_ids"])] = torch.tensor(sample["input_ids"])
    return {"input_ids": ids, "index": torch.tensor([sample["index"] for sample in samples])}


class Pooler(pl.LightningModule):
    """Mean of embeddings over the tokens of each sample."""

    def __init__(self, log: str | None = None, poison: int | None = None, slow_seconds: float = 0.0):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.table = torch.nn.Parameter(torch.randn(128, 64, generator=generator))
        self.log_file, self.poison, self.slow_seconds = log, poison, slow_seconds

    def predict_step(self, batch: dict[str, torch.Tensor], batch_idx: int, dataloader_idx: int = 0) -> dict[str, Any]:
        ids, index = batch["input_ids"], batch["index"].tolist()
        time.sleep(self.slow_seconds)
        if self.poison in index:
            os.kill(os.getpid(), signal.SIGKILL)
        mask = (ids > 0).unsqueeze(-1).float()
        pooled = (self.table[ids] * mask).sum(1) / mask.sum(1)
        if self.log_file:
            with open(f"{self.log_file}-{os.getpid()}", "a") as file:
                file.write(json.dumps([self.global_rank, index, list(ids.shape)]) + "\n")
        return {"pooled": pooled, "index": index, "first": [tokens(i)[0] for i in index]}


def log_lines(log: str) -> list[Any]:
    lines = []
    for path in Path(log).parent.glob(Path(log).name + "-*"):
        lines += [json.loads(line) for line in path.read_text().splitlines()]
    return lines


def main() -> None:
    options = parser()
    options.add_argument("--samples", type=int, default=600)
    options.add_argument("--batch-size", type=int, default=8)
    options.add_argument("--chunk-size", type=int, default=2)
    options.add_argument("--tokens", type=int, default=256)
    options.add_argument("--log", default=None)
    options.add_argument("--stream", action="store_true")
    options.add_argument("--workers", type=int, default=0)
    options.add_argument("--poison", type=int, default=None)
    options.add_argument("--slow", type=float, default=0.0, help="seconds a step takes besides its work")
    options.add_argument("--budgets", type=int, nargs="*", default=[], help="bytes for each rank")
    options = options.parse_args()
    strategy = GPUOrchStrategy(
        output_dir=options.output,
        enable_dynamic_batching=True,
        chunk_size=options.chunk_size,
        max_batch_tokens="auto" if options.budgets else options.tokens,
        tensor_parallel_size=options.tp,
        parallelize_fn=(lambda module, mesh: module) if options.tp > 1 else None,
    )
    dataset = Stream(options.samples) if options.stream else Sequences(options.samples)
    loader = DataLoader(dataset, batch_size=options.batch_size, collate_fn=collate, num_workers=options.workers)
    trainer = quiet_trainer(strategy, options.devices)
    model = Pooler(options.log, options.poison, options.slow)
    if options.budgets:
        rank = trainer.strategy._worker.rank if trainer.strategy._worker else 0
        with CPUMemoryBudget(options.budgets[rank], resident=model) as budget:
            got = trainer.predict(model, loader)
        ooms = budget.num_ooms
    else:
        got, ooms = trainer.predict(model, loader), 0
    if trainer.is_global_zero:
        batches = list(got)
        with torch.inference_mode():
            expected = [Pooler().predict_step(batch, 0) for batch in loader]
        result = {
            "equal": [e["index"] for e in expected] == [b["index"] for b in batches]
            and [e["first"] for e in expected] == [b["first"] for b in batches],
            "difference": max(
                float((e["pooled"] - b["pooled"]).abs().max()) for e, b in zip(expected, batches, strict=True)
            ),
            "ooms": ooms,
            "steps": log_lines(options.log) if options.log else [],
        }
        write_result(options, result)


if __name__ == "__main__":
    main()
