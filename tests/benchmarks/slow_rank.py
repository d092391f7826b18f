"""Two replicas, one of them three times slower: how close is the makespan to what perfect sharing would give?

    python -m tests.benchmarks.slow_rank [--seconds 24] [--samples 6000] [--plain] [--stream]

A step sleeps in proportion to its padded tokens, and three times as long on rank 1, so the figure does not depend on how
busy the machine is otherwise. The makespan is from the first step's start to the last step's end. The ideal is all the work
(as it was done, in tokens) at the two ranks' speeds together.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SLOWNESS = 3.0
MEAN_TOKENS = 28.0


def worker(options: argparse.Namespace) -> None:
    """One rank's part."""
    import lightning.pytorch as pl
    import numpy as np
    import torch
    from torch.utils.data import DataLoader, IterableDataset

    from lightning_gpuorch.pytorch import GPUOrchStrategy

    lengths = np.clip(np.random.default_rng(0).lognormal(2.8, 1, options.samples), 2, 256).astype(int)
    seconds_per_token = options.seconds / lengths.sum()

    class Sleeper(pl.LightningModule):
        def predict_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
            began = time.time()
            time.sleep(batch.numel() * seconds_per_token * (SLOWNESS if self.global_rank == 1 else 1))
            with open(Path(options.directory) / f"steps-{self.global_rank}", "a") as file:
                file.write(json.dumps([began, time.time(), batch.numel()]) + "\n")
            return batch[:, :1].clone()

    class Stream(IterableDataset[torch.Tensor]):
        def __iter__(self) -> Iterator[torch.Tensor]:
            return iter(samples)

    samples = [torch.full((length,), i) for i, length in enumerate(lengths.tolist())]
    loader = DataLoader(
        Stream() if options.stream else samples,  # type: ignore[arg-type]
        batch_size=32,
        collate_fn=lambda rows: torch.nn.utils.rnn.pad_sequence(rows, batch_first=True),
    )
    trainer = pl.Trainer(
        strategy=GPUOrchStrategy(enable_dynamic_batching=not options.plain, log_level="WARNING"),
        accelerator="cpu",
        devices=2,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    got = torch.cat(list(trainer.predict(Sleeper(), loader))).flatten()
    assert got.tolist() == list(range(options.samples))


def main() -> None:
    """Run and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=24.0, help="the work, without padding, at full speed")
    parser.add_argument("--samples", type=int, default=6000)
    parser.add_argument("--plain", action="store_true", help="without dynamic batching")
    parser.add_argument("--stream", action="store_true", help="nobody knows where the data ends")
    parser.add_argument("--directory", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.directory:
        worker(options)
        return
    with tempfile.TemporaryDirectory() as directory:
        command = [sys.executable, __file__, *sys.argv[1:], "--directory", directory]
        subprocess.run(command, check=True, cwd=directory, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=900)
        steps: list[list[list[Any]]] = [
            [json.loads(line) for line in (Path(directory) / f"steps-{rank}").read_text().splitlines()]
            for rank in range(2)
        ]
    makespan = max(s[1] for rank in steps for s in rank) - min(s[0] for rank in steps for s in rank)
    tokens = [sum(s[2] for s in rank) for rank in steps]
    # A token's time as it was on rank 0, interpreter and scheduler included.
    per_token = sum(s[1] - s[0] for s in steps[0]) / tokens[0]
    ideal = sum(tokens) * per_token / (1 + 1 / SLOWNESS)
    print(
        f"makespan {makespan:.2f} s, ideal {ideal:.2f} s: {makespan / ideal:.3f}; rank 1 took "
        f"{tokens[1] / sum(tokens):.3f} of the tokens (ideal {1 / (1 + SLOWNESS):.3f}); {len(steps[0])} and "
        f"{len(steps[1])} steps"
    )


if __name__ == "__main__":
    main()
