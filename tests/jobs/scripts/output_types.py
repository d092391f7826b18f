"""trainer.predict over batches and outputs of every kind, against a single-device stock Trainer."""

import collections
import dataclasses

import lightning.pytorch as pl
import numpy as np
import torch
from common import parser, quiet_trainer, write_result
from torch.utils.data import DataLoader
from transformers import BatchEncoding


@dataclasses.dataclass
class Boxes:
    corners: torch.Tensor
    names: list


Point = collections.namedtuple("Point", ["x", "y"])

KINDS = {
    "tensor": lambda x: x * 2,
    "dict": lambda x: {"a": x, "b": x.sum(1)},
    "tuple": lambda x: (x, x.sum(1)),
    "strings": lambda x: [f"row {int(v)}" for v in x[:, 0]],
    "dataclass": lambda x: Boxes(x, [int(v) for v in x[:, 0]]),
    "nested": lambda x: {"p": Point(x, [{"deep": x[:, :1]}, None, 3.5]), "n": x.cpu().numpy().astype(np.float16)},
    "encoding": lambda x: BatchEncoding({"input_ids": x.long(), "attention_mask": torch.ones_like(x)}),
    "bfloat16": lambda x: x.to(torch.bfloat16),
}


class Model(pl.LightningModule):
    def __init__(self, kind):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))
        self.kind = kind

    def predict_step(self, batch, batch_idx):
        rows = batch["x"] if isinstance(batch, (dict, BatchEncoding)) else batch
        return KINDS[self.kind](rows)


def collate_dict(rows):
    return {"x": torch.stack(rows)}


def equal(a, b):
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and np.array_equal(a, b)
    if dataclasses.is_dataclass(a):
        return all(equal(getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(a))
    if isinstance(a, (dict, BatchEncoding)):
        return list(a) == list(b) and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def main():
    options = parser().parse_args()
    rows = list(torch.arange(94, dtype=torch.float32).reshape(47, 2))
    verdict = {}
    for kind in KINDS:
        loader = DataLoader(rows, batch_size=4, collate_fn=collate_dict if kind == "encoding" else None)
        model = Model(kind)
        ours = quiet_trainer("gpuorch", options.devices)
        got = ours.predict(model, loader)
        stock = [model.predict_step(batch, 0) for batch in loader]
        everywhere = ours.strategy.reduce_boolean_decision(len(got) == len(stock) and all(map(equal, got, stock)))
        verdict[kind] = bool(everywhere)
    if ours.is_global_zero:
        write_result(options, verdict)


if __name__ == "__main__":
    main()
