"""TP x DP under the Trainer, with torch's DTensor API, also inside inference_mode, against the unsharded model."""

import lightning.pytorch as pl
import torch
from common import parser, quiet_trainer, write_result
from torch import nn
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils.data import DataLoader

from lightning_gpuorch.pytorch import GPUOrchStrategy


class FeedForward(pl.LightningModule):
    def __init__(self, inference):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(8, 32), nn.Linear(32, 8)
        self.inference = inference
        self.seen = []

    def predict_step(self, batch, batch_idx):
        self.seen.append(batch_idx)
        with torch.inference_mode(self.inference):
            return self.down(torch.relu(self.up(batch)))


def parallelize(module, mesh):
    assert mesh.mesh_dim_names == ("data_parallel", "tensor_parallel")
    return parallelize_module(module, mesh["tensor_parallel"], {"up": ColwiseParallel(), "down": RowwiseParallel()})


def main():
    options = parser().parse_args()
    data = torch.randn(90, 8, generator=torch.Generator().manual_seed(1))
    result = {"world": None, "differences": [], "same_batches": True}
    for inference in (False, True):
        model = FeedForward(inference)
        with torch.no_grad():
            expected = model.down(torch.relu(model.up(data)))
        strategy = GPUOrchStrategy(tensor_parallel_size=options.tp, parallelize_fn=parallelize)
        trainer = quiet_trainer(strategy, options.devices)
        got = torch.cat(list(trainer.predict(model, DataLoader(data, batch_size=4))))
        result["differences"].append(float((got - expected).abs().max()))
        seen = strategy.runtime.world.collectives.all_gather_object(model.seen)
        groups = [seen[i : i + options.tp] for i in range(0, len(seen), options.tp)]
        result["same_batches"] &= all(ranks.count(ranks[0]) == len(ranks) for ranks in groups)
        result["each_once"] = sorted(b for ranks in groups for b in ranks[0]) == list(range(23))
        result["world"] = trainer.world_size
        result["torch_world"] = torch.distributed.get_world_size()
    if trainer.is_global_zero:
        write_result(options, result)


if __name__ == "__main__":
    main()
