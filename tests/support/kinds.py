"""Batches and outputs of every kind a predict step may see, for tests of halving."""

from __future__ import annotations

import collections
import dataclasses
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BatchEncoding, PreTrainedTokenizerFast
from transformers.modeling_outputs import SequenceClassifierOutput

core = Tokenizer(models.WordLevel({"[PAD]": 0, "[UNK]": 1, **{f"w{i}": i + 2 for i in range(50)}}, unk_token="[UNK]"))
core.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="[PAD]", unk_token="[UNK]")


@dataclasses.dataclass
class Record:
    x: torch.Tensor
    name: list[Any]
    meta: str = "m"


Named = collections.namedtuple("Named", "x names")


class Graph:
    """A batch object of a library nobody knows."""

    def __init__(self, nodes: torch.Tensor):
        self.nodes = nodes


def rows(samples: list[int]) -> torch.Tensor:
    return torch.stack([torch.full((3,), float(i)) for i in samples])


COLLATE = {
    "tensor": rows,
    "dict": lambda s: {
        "x": rows(s),
        "nested": {"index": torch.tensor(s), "names": [f"s{i}" for i in s]},
        "scale": torch.tensor(2.0),
    },
    "tuple": lambda s: (rows(s), torch.tensor(s)),
    "list_of_tensors": lambda s: [rows(s), torch.tensor(s)],
    "two_alike": lambda s: [rows(s), rows(s) + 1],
    "list_of_str": lambda s: [f"sample {i}" for i in s],
    "encoding": lambda s: tokenizer(
        [" ".join(f"w{j % 50}" for j in range(i % 7 + 1)) for i in s], padding=True, return_tensors="pt"
    ),
    "dataclass": lambda s: Record(rows(s), [f"s{i}" for i in s]),
    "namedtuple": lambda s: Named(rows(s), [f"s{i}" for i in s]),
    "ragged": lambda s: [torch.arange(i % 5 + 1).float() for i in s],
    "list_of_dicts": lambda s: [{"img": torch.full((2, 2), float(i)), "id": i} for i in s],
    "object": lambda s: Graph(rows(s)),
}


def features(batch: Any) -> torch.Tensor:
    """A (samples, 3) tensor of any batch."""
    if isinstance(batch, torch.Tensor):
        return batch
    if isinstance(batch, BatchEncoding):
        return batch["input_ids"].float().sum(1, keepdim=True).expand(-1, 3).contiguous()
    if isinstance(batch, dict):
        return batch["x"] * batch["scale"]
    if isinstance(batch, (Record, Named)):
        return batch.x
    if isinstance(batch, Graph):
        return batch.nodes
    first = batch[0]
    if isinstance(first, str):
        return torch.tensor([[float(text.split()[1])] * 3 for text in batch])
    if isinstance(first, dict):
        return torch.stack([sample["img"].flatten()[:3] for sample in batch])
    if first.ndim == 1:
        return torch.stack([sample.sum().expand(3) for sample in batch])
    return first


OUTPUT = {
    "tensor": lambda f: f * 2,
    "dict": lambda f: {"y": f * 2, "s": f.sum(1), "names": [str(v) for v in f[:, 0].tolist()]},
    "list": lambda f: [float(v) for v in f[:, 0]],
    "list_of_dicts": lambda f: [{"label": int(v), "score": torch.tensor(float(v))} for v in f[:, 0]],
    "list_of_tensors": lambda f: [torch.arange(int(v) + 3) for v in f[:, 0]],
    "dataclass": lambda f: Record(f * 3, [int(v) for v in f[:, 0]]),
    "tuple": lambda f: (f * 2, f.sum(1)),
    "two_alike": lambda f: [f * 2, f + 1],
    "model_output": lambda f: SequenceClassifierOutput(logits=f * 2, hidden_states=(f, f + 1)),
    "numpy": lambda f: {"y": f.numpy() * 2, "version": "1"},
    "none": lambda f: None,
}


def equal(one: Any, other: Any) -> bool:
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, np.ndarray):
        return one.dtype == other.dtype and bool(np.array_equal(one, other))
    if hasattr(one, "keys"):
        return list(one.keys()) == list(other.keys()) and all(equal(one[key], other[key]) for key in one)
    if dataclasses.is_dataclass(one):
        return all(equal(getattr(one, f.name), getattr(other, f.name)) for f in dataclasses.fields(one))
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(equal, one, other))
    return bool(one == other)


class LimitedStep:
    """A step that runs out of memory with more than ``limit`` samples, and on samples of ``too_large`` alone."""

    def __init__(self, output: str, limit: int = 10**9, too_large: frozenset[float] = frozenset()):
        self.output, self.limit, self.too_large = output, limit, too_large
        self.calls: list[int] = []

    def __call__(self, batch: Any) -> Any:
        values = features(batch)
        self.calls.append(len(values))
        if len(values) > self.limit or self.too_large & set(values[:, 0].tolist()):
            raise torch.OutOfMemoryError("CUDA out of memory. (simulated)")
        return OUTPUT[self.output](values)
