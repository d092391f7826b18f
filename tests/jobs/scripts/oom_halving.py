"""Predict with steps that run out of memory above some samples, and on chosen samples alone."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from common import Rows, parser, quiet_trainer, write_result
from torch.utils.data import DataLoader

from lightning_gpuorch.callbacks import OOMBatchHalving
from lightning_gpuorch.pytorch import GPUOrchStrategy


class Limited(pl.LightningModule):
    def __init__(self, limit: int, too_large: list[float]):
        super().__init__()
        self.limit, self.too_large = limit, set(too_large)

    def predict_step(self, batch: torch.Tensor, batch_idx: int) -> dict[str, Any]:
        if len(batch) > self.limit or self.too_large & set(batch[:, 0].tolist()):
            raise torch.OutOfMemoryError("CUDA out of memory. (simulated)")
        return {"sum": batch.sum(1), "first": [float(value) for value in batch[:, 0]]}


def main() -> None:
    options = parser()
    options.add_argument("--too-large", type=float, nargs="*", default=[])
    options = options.parse_args()
    callback = OOMBatchHalving()
    strategy = GPUOrchStrategy(output_dir=options.output)
    trainer = quiet_trainer(strategy, options.devices, callbacks=[callback])
    got = trainer.predict(Limited(3, options.too_large), DataLoader(Rows(100), batch_size=8))
    result = {
        "batches": len(got),
        "first": [value for batch in got for value in batch["first"]],
        "sum": torch.cat([batch["sum"] for batch in got]).tolist(),
        "ooms": sum(strategy.runtime.world.collectives.all_gather_object(callback.num_ooms)),
    }
    if trainer.is_global_zero:
        write_result(options, result)


if __name__ == "__main__":
    main()
