"""A ddp pipeline in which one rank hangs, with HeartbeatMonitor added."""

import ctypes
import time

from common import Doubler, Rows, parser, quiet_trainer
from torch.utils.data import DataLoader

from lightning_gpuorch.callbacks import HeartbeatMonitor


class Hanging(Doubler):
    def __init__(self, kind):
        super().__init__()
        self.kind = kind

    def predict_step(self, batch, batch_idx):
        if self.trainer.global_rank == 1 and batch_idx == 3:
            self.hang()
        return super().predict_step(batch, batch_idx)

    def hang(self):
        while self.kind == "gil":
            ctypes.PyDLL(None).sleep(3600)
        while self.kind == "python":
            time.sleep(1)


def main():
    options = parser()
    options.add_argument("--kind", default="none")
    options = options.parse_args()
    monitor = HeartbeatMonitor(heartbeat_timeout_sec=3, step_timeout_sec=4)
    trainer = quiet_trainer("ddp", options.devices, callbacks=[monitor])
    trainer.predict(Hanging(options.kind), DataLoader(Rows(40), batch_size=4), return_predictions=False)
    trainer.strategy.barrier()


if __name__ == "__main__":
    main()
