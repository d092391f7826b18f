"""A Fabric script that leaves everything to the launcher."""

import torch
from common import Rows, parser, write_result
from lightning.fabric import Fabric
from torch.utils.data import DataLoader

from lightning_gpuorch import MultiGPUOrchestrator


def main():
    options = parser().parse_args()
    fabric = Fabric(strategy="gpuorch")
    fabric.launch()
    orchestrator = MultiGPUOrchestrator(fabric=fabric)
    orchestrator.initialize()
    torch.manual_seed(0)
    model = orchestrator.load_distributed_model(torch.nn.Linear(2, 3))
    for _ in orchestrator.predict(model, DataLoader(Rows(40), batch_size=4)):
        pass
    ranks = fabric.all_gather(torch.tensor(fabric.global_rank)).tolist()
    if fabric.is_global_zero:
        complete = sum(len(batch) for batch in orchestrator.predictions) == 40
        write_result(options, {"world": fabric.world_size, "complete": complete, "ranks": ranks})


if __name__ == "__main__":
    main()
