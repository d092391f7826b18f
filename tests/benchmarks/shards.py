"""A stream that takes long to read: what do two replicas that read a shard each save, against one, and against whole streams?

    python -m tests.benchmarks.shards [--rows 2400] [--rounds 2]

Files of rows lie in a directory. Reading a row sleeps, as a slow store would let it wait, and its bytes are counted; a step
takes next to nothing. So the figures depend little on how busy the machine is. Each line is a whole predict call, timed from
the first to the last hook of predict on the first rank; runs are interleaved.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader

from lightning_gpuorch import FileShards
from lightning_gpuorch.pytorch import GPUOrchStrategy

SECONDS_PER_ROW = 0.004
ROW_BYTES = 4096
FILES = 12
BATCH = 16


def read(path: Path) -> Iterator[torch.Tensor]:
    """The rows of a file; what was read of it is noted at its end."""
    count = 0
    with open(path, "rb", buffering=0) as file:
        while row := file.read(ROW_BYTES):
            time.sleep(SECONDS_PER_ROW)
            count += len(row)
            yield torch.full((4,), float(row[0]))
    with open(path.parent / "read.txt", "a") as notes:
        notes.write(f"{count}\n")


class Model(pl.LightningModule):
    """Does next to nothing, and takes the time of predict."""

    began = ended = 0.0

    def predict_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return batch.sum(1)

    def on_predict_start(self) -> None:
        self.began = time.perf_counter()

    def on_predict_end(self) -> None:
        self.ended = time.perf_counter()


def one_run(directory: Path, devices: int, sharding: str, workers: int) -> None:
    """In a process of each rank."""
    stream = FileShards(sorted(directory.glob("*.bin")), read)
    loader = DataLoader(stream, batch_size=BATCH, num_workers=workers)
    strategy: Any = GPUOrchStrategy(sharding=sharding)
    trainer = pl.Trainer(
        strategy=strategy, devices=devices, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    model = Model()
    rows = sum(len(batch) for batch in trainer.predict(model, loader) or ())
    if trainer.is_global_zero:
        (directory / "result.json").write_text(json.dumps([model.ended - model.began, rows]))


def measured(directory: Path, devices: int, sharding: str, workers: int) -> tuple[float, float]:
    """Seconds of a run, and bytes read as a multiple of what there is."""
    notes, rows = directory / "read.txt", sum(path.stat().st_size for path in directory.glob("*.bin")) // ROW_BYTES
    notes.unlink(missing_ok=True)
    run = ("--run", str(directory), "--devices", str(devices), "--sharding", sharding, "--workers", str(workers))
    subprocess.run(
        [sys.executable, "-m", "tests.benchmarks.shards", *run], check=True, capture_output=True, timeout=600
    )
    seconds, found = json.loads((directory / "result.json").read_text())
    assert found == rows, f"{found} predictions of {rows} rows"
    return seconds, sum(map(int, notes.read_text().split())) / (rows * ROW_BYTES)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=2400)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--run")
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--sharding", default="auto")
    parser.add_argument("--workers", type=int, default=0)
    options = parser.parse_args()
    if options.run:
        one_run(Path(options.run), options.devices, options.sharding, options.workers)
        return
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    kinds = [(1, "auto", 0), (2, "auto", 0), (2, "off", 0), (1, "auto", 2), (2, "auto", 2)]
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch)
        for number in range(FILES):
            (directory / f"{number:02d}.bin").write_bytes(bytes([number]) * (ROW_BYTES * options.rows // FILES))
        found: dict[Any, list[tuple[float, float]]] = {kind: [] for kind in kinds}
        for _ in range(options.rounds):
            for kind in kinds:
                found[kind].append(measured(directory, *kind))
    alone = {}
    print("| Replicas | Loader workers of each | Read | Seconds | Of one replica by shard | Bytes read / size |")
    print("|---|---|---|---|---|---|")
    for (devices, sharding, workers), runs in found.items():
        seconds, times_read = (statistics.median(column) for column in zip(*runs, strict=True))
        if devices == 1:
            alone[workers] = seconds
        how = "by shard" if sharding == "auto" else "as a whole"
        print(
            f"| {devices} | {workers} | {how} | {seconds:.2f} | {seconds / alone[workers]:.2f} | {times_read:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
