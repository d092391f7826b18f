"""What the scripts share: options, quiet trainers, and the result file."""

from __future__ import annotations

import argparse
import json
import logging
import os
import warnings
from typing import Any

import lightning.pytorch as pl
import torch
from torch.utils.data import Dataset

import lightning_gpuorch  # noqa: F401 - registers strategy="gpuorch"

warnings.filterwarnings("ignore", message=".*does not have many workers.*")
warnings.filterwarnings("ignore", message=".*LeafSpec.*")
for name in (
    "lightning.pytorch",
    "lightning.fabric",
    "lightning.pytorch.utilities.rank_zero",
    "lightning.fabric.utilities.rank_zero",
):
    logging.getLogger(name).setLevel(logging.ERROR)


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser()
    options.add_argument("--result", default=None)
    options.add_argument("--devices", type=int, default=2)
    options.add_argument("--tp", type=int, default=1)
    options.add_argument("--output", default=None)
    return options


def accelerator(kind: str) -> Any:
    """For the Trainer or Fabric: the CPU, or all ranks on the first GPU if the environment has ``SHARE_GPU``."""
    if "SHARE_GPU" not in os.environ:
        return "cpu"
    from lightning_gpuorch.testing import shared_gpu

    return getattr(shared_gpu, f"{kind}SharedGPU")()


def quiet_trainer(strategy: Any, devices: int, **options: Any) -> pl.Trainer:
    defaults = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "accelerator": accelerator("Trainer"),
    }
    return pl.Trainer(strategy=strategy, devices=devices, **{**defaults, **options})


def write_result(options: argparse.Namespace, result: Any) -> None:
    with open(options.result, "w") as file:
        json.dump(result, file)


class Rows(Dataset):
    """Sample i is [i, i + 0.5]."""

    def __init__(self, length: int):
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> torch.Tensor:
        if not 0 <= index < self.length:
            raise IndexError(index)
        return torch.tensor([float(index), index + 0.5])


class Doubler(pl.LightningModule):
    """Predicts 2 x the sample, with parameters so that it is a model."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(2.0))

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> torch.Tensor:
        return batch * self.scale
