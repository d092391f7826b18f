"""A predict run whose prediction writer writes a file per batch, named by its number, and can die while it writes."""

import json
import os
import signal
import time
from pathlib import Path

import lightning.pytorch as pl
import torch
from common import Rows, parser, quiet_trainer, write_result
from lightning.pytorch.callbacks import BasePredictionWriter, Callback
from torch.utils.data import DataLoader

from lightning_gpuorch.pytorch import GPUOrchStrategy


class Model(pl.LightningModule):
    def __init__(self, seconds):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))
        self.seconds = seconds

    def predict_step(self, batch, batch_idx):
        time.sleep(self.seconds)
        self.number = batch_idx
        return {"y": batch * 2, "big": batch.repeat(1, 50)}


class Denormalise(Callback):
    def on_predict_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
        outputs["y"].mul_(10)
        del outputs["big"]


class Writer(BasePredictionWriter):
    def __init__(self, options):
        super().__init__(write_interval="batch")
        self.options, self.directory = options, Path(options.files)
        self.directory.mkdir(exist_ok=True)

    def write_on_batch_end(self, trainer, pl_module, prediction, batch_indices, batch, batch_idx, dataloader_idx):
        assert batch_idx == pl_module.number
        if self.options.die_in == "end":
            self._harm(trainer, batch_indices)
        content = {"rows": prediction["y"][:, 0].tolist(), "indices": batch_indices}
        if self.options.tp > 1 and trainer.global_rank % self.options.tp != self.options.victim:
            return  # the other ranks' work is not what is looked at
        temporary = self.directory / f".{batch_idx}-{os.getpid()}"
        temporary.write_text(json.dumps(content))
        temporary.replace(self.directory / f"{batch_idx}.json")
        with open(self.options.notes, "a") as notes:
            notes.write(f"{trainer.global_rank} {batch_idx}\n")

    def on_predict_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        if self.options.die_in == "start":
            self._harm(trainer, batch[:, 0].int().tolist())

    def _harm(self, trainer, samples):
        mine = trainer.global_rank % self.options.tp == self.options.victim
        if self.options.die_at not in samples or not mine or not self._dies():
            return
        if self.options.die_by == "exception":
            raise OSError("the file cannot be written, on purpose")
        time.sleep(self.options.wait)
        os.kill(os.getpid(), signal.SIGKILL)

    def _dies(self):
        if self.options.every_time:
            return True
        try:
            (self.directory / "died").touch(exist_ok=False)
        except FileExistsError:
            return False
        return True


def main():
    options = parser()
    options.add_argument("--samples", type=int, default=46)
    options.add_argument("--chunk", type=int, default=2)
    options.add_argument("--seconds", type=float, default=0.02)
    options.add_argument("--files", default="files")
    options.add_argument("--notes", default="notes.txt")
    options.add_argument("--die-at", type=int, default=-1, help="sample in whose batch the writer dies")
    options.add_argument("--die-by", default="kill")
    options.add_argument("--die-in", default="end", help="on_predict_batch_start or on_predict_batch_end")
    options.add_argument("--victim", type=int, default=0, help="rank in its group")
    options.add_argument("--wait", type=float, default=0.0, help="seconds before it dies, in which others may go on")
    options.add_argument("--every-time", action="store_true")
    options.add_argument("--dynamic", action="store_true")
    options = options.parse_args()
    strategy = GPUOrchStrategy(
        tensor_parallel_size=options.tp,
        output_dir=options.output,
        chunk_size=options.chunk,
        enable_dynamic_batching=options.dynamic,
        max_batch_tokens=10 if options.dynamic else "auto",
        parallelize_fn=(lambda module, mesh: module) if options.tp > 1 else None,
    )
    trainer = quiet_trainer(strategy, options.devices, callbacks=[Denormalise(), Writer(options)])
    predictions = trainer.predict(Model(options.seconds), DataLoader(Rows(options.samples), batch_size=4))
    if trainer.is_global_zero:
        values = [float(v) for output in predictions for v in output["y"][:, 0]]
        keys = {key for output in predictions for key in output}
        write_result(options, {"values": values, "keys": sorted(keys)})


if __name__ == "__main__":
    main()
