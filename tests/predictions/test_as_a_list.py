"""What ``trainer.predict`` returns is what stock Lightning returns to whatever people do with it; lazy or in memory."""

# ruff: noqa: RUF005, RUF017, SIM300 - what people write, as they write it

from __future__ import annotations

import collections.abc
import copy
import functools
import heapq
import io
import itertools
import json
import operator
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning_utilities.core.apply_func import apply_to_collection
from torch.utils import _pytree
from torch.utils.data import DataLoader, IterableDataset, default_collate

from lightning_gpuorch import read_predictions
from lightning_gpuorch.predictions import Predictions
from lightning_gpuorch.pytorch import GPUOrchStrategy
from lightning_gpuorch.worker import session

KINDS: dict[str, Callable[[Any, int], Any]] = {
    "tensor": lambda batch, i: batch * 2,
    "int": lambda batch, i: i,
    "list": lambda batch, i: batch[:, 0].tolist(),
    "tuple": lambda batch, i: (batch, batch + 1),
    "dict": lambda batch, i: {"a": batch.tolist()},
    "text": lambda batch, i: f"batch {i}",
}


class Model(LightningModule):
    def __init__(self, kind: str = "tensor"):
        super().__init__()
        self.kind = kind

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        return KINDS[self.kind](batch, batch_idx)


def trainer(strategy: Any, directory: Path, *callbacks: Callback) -> Trainer:
    session.leave()
    return Trainer(
        accelerator="cpu", devices=1, strategy=strategy, default_root_dir=directory, callbacks=list(callbacks),
        logger=False, enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
    )  # fmt: skip


def loader() -> Any:
    return DataLoader(torch.arange(20.0).reshape(10, 2), batch_size=4)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str, str], Any]]:
    """Results by kind of output, and by where they come from: ``stock``, ``returned`` (in memory), ``read`` (lazy)."""
    root = tmp_path_factory.mktemp("results")

    @functools.cache
    def stock(kind: str) -> Any:
        return trainer("auto", root).predict(Model(kind), loader())

    @functools.cache
    def returned(kind: str) -> Any:
        return trainer(GPUOrchStrategy(output_dir=root / kind), root).predict(Model(kind), loader())

    def make(kind: str, origin: str) -> Any:
        if origin == "stock":
            return list(stock(kind))
        found = returned(kind)
        return found[:] if origin == "returned" else read_predictions(root / kind)

    yield make
    session.leave()


def saved(value: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file)


def after(change: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """What a change returns, and the list as it is then."""
    return lambda p: (change(p), list(p), len(p), p[:1], p[0])


def assigned(p: Any) -> Any:
    p[1:2] = [7, 8]
    del p[0]
    p += [3]
    return p


USES: list[tuple[str, str, Callable[[Any], Any]]] = [
    ("isinstance", "int", lambda p: (isinstance(p, list), isinstance(p, collections.abc.MutableSequence))),
    ("cat", "tensor", torch.cat),
    ("cat by name", "tensor", lambda p: torch.cat(tensors=p, dim=0)),
    ("stack", "tensor", lambda p: torch.stack(p[:2])),
    ("vstack", "tensor", torch.vstack),
    ("hstack", "tensor", lambda p: torch.hstack(p[:2])),
    ("row_stack", "tensor", lambda p: torch.dstack(p[:2])),
    ("concatenate", "tensor", torch.concatenate),
    ("pad_sequence", "tensor", torch.nn.utils.rnn.pad_sequence),
    ("block_diag", "tensor", lambda p: torch.block_diag(*p)),
    ("cat of parts", "tensor", lambda p: torch.cat([*p, p[0]])),
    ("zip", "tuple", lambda p: [torch.cat(x) for x in zip(*p, strict=True)]),
    ("torch.tensor", "int", torch.tensor),
    ("as_tensor", "int", torch.as_tensor),
    ("np.array", "int", np.array),
    ("np.concatenate", "list", np.concatenate),
    ("np.concatenate of tensors", "tensor", np.concatenate),
    ("np.stack", "tensor", lambda p: np.stack(p[:2])),
    (
        "==",
        "int",
        lambda p: (p == [0, 1, 2], p == [0], p != [0, 1, 2], [0, 1, 2] == p, p == (0, 1, 2), p < [1], [1] > p, p <= p),
    ),
    ("+", "int", lambda p: (p + [9], [9] + p, p + p, type(p + p) is list)),
    ("*", "int", lambda p: (p * 2, 2 * p, p * 0)),
    ("+ of no list", "int", lambda p: p + (1,)),
    ("* of no number", "int", lambda p: p * "x"),
    ("hash", "int", hash),
    ("sum of lists", "list", lambda p: sum(p, [])),
    ("sum", "int", sum),
    ("reduce", "list", lambda p: functools.reduce(operator.add, p)),
    ("chain", "list", lambda p: list(itertools.chain(*p))),
    ("json", "dict", json.dumps),
    ("json with indent", "list", lambda p: json.dumps({"p": p}, indent=1)),
    ("pickle", "int", lambda p: pickle.loads(pickle.dumps(p))),
    ("deepcopy", "dict", copy.deepcopy),
    ("copy", "int", copy.copy),
    (".copy", "int", lambda p: p.copy()),
    ("torch.save", "int", saved),
    ("torch.save in a dict", "tensor", lambda p: saved({"p": p})),
    ("apply_to_collection", "tensor", lambda p: apply_to_collection(p, torch.Tensor, lambda t: t + 1)),
    ("tree_map", "tensor", lambda p: _pytree.tree_map(lambda t: t + 1, p)),
    ("tree_leaves", "dict", _pytree.tree_leaves),
    ("default_collate", "int", default_collate),
    ("pd.DataFrame", "dict", lambda p: pd.DataFrame(p).to_dict()),
    ("pd.Series", "int", lambda p: pd.Series(p).tolist()),
    ("pa.array", "int", lambda p: pa.array(p).to_pylist()),
    ("pa.table", "list", lambda p: pa.table({"p": p}).to_pydict()),
    ("in", "int", lambda p: (1 in p, 7 in p)),
    ("index", "int", lambda p: (p.index(1), p.index(2, -1))),
    ("index of nothing", "int", lambda p: p.index(1, 2)),
    ("count", "int", lambda p: p.count(1)),
    ("reversed", "int", lambda p: list(reversed(p))),
    ("sorted", "int", lambda p: sorted(p, reverse=True)),
    ("unpacking", "int", lambda p: (lambda a, *rest: (a, rest))(*p)),
    ("slices", "int", lambda p: (p[1:], p[::-1], p[-1], p[5:])),
    ("out of range", "int", lambda p: p[3]),
    ("min and max", "int", lambda p: (min(p), max(p), bool(p), any(p))),
    ("join", "text", ", ".join),
    ("map", "text", lambda p: list(map(str.upper, p))),
    ("type of itself", "int", lambda p: type(p)(x + 1 for x in p)),
    ("extend another", "int", lambda p: (q := [5], q.extend(p), q)[-1]),
    ("into a slice", "int", lambda p: (q := [5, 6], operator.setitem(q, slice(1, 1), p), q)[-1]),
    ("+= another", "int", lambda p: operator.iadd([5], p)),
    ("repr", "int", repr),
    ("enumerate", "int", lambda p: dict(enumerate(p))),
    ("tuple and set", "int", lambda p: (tuple(p), set(p))),
    ("append", "int", after(lambda p: p.append(1))),
    ("extend", "int", after(lambda p: p.extend([1]))),
    ("insert", "int", after(lambda p: p.insert(0, 5))),
    ("pop", "int", after(lambda p: (p.pop(), p.pop(0)))),
    ("remove", "int", after(lambda p: p.remove(1))),
    ("clear", "int", lambda p: (p.clear(), p)),
    ("sort", "int", after(lambda p: p.sort(key=lambda x: -x))),
    ("reverse", "int", after(lambda p: p.reverse())),
    ("assignment", "int", after(assigned)),
    ("*=", "int", after(lambda p: operator.imul(p, 2))),
    ("heapify", "int", after(lambda p: (p.reverse(), heapq.heapify(p)))),
    ("slice of changed", "int", lambda p: (p.append(7), p[1:], p[-1])),
]


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Exception):
        return type(a) is type(b)
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return isinstance(b, np.ndarray) and a.dtype == b.dtype and np.array_equal(a, b)
    if isinstance(a, (list, tuple)):
        return isinstance(b, type(a)) and len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return type(a) is type(b) and list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    return type(a) is type(b) and bool(a == b)


def outcome(use: Callable[[Any], Any], value: Any) -> Any:
    try:
        return use(value)
    except Exception as error:  # noqa: BLE001 - what stock raises is right
        return error


@pytest.mark.parametrize("origin", ["returned", "read"])
@pytest.mark.parametrize(("name", "kind", "use"), USES, ids=[use[0] for use in USES])
def test_a_use_gives_what_it_gives_with_stock(
    made: Callable[[str, str], Any], name: str, kind: str, use: Callable[[Any], Any], origin: str
) -> None:
    expected, found = outcome(use, made(kind, "stock")), outcome(use, made(kind, origin))
    assert same(expected, found), (expected, found)


def test_iterating_reads_and_keeps_nothing(made: Callable[[str, str], Any]) -> None:
    found = made("tensor", "read")
    for _ in range(2):
        list(found), torch.cat(found), json.dumps(made("list", "read"))
    assert all("not read yet" in repr(item) for item in list.__iter__(found))
    assert found[0] is not found[0]


def test_code_that_reads_the_memory_of_a_lazy_list_is_told(made: Callable[[str, str], Any]) -> None:
    found = made("int", "read")
    with pytest.raises(pa.ArrowInvalid, match="UnreadPrediction"):
        pa.array([found])
    with pytest.raises(TypeError, match="UnreadPrediction"):
        heapq.heapify(found)
    with pytest.raises(TypeError, match="not read yet"):
        torch.cat(operator.concat([torch.ones(1)], made("tensor", "read")))
    assert pa.array([made("int", "returned")]).to_pylist() == [[0, 1, 2]]


def test_what_is_stored_is_told_whatever_was_changed(made: Callable[[str, str], Any]) -> None:
    found = made("tensor", "read")
    found.sort(key=lambda batch: -batch[0, 0])
    found.pop()
    assert list(found.indices) == list(range(10))
    assert [int(sample[0]) for sample in found.samples()] == list(range(0, 40, 4))
    assert isinstance(made("tensor", "returned")[1:], Predictions)
    assert list(made("tensor", "returned")[1:].indices) == list(range(4, 10))


def test_saved_results_are_plain_lists_in_a_process_without_this_package(
    made: Callable[[str, str], Any], tmp_path: Path
) -> None:
    path = tmp_path / "results.pickle"
    path.write_bytes(pickle.dumps(made("int", "read")))
    code = "import pickle, sys; p = pickle.load(open(sys.argv[1], 'rb')); print(type(p) is list, p, 'torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.split(maxsplit=1) == ["True", "[0, 1, 2] False\n"]


class Empty(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter(())


@pytest.mark.parametrize(
    "data",
    [
        lambda: DataLoader([]),
        lambda: DataLoader(Empty()),
        lambda: [DataLoader([]), loader()],
        lambda: [DataLoader([]), DataLoader([])],
        lambda: [loader(), loader()],
    ],
    ids=["no samples", "no stream", "one of two", "none of two", "two"],
)
@pytest.mark.filterwarnings("ignore:.*zero length:UserWarning", "ignore:Total length of .*:UserWarning")
def test_empty_and_several_dataloaders_give_what_stock_gives(data: Callable[[], Any], tmp_path: Path) -> None:
    expected = trainer("auto", tmp_path).predict(Model("int"), data())
    found = trainer("gpuorch", tmp_path).predict(Model("int"), data())
    assert same(expected, found), (expected, found)


class Looks(Callback):
    """Notes what the loop tells of its predictions."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def on_predict_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.seen.append(list(trainer.predict_loop.predictions))

    def on_predict_end(self, trainer: Any, pl_module: Any) -> None:
        self.seen.append(list(trainer.predict_loop.predictions))


@pytest.mark.parametrize("num_loaders", [1, 2])
@pytest.mark.parametrize("wanted", [True, False])
def test_the_loop_tells_of_its_predictions_as_in_stock(num_loaders: int, wanted: bool, tmp_path: Path) -> None:
    seen = []
    for strategy in ("auto", "gpuorch"):
        looks = Looks()
        runs = trainer(strategy, tmp_path, looks)
        data = loader() if num_loaders == 1 else [loader(), loader()]
        result = runs.predict(Model("int"), data, return_predictions=wanted)
        seen.append([*looks.seen, list(runs.predict_loop.predictions), result])
    if not wanted:
        # Stock has an entry for each dataloader there, and nothing in it.
        seen = [[[part for part in look or [] if part] for look in looks] for looks in seen]
    assert same(seen[0], seen[1]), seen


class WritesEpoch(BasePredictionWriter):
    def __init__(self) -> None:
        super().__init__("epoch")
        self.written: Any = None

    def write_on_epoch_end(self, trainer: Any, pl_module: Any, predictions: Any, batch_indices: Any) -> None:
        self.written = (list(predictions), list(batch_indices))


def test_a_writer_at_the_end_of_the_epoch_gets_what_stock_gives_it(tmp_path: Path) -> None:
    writers = [WritesEpoch(), WritesEpoch()]
    for strategy, writer in zip(("auto", "gpuorch"), writers, strict=True):
        assert trainer(strategy, tmp_path, writer).predict(Model("int"), loader()) == [0, 1, 2]
    assert same(writers[0].written, writers[1].written)
