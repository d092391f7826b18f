"""Tensor parallelism through the strategies: the degree from the budget, weights read by part, against whole models."""

import os
from pathlib import Path

import lightning.pytorch as pl
import torch
from common import parser, quiet_trainer, write_result
from lightning.fabric import Fabric
from safetensors.torch import save_file
from torch.utils.data import DataLoader
from tp_auto import Block

import lightning_gpuorch
from lightning_gpuorch.devices.memory import model_bytes, total_memory_bytes
from lightning_gpuorch.parallel.tensor_parallel import applied_plan, empty_parameters
from lightning_gpuorch.pytorch import GPUOrchStrategy

CPU = torch.device("cpu")


class Model(pl.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = torch.nn.Sequential(Block(), Block())

    def predict_step(self, batch, batch_idx):
        return self.blocks(batch)


class Empty(pl.LightningModule):
    """The same, built on meta when the ranks stand."""

    def configure_model(self):
        with empty_parameters():
            self.blocks = torch.nn.Sequential(Block(), Block())

    predict_step = Model.predict_step


def main():
    options = parser()
    options.add_argument("--budget", type=float, default=0.7, help="memory of a device, in whole models")
    options = options.parse_args()
    data = torch.randn(24, 6, 32, generator=torch.Generator().manual_seed(1))
    loader = DataLoader(data, batch_size=4)
    whole = Model()
    with torch.no_grad():
        expected = whole.blocks(data)
    fraction = options.budget * model_bytes(whole).total / total_memory_bytes(CPU)
    result = {}

    def record(name, predictions, model, world):
        plan, rank = applied_plan(model)
        result[name] = {
            "difference": float((torch.cat(list(predictions)) - expected).abs().max()),
            "size": world.topology.tensor_parallel_size,
            "bytes": sum(value.numel() * 4 for value in model.parameters()),
            "planned": plan.bytes_on(rank),
        }

    # 1. The Trainer, whole weights on each rank; the first batch says what the model is called with.
    strategy = GPUOrchStrategy(memory_fraction=fraction)
    trainer = quiet_trainer(strategy, options.devices)
    record("trainer", trainer.predict(whole, loader), whole, strategy.runtime.world)

    folder = Path(os.environ["CHECKPOINTS"])
    if trainer.is_global_zero:
        source = Model()
        save_file(source.blocks.state_dict(), folder / "model.safetensors")
        torch.save(
            {"state_dict": source.state_dict(), "pytorch-lightning_version": pl.__version__}, folder / "model.ckpt"
        )
    trainer.strategy.barrier()

    # 2. The Trainer, on meta until a checkpoint is read: Lightning's own, and safetensors without the module's prefix.
    for name, path in (("ckpt", folder / "model.ckpt"), ("safetensors", folder / "model.safetensors")):
        strategy = GPUOrchStrategy(memory_fraction=fraction)
        trainer = quiet_trainer(strategy, options.devices)
        model = Empty()
        record(name, trainer.predict(model, loader, ckpt_path=str(path)), model, strategy.runtime.world)

    # 3. Fabric, on meta, three ways to the weights.
    strategy = lightning_gpuorch.GPUOrchStrategy(memory_fraction=fraction, example_input=data[:2])
    fabric = Fabric(strategy=strategy, devices=options.devices, accelerator="cpu")
    fabric.launch()
    for way in ("load_distributed_model", "load_raw", "load"):
        with fabric.init_module(empty_init=True):
            module = torch.nn.Sequential(Block(), Block())
        orchestrator = lightning_gpuorch.MultiGPUOrchestrator(fabric=fabric)
        if way == "load_distributed_model":
            wrapped = orchestrator.load_distributed_model(folder / "model.safetensors", module)
        else:
            wrapped = fabric.setup_module(module)
            if way == "load_raw":
                fabric.load_raw(folder / "model.safetensors", wrapped)
            else:
                if fabric.is_global_zero:
                    torch.save({"model": Model().blocks.state_dict(), "step": 3}, folder / "fabric.pt")
                fabric.barrier()
                result["rest"] = fabric.load(folder / "fabric.pt", {"model": wrapped})
        for _ in orchestrator.predict(wrapped, loader):
            pass
        record(way, orchestrator.predictions, module, strategy.runtime.world)

    # 4. A bare module; the dataloader says what it is called with.
    strategy.model_setup.example_input = None
    module = Model().blocks
    for _ in orchestrator.predict(module, loader):
        pass
    record("bare", orchestrator.predictions, module, strategy.runtime.world)

    # 5. A user's own plan: right, and of another model.
    plans = {"right": applied_plan(whole)[0], "wrong": applied_plan(module)[0]}
    for name, plan in plans.items():
        strategy = GPUOrchStrategy(tensor_parallel_plan=plan.to_dict(), example_input=data[:2])
        trainer = quiet_trainer(strategy, options.devices)
        model = Model()
        try:
            record(name, trainer.predict(model, loader), model, strategy.runtime.world)
        except lightning_gpuorch.errors.TensorParallelError as error:
            result[name] = str(error)
    if trainer.is_global_zero:
        write_result(options, result)


if __name__ == "__main__":
    main()
