"""Callbacks that collect outputs, change them, and Lightning's progress bar, on several ranks."""

import lightning.pytorch as pl
import torch
from common import Doubler, Rows, parser, quiet_trainer, write_result
from lightning.pytorch.callbacks import TQDMProgressBar
from torch.utils.data import DataLoader

from lightning_gpuorch.pytorch import GPUOrchStrategy


class Collector(pl.Callback):
    """As forecasting projects have it: collects in the batch hook, puts together at the end of the epoch."""

    def __init__(self):
        self.kept, self.seen, self.result = [], [], None

    def on_predict_batch_end(self, trainer, module, outputs, batch, batch_idx, dataloader_idx=0):
        assert torch.equal(outputs, batch * 2)
        self.kept.append(outputs)
        self.seen.append([dataloader_idx, batch_idx])

    def on_predict_epoch_end(self, trainer, module):
        self.result = torch.cat(self.kept)[:, 0].tolist() if self.kept else []
        self.kept = []


class Bar(TQDMProgressBar):
    last = None

    def on_predict_batch_end(self, trainer, module, outputs, batch, batch_idx, dataloader_idx=0):
        super().on_predict_batch_end(trainer, module, outputs, batch, batch_idx, dataloader_idx)
        self.last = [self.predict_progress_bar.n, self.predict_progress_bar.total]


def main():
    options = parser()
    options.add_argument("--replay", action="store_true")
    options.add_argument("--loaders", type=int, default=1)
    options.add_argument("--dynamic", action="store_true")
    options = options.parse_args()
    collector, bar = Collector(), Bar(refresh_rate=1)
    dynamic = {"enable_dynamic_batching": True, "length_fn": lambda sample: 1} if options.dynamic else {}
    strategy = GPUOrchStrategy(replay_outputs=options.replay, output_dir=options.output, **dynamic)
    trainer = quiet_trainer(strategy, options.devices, callbacks=[collector, bar], enable_progress_bar=True)
    loaders = [DataLoader(Rows(23 + 4 * n), batch_size=4) for n in range(options.loaders)]
    trainer.predict(Doubler(), loaders if options.loaders > 1 else loaders[0], return_predictions=False)
    samplers = [type(loader.sampler).__name__ for loader in loaders]
    assert samplers == ["SequentialSampler"] * options.loaders
    results = trainer.strategy.runtime.world.collectives.all_gather_object([collector.result, collector.seen])
    if trainer.is_global_zero:
        write_result(options, {"ranks": results, "bar": bar.last})


if __name__ == "__main__":
    main()
