"""Fabric: collectives over the job, shares of a plain loop, and the orchestrator's durable predict."""

import torch
from common import Rows, parser, write_result
from lightning.fabric import Fabric
from torch import nn
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils.data import DataLoader

import lightning_gpuorch


class Seen:
    """A callback, called by keyword."""

    def __init__(self):
        self.hooks = []

    def on_predict_start(self, trainer, pl_module):
        self.hooks.append("start")

    def on_predict_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
        self.hooks.append("batch")

    def on_predict_end(self, trainer, pl_module):
        self.hooks.append("end")


def parallelize(module, mesh):
    return parallelize_module(module, mesh["tensor_parallel"], {"0": ColwiseParallel(), "2": RowwiseParallel()})


def main():
    options = parser().parse_args()
    strategy = lightning_gpuorch.GPUOrchStrategy(
        tensor_parallel_size=options.tp, parallelize_fn=parallelize if options.tp > 1 else None
    )
    seen = Seen()
    fabric = Fabric(strategy=strategy, devices=options.devices, accelerator="cpu", callbacks=[seen])
    fabric.launch()
    rank, size = fabric.global_rank, fabric.world_size
    result = {"world": size}
    fabric.barrier()
    result["broadcast"] = fabric.broadcast(f"from {rank}", src=size - 1)
    result["gathered"] = fabric.all_gather(torch.tensor([rank])).flatten().tolist()
    replica = rank // options.tp
    result["sum"] = float(fabric.all_reduce(torch.tensor(float(replica)), reduce_op="sum"))
    result["mean"] = float(fabric.all_reduce(torch.tensor(float(replica))))

    loader = fabric.setup_dataloaders(DataLoader(Rows(23), batch_size=4))
    mine = [float(v) for batch in loader for v in batch[:, 0]]
    shares = fabric.strategy.runtime.world.collectives.all_gather_object(mine)[:: options.tp]
    result["shares"] = sorted(v for share in shares for v in share) == [float(i) for i in range(23)]

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 4))
    with torch.no_grad():
        expected = model(torch.stack([Rows(23)[i] for i in range(23)]))
    orchestrator = lightning_gpuorch.MultiGPUOrchestrator(fabric=fabric, output_dir=options.output)
    orchestrator.initialize()
    model = orchestrator.load_distributed_model(model)
    batches = sum(1 for _ in orchestrator.predict(model, DataLoader(Rows(23), batch_size=4)))
    got = torch.cat(list(orchestrator.predictions))
    result["difference"] = float((got - expected).abs().max())
    result["hooks"] = seen.hooks == ["start", *["batch"] * batches, "end"]
    result["batches"] = sum(fabric.strategy.runtime.world.collectives.all_gather_object(batches)[:: options.tp])
    result["samples_done"] = orchestrator.progress()["samples_done"]
    if options.tp > 1:
        try:
            orchestrator.run_inference_step(torch.full((2, 2), float(rank)))
        except lightning_gpuorch.errors.InputMismatchError as error:
            result["mismatch"] = str(error)
    orchestrator.cleanup()
    if fabric.is_global_zero:
        write_result(options, result)


if __name__ == "__main__":
    main()
