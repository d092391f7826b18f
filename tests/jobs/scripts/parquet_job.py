"""A job whose parts are Parquet files; rank 1 can be killed once."""

import os
import signal
import sys
import time
from pathlib import Path

import lightning.pytorch as pl
import torch
from common import parser, quiet_trainer, write_result
from torch.utils.data import DataLoader, Dataset

from lightning_gpuorch.pytorch import GPUOrchStrategy


class Texts(Dataset):
    def __init__(self, count, equal_keys, unreadable=()):
        self.count, self.equal_keys, self.unreadable = count, equal_keys, unreadable

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        if index in self.unreadable:
            raise OSError(f"file {index} is broken")
        key = index - 1 if index in self.equal_keys else index
        return {"id": f"id-{key}", "url": f"https://example/{index}", "x": torch.tensor([float(index)])}


class Model(pl.LightningModule):
    def __init__(self, options):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))
        self.options, self.steps = options, 0

    def predict_step(self, batch, batch_idx):
        time.sleep(self.options.step)
        self.steps += 1
        with open("batches.txt", "a") as notes:
            notes.write(f"{batch_idx}\n")
        bad = set(map(int, batch["x"][:, 0])) & set(self.options.raising)
        if bad:
            raise ValueError(f"sample {min(bad)} cannot be computed")
        victim = self.trainer.global_rank == 1 and self.steps == 12 and self.options.kill
        if victim and not Path("killed").exists():
            Path("killed").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return {"embedding": batch["x"] * torch.arange(1.0, 4.0), "label": [f"l{int(v) % 3}" for v in batch["x"][:, 0]]}


def main():
    options = parser()
    options.add_argument("--samples", type=int, default=200)
    options.add_argument("--step", type=float, default=0.02)
    options.add_argument("--columns", default="url")
    options.add_argument("--key", default="id")
    options.add_argument("--kill", action="store_true")
    options.add_argument("--dynamic", action="store_true")
    options.add_argument("--raising", type=int, nargs="*", default=())
    options.add_argument("--unreadable", type=int, nargs="*", default=())
    options.add_argument("--on-error", default="isolate")
    options.add_argument("--most", type=int, default=None)
    options.add_argument("--format", default="parquet")
    options.add_argument("--equal-keys", type=int, nargs="*", default=())
    options = options.parse_args()
    strategy = GPUOrchStrategy(
        output_dir=options.output,
        chunk_size=3,
        output_format=options.format,
        keep_columns=options.columns.split(",") if options.format == "parquet" else None,
        key_column=options.key if options.format == "parquet" else "",
        on_error=options.on_error,
        max_errored_samples=options.most,
        enable_dynamic_batching=options.dynamic,
        length_fn=(lambda sample: 1 + int(sample["x"][0]) % 5) if options.dynamic else None,
    )
    trainer = quiet_trainer(strategy, options.devices)
    loader = DataLoader(Texts(options.samples, options.equal_keys, options.unreadable), batch_size=4)
    predictions = trainer.predict(Model(options), loader)
    values = [float(value) for batch in predictions if batch for value in batch["embedding"][:, 2]]
    failing = {*options.raising, *options.unreadable}
    if trainer.is_global_zero and options.result:
        write_result(
            options,
            {
                "right": values == [3.0 * i for i in range(options.samples) if i not in failing],
                "type": list(predictions[0]),
            },
        )
    sys.stdout.flush()


if __name__ == "__main__":
    main()
