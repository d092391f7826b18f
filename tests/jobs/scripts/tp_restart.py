"""A replica shares a model by a size decided late; then one of its ranks dies, or holds other weights than it should."""

import os
import signal

import torch
from common import parser, quiet_trainer, write_result
from torch.utils.data import DataLoader
from tp_strategies import CPU, Model

from lightning_gpuorch.devices.memory import model_bytes, total_memory_bytes
from lightning_gpuorch.pytorch import GPUOrchStrategy


class Mortal(Model):
    """Its second rank dies in its first step."""

    def predict_step(self, batch, batch_idx):
        world = self.trainer.strategy.runtime.world
        if world.topology.rank == 1 and world.generation == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().predict_step(batch, batch_idx)


class Damaged(Model):
    """Its second rank adds another bias than the first."""

    def on_predict_start(self):
        if self.trainer.global_rank == 1:
            with torch.no_grad():
                self.blocks[0].out.bias.add_(0.5)


def main():
    options = parser()
    options.add_argument("--damaged", action="store_true")
    options = options.parse_args()
    data = torch.randn(48, 6, 32, generator=torch.Generator().manual_seed(1))
    model = Damaged() if options.damaged else Mortal()
    with torch.no_grad():
        expected = model.blocks(data)
    fraction = 0.7 * model_bytes(model).total / total_memory_bytes(CPU)
    strategy = GPUOrchStrategy(memory_fraction=fraction, chunk_size=1, output_dir=options.output)
    trainer = quiet_trainer(strategy, options.devices)
    outputs = torch.cat(list(trainer.predict(model, DataLoader(data, batch_size=4))))
    topology = strategy.runtime.world.topology
    result = {
        "difference": float((outputs - expected).abs().max()),
        "layout": [topology.num_replicas, topology.tensor_parallel_size],
    }
    if trainer.is_global_zero:
        write_result(options, result)


if __name__ == "__main__":
    main()
