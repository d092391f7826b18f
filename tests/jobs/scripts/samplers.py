"""trainer.predict with samplers that draw from some random state, and a rank that dies."""

import os
import signal
import time
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import torch
from common import Doubler, Rows, parser, quiet_trainer, write_result
from torch.utils.data import DataLoader, DistributedSampler, SubsetRandomSampler, WeightedRandomSampler

from lightning_gpuorch.pytorch import GPUOrchStrategy

LENGTH = 60


class NumpyBatches:
    """Batches of uneven sizes, drawn from NumPy's global state."""

    def __iter__(self):
        for batch in np.array_split(np.random.permutation(LENGTH), 20):
            yield batch.tolist()

    def __len__(self):
        return 20


class Dies(Doubler):
    file = ""
    output = None

    def wait_for(self, condition):
        deadline = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def wait_for_a_part(self):
        """Parts are written in the background."""
        self.wait_for(lambda: not self.output or list(Path(self.output).rglob("part-*")))

    def predict_step(self, batch, batch_idx, dataloader_idx=0):
        torch.rand(3)  # a model that draws as well
        last = int(os.environ.get("WORLD_SIZE", 1)) - 1
        if self.file and self.trainer.global_rank != last:
            self.wait_for(lambda: os.path.exists(self.file))  # else this rank might do all of the work
        if self.file and self.trainer.global_rank == last and batch_idx >= 5 and not os.path.exists(self.file):
            Path(self.file).touch()
            self.wait_for_a_part()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().predict_step(batch, batch_idx)


def build(kind, trainer):
    rows = Rows(LENGTH)
    if kind == "subset":
        return DataLoader(rows, batch_size=3, sampler=SubsetRandomSampler(range(LENGTH)))
    if kind == "own_generator":
        generator = torch.Generator().manual_seed(7)
        sampler = WeightedRandomSampler([1.0] * LENGTH, LENGTH, replacement=False, generator=generator)
        return DataLoader(rows, batch_size=3, sampler=sampler)
    if kind == "numpy_batches":
        return DataLoader(rows, batch_sampler=NumpyBatches())
    assert kind == "distributed"
    return DataLoader(rows, batch_size=3, sampler=DistributedSampler(rows, trainer.world_size, trainer.global_rank))


def main():
    options = parser()
    options.add_argument("--kind", required=True)
    options.add_argument("--seed", type=int)
    options.add_argument("--dies", default="")
    options = options.parse_args()
    if options.seed is None:
        np.random.seed()
        torch.seed()
    else:
        pl.seed_everything(options.seed)
    trainer = quiet_trainer(GPUOrchStrategy(output_dir=options.output), options.devices)
    model = Dies()
    model.file, model.output = options.dies, options.output
    got = trainer.predict(model, build(options.kind, trainer))
    if trainer.is_global_zero:
        write_result(options, [[int(row[0]) // 2 for row in batch] for batch in got])


if __name__ == "__main__":
    main()
