"""An existing ddp pipeline with the durable writer added."""

import os
import signal

from common import Doubler, Rows, parser, quiet_trainer, write_result
from torch.utils.data import DataLoader

from lightning_gpuorch import read_predictions
from lightning_gpuorch.callbacks import DurablePredictionWriter


class Dying(Doubler):
    def __init__(self, die):
        super().__init__()
        self.die = die

    def predict_step(self, batch, batch_idx):
        if self.die and self.trainer.global_rank == 1 and batch_idx == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().predict_step(batch, batch_idx)


def main():
    options = parser()
    options.add_argument("--die", action="store_true")
    options = options.parse_args()
    writer = DurablePredictionWriter(
        options.output, batches_per_part=2, completion_timeout_seconds=5 if options.die else 60
    )
    trainer = quiet_trainer("ddp", options.devices, callbacks=[writer])
    trainer.predict(Dying(options.die), DataLoader(Rows(37), batch_size=4), return_predictions=False)
    if trainer.is_global_zero:
        found = read_predictions(options.output)
        write_result(options, {"values": [float(v) for b in found for v in b[:, 0]], "batches": len(found)})


if __name__ == "__main__":
    main()
