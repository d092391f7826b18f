"""TP without a plan by hand: under the Trainer and under Fabric, against the whole model."""

import lightning.pytorch as pl
import torch
from common import accelerator, parser, quiet_trainer, write_result
from lightning.fabric import Fabric
from torch import nn
from torch.utils.data import DataLoader

import lightning_gpuorch
from lightning_gpuorch.pytorch import GPUOrchStrategy


class Block(nn.Module):
    """Attention with its head count written into view(), and a gated MLP."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)
        self.gate, self.up, self.down = nn.Linear(32, 64), nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x):
        q, k, v = (t.view(x.shape[0], x.shape[1], 4, 8).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape[0], x.shape[1], 32)
        x = x + self.out(mixed)
        return x + self.down(torch.nn.functional.silu(self.gate(x)) * self.up(x))


class Model(pl.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.Sequential(Block(), Block())

    def predict_step(self, batch, batch_idx):
        return self.blocks(batch)


def main():
    options = parser().parse_args()
    data = torch.randn(24, 6, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = Model().blocks(data)
    result = {}
    strategy = GPUOrchStrategy(tensor_parallel_size=options.tp, example_input=data[:2])
    trainer = quiet_trainer(strategy, options.devices)
    model = Model()
    got = torch.cat(list(trainer.predict(model, DataLoader(data, batch_size=4))))
    result["trainer"] = float((got - expected).abs().max())
    result["local_rows"] = model.blocks[0].up.weight.shape[0]

    strategy = lightning_gpuorch.GPUOrchStrategy(tensor_parallel_size=options.tp, example_input=data[:2])
    fabric = Fabric(strategy=strategy, devices=options.devices, accelerator=accelerator("Fabric"))
    fabric.launch()
    orchestrator = lightning_gpuorch.MultiGPUOrchestrator(fabric=fabric)
    orchestrator.initialize()
    module = orchestrator.load_distributed_model(Model().blocks)
    for _ in orchestrator.predict(module, DataLoader(data, batch_size=4)):
        pass
    result["fabric"] = float((torch.cat(list(orchestrator.predictions)) - expected).abs().max())
    if fabric.is_global_zero:
        write_result(options, result)


if __name__ == "__main__":
    main()
