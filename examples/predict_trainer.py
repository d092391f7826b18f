"""An existing Trainer.predict pipeline, orchestrated: scikit-learn's digits, trained in seconds, predicted on 2 devices.

    python examples/predict_trainer.py

What is new against a plain pipeline is ``strategy="gpuorch"`` and the callbacks.
"""

from __future__ import annotations

import argparse

import lightning.pytorch as pl
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_gpuorch  # noqa: F401 - registers strategy="gpuorch"
from lightning_gpuorch.callbacks import JobProgressBar


class DigitClassifier(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))

    def fit_quickly(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        optimizer = torch.optim.Adam(self.parameters(), lr=1e-2)
        for _ in range(100):
            optimizer.zero_grad()
            nn.functional.cross_entropy(self.net(images), labels).backward()
            optimizer.step()

    def predict_step(self, batch: list[torch.Tensor], batch_idx: int) -> dict[str, torch.Tensor]:
        images, labels = batch
        return {"digit": self.net(images).argmax(-1), "label": labels}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--devices", type=int, default=2)
    options = parser.parse_args()

    pl.seed_everything(0, verbose=False)
    digits = load_digits()
    images = torch.tensor(digits.data / 16, dtype=torch.float32)
    labels = torch.tensor(digits.target)
    model = DigitClassifier()
    model.fit_quickly(images[:1000], labels[:1000])

    trainer = pl.Trainer(
        strategy="gpuorch",
        devices=options.devices,
        callbacks=[JobProgressBar()],
        logger=False,
        enable_checkpointing=False,
    )
    predictions = trainer.predict(model, DataLoader(TensorDataset(images, labels), batch_size=32))
    if trainer.is_global_zero:
        right = sum(int((p["digit"] == p["label"]).sum()) for p in predictions)
        total = sum(len(p["label"]) for p in predictions)
        print(f"{total} digits predicted on {trainer.world_size} devices, in dataset order; {right / total:.1%} right")


if __name__ == "__main__":
    main()
