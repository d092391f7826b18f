"""A predict run in which everything is recorded: profiles, traces, an OOM of every kind of batch, metrics."""

import time

import lightning.pytorch as pl
import torch
from common import Rows, parser, quiet_trainer, write_result
from torch.utils.data import DataLoader

from lightning_gpuorch.callbacks import OOMBatchHalving, PrometheusMetrics
from lightning_gpuorch.pytorch import GPUOrchStrategy


class Model(pl.LightningModule):
    def __init__(self, options):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))
        self.options = options

    def predict_step(self, batch, batch_idx):
        time.sleep(self.options.step)
        if self.options.oom is not None and float(self.options.oom) in batch[:, 0].tolist() and len(batch) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory (a test)")
        return batch * 2


def main():
    options = parser()
    options.add_argument("--samples", type=int, default=120)
    options.add_argument("--batch", type=int, default=4)
    options.add_argument("--step", type=float, default=0.0)
    options.add_argument("--oom", type=int, default=None, help="The batch with this sample does not fit.")
    options.add_argument("--profiling", action="store_true")
    options.add_argument("--trace", default="")
    options.add_argument("--trace-every", type=int, default=10)
    options = options.parse_args()
    strategy = GPUOrchStrategy(
        output_dir=options.output, chunk_size=2, enable_profiling=options.profiling, trace_endpoint=options.trace,
        trace_every_steps=options.trace_every,
    )  # fmt: skip
    metrics = PrometheusMetrics(0, address="127.0.0.1", baseline=strategy.config.baseline_file or None)
    trainer = quiet_trainer(strategy, options.devices, callbacks=[OOMBatchHalving(), metrics])
    predictions = trainer.predict(Model(options), DataLoader(Rows(options.samples), batch_size=options.batch))
    values = [float(v) for batch in predictions for v in batch[:, 0]]
    if trainer.is_global_zero and options.result:
        write_result(options, {"right": values == [2.0 * i for i in range(options.samples)]})


if __name__ == "__main__":
    main()
