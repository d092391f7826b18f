"""Wall seconds to embed sequences of skewed length on a GPU: dynamic batching beside fixed batches.

    python -m tests.benchmarks.gpu_batching [--samples 40000] [--rounds 3]

A model of MiniLM's shape with random weights; lengths are log-normal, at most 256 tokens. Programs run in turns in one
process; medians over the rounds are printed. Samples are tokens already, so that the host has little to do.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import tempfile
import time
import warnings
from typing import Any

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader
from transformers import BertConfig, BertModel

from lightning_gpuorch.pytorch import GPUOrchStrategy

MAX_TOKENS = 256


class Embedder(pl.LightningModule):
    """MiniLM's architecture with mean pooling."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        config = BertConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536)
        self.encoder = BertModel(config, add_pooling_layer=False).eval()
        self.seconds = 0.0
        self.steps = self.tokens = 0

    def predict_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        self.steps += 1
        self.tokens += batch["input_ids"].numel()
        hidden = self.encoder(**batch).last_hidden_state
        mask = batch["attention_mask"].unsqueeze(-1)
        return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)

    def on_predict_start(self) -> None:
        self.began = time.perf_counter()

    def on_predict_end(self) -> None:
        torch.cuda.synchronize()
        self.seconds = time.perf_counter() - self.began


def collate(samples: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    ids = torch.nn.utils.rnn.pad_sequence(samples, batch_first=True)
    return {"input_ids": ids, "attention_mask": (ids > 0).long()}


def make_samples(count: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    lengths = torch.exp(0.8 * torch.randn(count, generator=generator) + 3.9).long().clamp(4, MAX_TOKENS).tolist()
    return [torch.randint(1000, 20000, (length,), generator=generator) for length in lengths]


def run(name: str, samples: list[torch.Tensor]) -> tuple[Embedder, torch.Tensor]:
    """One program; gives the model with its counts, and the vectors."""
    batch_size = 256 if "256" in name else 32
    loader = DataLoader(samples, batch_size=batch_size, collate_fn=collate)  # type: ignore[arg-type]
    model = Embedder()
    with tempfile.TemporaryDirectory() as directory:
        strategy: Any = "auto"
        if name.startswith("ours"):
            dynamic = "dynamic" in name
            strategy = GPUOrchStrategy(output_dir=directory, enable_dynamic_batching=dynamic, log_level="WARNING")
        trainer = pl.Trainer(
            strategy=strategy, accelerator="gpu", devices=1, logger=False, enable_progress_bar=False,
            enable_model_summary=False, enable_checkpointing=False,
        )  # fmt: skip
        vectors = torch.cat([one.cpu() for one in trainer.predict(model, loader)])
    return model, vectors


PROGRAMS = ("stock, batches of 32", "stock, batches of 256", "ours, batches of 32", "ours, dynamic batches")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=40_000)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_float32_matmul_precision("high")
    samples = make_samples(options.samples)
    tokens = sum(map(len, samples))
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}: {len(samples)} samples, {tokens} tokens")
    run(PROGRAMS[0], samples[:640])  # warm
    seconds: dict[str, list[float]] = {name: [] for name in PROGRAMS}
    last: dict[str, tuple[Embedder, torch.Tensor]] = {}
    for _ in range(options.rounds):
        for name in PROGRAMS:
            last[name] = run(name, samples)
            seconds[name].append(last[name][0].seconds)
    reference = last[PROGRAMS[0]][1]
    ours = statistics.median(seconds[PROGRAMS[-1]])
    for name in PROGRAMS:
        model, vectors = last[name]
        median = statistics.median(seconds[name])
        print(
            f"{name:22} {median:6.2f} s ({min(seconds[name]):.2f} to {max(seconds[name]):.2f}), {tokens / median:9.0f} "
            f"tokens/s, dynamic batches take {ours / median:.2f} of it; {model.steps} steps, "
            f"{model.tokens / tokens:.2f} x the tokens with padding; largest difference of a vector "
            f"{float((vectors - reference).abs().max()):.1e}",
            flush=True,
        )


if __name__ == "__main__":
    main()
