"""A job of two CPU ranks that watch GPUs which are not there: ``job_with_gpus.py LIBRARY STATE_FILE OUTPUT_DIR``."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DataLoader, TensorDataset

from lightning_gpuorch.callbacks import GPUHealthMonitor, PrometheusMetrics
from lightning_gpuorch.pytorch import GPUOrchStrategy
from tests.support.nvml import FakeNVML, attach

HOLD = Path(sys.argv[3] + ".hold")
"""As long as this file is there, rank 1 does not come out of its step."""


class Slow(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))

    def predict_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        time.sleep(0.02)  # so that there is a job left when the GPU fails
        while self.global_rank == 1 and HOLD.exists():
            time.sleep(0.02)
        return batch[0] * 2


if __name__ == "__main__":
    library, state_file, output_dir = sys.argv[1:]
    attach(library, state_file)
    trainer = Trainer(
        strategy=GPUOrchStrategy(output_dir=output_dir), accelerator="cpu", devices=2, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[
            GPUHealthMonitor(0.1, devices=[FakeNVML.uuid(0), FakeNVML.uuid(1)]),
            PrometheusMetrics(0, address="127.0.0.1", interval_seconds=0.2),
        ],
    )  # fmt: skip
    trainer.predict(Slow(), DataLoader(TensorDataset(torch.arange(2000.0).unsqueeze(1)), batch_size=8))
