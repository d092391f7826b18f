"""A predict run that something happens to: at its start, in the middle, when the work is done, or when others have left."""

import os
import signal
import time
from pathlib import Path

import torch
from common import Doubler, Rows, parser, quiet_trainer
from torch.utils.data import DataLoader

from lightning_gpuorch.errors import ConfigurationError
from lightning_gpuorch.pytorch import GPUOrchStrategy


class Ending(Doubler):
    def __init__(self, options):
        super().__init__()
        self.options, self.steps = options, 0

    def on_predict_start(self):
        self.at("start")

    def predict_step(self, batch, batch_idx):
        time.sleep(0.02)
        self.steps += 1
        if self.options.cause == "memory" and (batch[:, 0] == 41).any():
            raise torch.OutOfMemoryError("out of memory on purpose")
        if self.steps == 6:
            self.at("middle")
        return super().predict_step(batch, batch_idx)

    def on_predict_end(self):
        self.at("end")

    def at(self, moment):
        """The moment has come; once in a run, on the last rank, unless a signal comes from outside."""
        options = self.options
        first = os.environ.get("_GPUORCH_GENERATION") == "0"
        if moment != options.moment or not first:
            return
        Path(f"reached-{self.global_rank}").touch()
        if options.cause == "signal":
            time.sleep(1.0)
        if self.global_rank != options.devices - 1:
            return
        if options.cause == "directory vanishes":
            os.rename(options.output, "elsewhere")
        if options.cause == "configuration":
            raise ConfigurationError("this cannot work")
        if options.cause == "exception":
            raise ValueError("a label is unknown")
        if options.cause == "terminate":
            os.kill(os.getpid(), signal.SIGTERM)
        if options.cause == "kill":
            os.kill(os.getpid(), signal.SIGKILL)


def main():
    options = parser()
    options.add_argument("--cause", default="")
    options.add_argument("--moment", default="")
    options = options.parse_args()
    strategy = GPUOrchStrategy(
        output_dir=options.output, tensor_parallel_size=options.tp, parallelize_fn=lambda module, mesh: module,
        chunk_size=2,
    )  # fmt: skip
    trainer = quiet_trainer(strategy, options.devices)
    loader = DataLoader(Rows(160), batch_size=4)
    model = Ending(options)
    trainer.predict(model, loader)
    if options.moment == "others ended":
        Path(f"pid-{trainer.global_rank}").write_text(str(os.getpid()))
        if trainer.global_rank == options.devices - 1:
            wait_for_the_end_of([trainer.global_rank - 1])
        model.at("others ended")
        Path(f"through-{trainer.global_rank}").touch()


def wait_for_the_end_of(ranks):
    """Wait until the processes of ranks are gone, in the first life of this one."""
    deadline = time.monotonic() + 60
    for rank in ranks if os.environ.get("_GPUORCH_GENERATION") == "0" else ():
        path = Path(f"pid-{rank}")
        while not (path.exists() and path.read_text()) or Path(f"/proc/{path.read_text()}").exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)


if __name__ == "__main__":
    main()
