"""torchmetrics in predict and in test, and self.log(sync_dist=True), against the numbers of one device."""

import lightning.pytorch as pl
import torch
from common import parser, quiet_trainer, write_result
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from lightning_gpuorch.pytorch import GPUOrchStrategy


class Classifier(pl.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Linear(6, 3)
        self.accuracy = MulticlassAccuracy(num_classes=3, average="micro")
        self.computed = None

    def predict_step(self, batch, batch_idx):
        x, y = batch
        logits = self.net(x)
        self.accuracy.update(logits, y)
        return logits

    def on_predict_epoch_end(self):
        self.computed = float(self.accuracy.compute())
        self.accuracy.reset()

    def test_step(self, batch, batch_idx):
        x, y = batch
        logits = self.net(x)
        self.accuracy(logits, y)
        self.log("accuracy", self.accuracy)
        self.log("loss", nn.functional.cross_entropy(logits, y), sync_dist=True)
        self.log("largest", logits.max(), sync_dist=True, reduce_fx="max")


def keep_whole(module, mesh):
    return module


def main():
    options = parser().parse_args()
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(53, 6, generator=generator)
    y = torch.randint(0, 3, (53,), generator=generator)
    loader = DataLoader(TensorDataset(x, y), batch_size=5)
    trainer = quiet_trainer(
        GPUOrchStrategy(tensor_parallel_size=options.tp, parallelize_fn=keep_whole), options.devices
    )
    model = Classifier()
    trainer.predict(model, loader)
    predicted = model.computed
    (tested,) = trainer.test(model, loader, verbose=False)
    with torch.no_grad():
        logits = model.net(x)
        expected = {
            "accuracy": float((logits.argmax(-1) == y).float().mean()),
            "loss": float(nn.functional.cross_entropy(logits, y)),
            "largest": float(logits.max()),
        }
    if trainer.is_global_zero:
        write_result(options, {"predict": predicted, "test": tested, "expected": expected})


if __name__ == "__main__":
    main()
