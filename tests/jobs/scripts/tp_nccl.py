"""One model shared by two GPUs, or with ``--accelerator cpu`` by two processes."""

import torch
from common import parser, write_result
from lightning.fabric import Fabric
from torch.utils.data import DataLoader
from tp_strategies import Model

import lightning_gpuorch


def main():
    options = parser()
    options.add_argument("--accelerator", default="cuda")
    options = options.parse_args()
    data = torch.randn(24, 6, 32, generator=torch.Generator().manual_seed(1))
    strategy = lightning_gpuorch.GPUOrchStrategy(tensor_parallel_size=2, example_input=data[:2], plan_cache="off")
    fabric = Fabric(strategy=strategy, devices=2, accelerator=options.accelerator)
    fabric.launch()
    module = Model().blocks
    with torch.no_grad():
        expected = module(data)
    orchestrator = lightning_gpuorch.MultiGPUOrchestrator(fabric=fabric)
    model = orchestrator.load_distributed_model(module)
    for _ in orchestrator.predict(model, DataLoader(data, batch_size=4)):
        pass
    got = torch.cat(list(orchestrator.predictions))
    if fabric.is_global_zero:
        size = strategy.runtime.world.topology.tensor_parallel_size
        write_result(options, {"difference": float((got - expected).abs().max()), "size": size})


if __name__ == "__main__":
    main()
