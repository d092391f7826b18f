"""What a notebook does: an interactive process, cells one after another, several devices by forking."""

import sys

sys.ps1 = ">>> "  # what IPython sets, before Lightning looks

import torch
from common import Doubler, Rows, parser, quiet_trainer, write_result
from lightning.fabric import Fabric
from torch.utils.data import DataLoader


def main():
    options = parser().parse_args()
    result = {}
    for strategy in ("gpuorch", "gpuorch_notebook"):
        trainer = quiet_trainer(strategy, options.devices)
        for turn in range(2):
            got = trainer.predict(Doubler(), DataLoader(Rows(21), batch_size=4))
            values = [float(v) for batch in got for v in batch[:, 0]]
            result[f"{strategy}-{turn}"] = values == [2.0 * i for i in range(21)]

    def cell(fabric, offset):
        total = fabric.all_reduce(torch.tensor(float(fabric.global_rank + offset)), reduce_op="sum")
        return float(total), fabric.world_size

    fabric = Fabric(strategy="gpuorch_notebook", devices=options.devices, accelerator="cpu")
    result["fabric"] = fabric.launch(cell, 10)
    write_result(options, result)


if __name__ == "__main__":
    main()
