"""A predict run in which everything is recorded: profiles, traces, an OOM of every kind of batch, metrics."""

import time
from pathlib import Path

import lightning.pytorch as pl
import torch
from common import Rows, parser, quiet_trainer, write_result
from torch.utils.data import DataLoader

from lightning_gpuorch.callbacks import GPUHealthMonitor, OOMBatchHalving, PrometheusMetrics
from lightning_gpuorch.pytorch import GPUOrchStrategy
from tests.support.nvml import FakeNVML, attach


class Model(pl.LightningModule):
    def __init__(self, options):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))
        self.options = options

    def predict_step(self, batch, batch_idx):
        options, rank = self.options, self.trainer.global_rank
        while options.stall_file and Path(f"{options.stall_file}.{rank}").exists():
            time.sleep(0.05)
        time.sleep(options.step + (options.slow_seconds if rank == options.slow_rank else 0))
        if options.tp > 1:
            torch.distributed.all_reduce(torch.ones(1000))
        too_large = options.oom is not None and float(options.oom) in batch[:, 0].tolist()
        too_large |= options.oom_every is not None and any(
            value % options.oom_every == 0 for value in batch[:, 0].tolist()
        )
        if too_large and len(batch) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory (a test)")
        return batch * 2


def main():
    options = parser()
    options.add_argument("--samples", type=int, default=120)
    options.add_argument("--batch", type=int, default=4)
    options.add_argument("--step", type=float, default=0.0)
    options.add_argument("--oom", type=int, default=None, help="The batch with this sample does not fit.")
    options.add_argument("--oom-every", type=int, default=None, help="Nor does every batch with a multiple of it.")
    options.add_argument("--metrics-port", type=int, default=0)
    options.add_argument("--slow-rank", type=int, default=None)
    options.add_argument("--slow-seconds", type=float, default=0.1)
    options.add_argument("--stall-file", default=None, help="While FILE.RANK exists, that rank does nothing.")
    options.add_argument("--nvml", nargs=2, default=None, help="Library and state file of GPUs that are not there.")
    options.add_argument("--profiling", action="store_true")
    options.add_argument("--trace", default="")
    options.add_argument("--trace-every", type=int, default=10)
    options = options.parse_args()
    callbacks = [OOMBatchHalving()]
    if options.nvml:
        attach(*options.nvml)
        callbacks.append(GPUHealthMonitor(0.2, devices=[FakeNVML.uuid(rank) for rank in range(options.devices)]))
    strategy = GPUOrchStrategy(
        tensor_parallel_size=options.tp, output_dir=options.output, chunk_size=2, enable_profiling=options.profiling,
        trace_endpoint=options.trace, trace_every_steps=options.trace_every,
        parallelize_fn=lambda module, mesh: module,  # its collectives are its own
    )  # fmt: skip
    baseline = strategy.config.baseline_file or None
    callbacks.append(
        PrometheusMetrics(options.metrics_port, address="127.0.0.1", interval_seconds=0.2, baseline=baseline)
    )
    trainer = quiet_trainer(strategy, options.devices, callbacks=callbacks)
    predictions = trainer.predict(Model(options), DataLoader(Rows(options.samples), batch_size=options.batch))
    values = [float(v) for batch in predictions for v in batch[:, 0]]
    if trainer.is_global_zero and options.result:
        write_result(options, {"right": values == [2.0 * i for i in range(options.samples)]})


if __name__ == "__main__":
    main()
