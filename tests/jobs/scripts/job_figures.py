"""Throughput and step time of the whole job, gathered over all ranks and logged by Lightning's loggers."""

import time

import lightning.pytorch as pl
import torch
from common import Rows, parser, quiet_trainer, write_result
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch.utils.data import DataLoader

from lightning_gpuorch.telemetry.metrics.aggregates import JobThroughput, StepLatency


class Measured(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))
        self.throughput, self.slowest = JobThroughput(), StepLatency(1.0)
        self.found = {}

    def predict_step(self, batch, batch_idx):
        began = time.perf_counter()
        time.sleep(0.2 if self.trainer.global_rank == 1 and batch_idx > 2 else 0.02)
        seconds = time.perf_counter() - began
        self.throughput.update(len(batch), seconds)
        self.slowest.update(seconds)
        return batch

    def on_predict_end(self):
        self.found = {
            "samples_per_second": float(self.throughput.compute()),
            "slowest_step_seconds": float(self.slowest.compute()),
        }
        for logger in self.loggers:  # on rank 0 alone they write
            logger.log_metrics(self.found, step=0)
            logger.save()


def main():
    options = parser()
    options = options.parse_args()
    loggers = [CSVLogger("logs", version=0), TensorBoardLogger("logs", version=1)]
    trainer = quiet_trainer("gpuorch", options.devices, logger=loggers)
    model = Measured()
    began = time.perf_counter()
    trainer.predict(model, DataLoader(Rows(160), batch_size=4))
    if trainer.is_global_zero:
        write_result(options, {**model.found, "seconds": time.perf_counter() - began})


if __name__ == "__main__":
    main()
