"""A predict run slow enough to be interrupted; notes every batch it computes, and can harm itself on purpose."""

import os
import signal
import sys
import time
from pathlib import Path

import lightning.pytorch as pl
import torch
from common import Rows, parser, quiet_trainer, write_result
from torch.utils.data import DataLoader

from lightning_gpuorch.callbacks import PrometheusMetrics
from lightning_gpuorch.pytorch import GPUOrchStrategy


class Model(pl.LightningModule):
    def __init__(self, options):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))
        self.options = options
        self.steps = 0

    def predict_step(self, batch, batch_idx):
        options = self.options
        rank = self.trainer.global_rank
        if not (options.hurry and os.path.exists(options.hurry)):
            time.sleep(options.step)
        if options.poison is not None and float(options.poison) in batch[:, 0].tolist():
            os.kill(os.getpid(), signal.SIGKILL)
        if rank == options.victim and self.steps == options.at and self._once():
            self._harm(options.harm)  # before the collective: its peers wait in it
        if options.tp > 1 and not options.no_collectives:
            torch.distributed.all_reduce(torch.ones(1, device=self.device))
        self.steps += 1
        with open(options.notes, "a") as notes:
            notes.write(f"{rank} {os.getpid()} {time.monotonic():.4f} {batch_idx}\n")
        return torch.nn.functional.pad(batch * 2, (0, options.padding))

    def _once(self):
        if self.options.every_time:
            return True
        try:
            Path(self.options.notes + ".harmed").touch(exist_ok=False)
        except FileExistsError:
            return False
        return True

    def _harm(self, kind):
        if kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif kind == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        elif kind == "exception":
            raise RuntimeError("harmed on purpose")
        elif kind == "exit0":
            os._exit(0)
        elif kind == "hang":
            while True:
                time.sleep(1)
        elif kind == "device":  # an assertion of a kernel: nothing works on the device any more in this process
            torch.ones(1, device=self.device)[torch.ones(1, dtype=torch.long, device=self.device)].item()
        elif kind == "gil":
            import ctypes

            while True:
                ctypes.PyDLL(None).sleep(3600)


def _restarts():
    return int(os.environ.get("_GPUORCH_GENERATION") or os.environ.get("TORCHELASTIC_RESTART_COUNT") or 0)


def main():
    options = parser()
    options.add_argument("--samples", type=int, default=120)
    options.add_argument("--batch", type=int, default=4)
    options.add_argument("--chunk", type=lambda text: text if text == "auto" else int(text), default=2)
    options.add_argument("--step", type=float, default=0.05)
    options.add_argument("--notes", default="notes.txt")
    options.add_argument("--harm", default=None)
    options.add_argument("--victim", type=int, default=-1)
    options.add_argument("--at", type=int, default=3)
    options.add_argument("--no-collectives", action="store_true")
    options.add_argument("--every-time", action="store_true")
    options.add_argument("--padding", type=int, default=0, help="columns that make the predictions large")
    options.add_argument("--poison", type=int, default=None)
    options.add_argument("--late", type=float, default=0.0, help="seconds that rank 1 is late after a restart")
    options.add_argument("--hurry", default=None, help="once this file exists, steps take no time")
    options.add_argument("--metrics", action="store_true", help="serve metrics on a free port")
    options = options.parse_args()
    if os.environ.get("RANK") == "1" and _restarts():
        time.sleep(options.late)
    strategy = GPUOrchStrategy(
        tensor_parallel_size=options.tp,
        output_dir=options.output,
        chunk_size=options.chunk,
        parallelize_fn=lambda module, mesh: module,  # its collectives are its own
    )
    callbacks = [PrometheusMetrics(0)] if options.metrics else []
    trainer = quiet_trainer(strategy, options.devices, callbacks=callbacks)
    predictions = trainer.predict(Model(options), DataLoader(Rows(options.samples), batch_size=options.batch))
    values = [float(v) for batch in predictions for v in batch[:, 0]]
    if trainer.is_global_zero and options.result:
        write_result(options, {"values": values, "right": values == [2.0 * i for i in range(options.samples)]})
    sys.stdout.flush()


if __name__ == "__main__":
    main()
