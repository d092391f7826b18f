"""Parquet parts: other tools read them, they are read back as they were, and every damaged bit is noticed."""

from __future__ import annotations

import collections
import dataclasses
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lightning_gpuorch import read_predictions
from lightning_gpuorch.errors import CorruptPartError, JobMismatchError, UnsupportedPredictionError
from lightning_gpuorch.predictions import LoaderLayout, Manifest, PartStore, StoredBatch
from lightning_gpuorch.predictions.storage.carried import WithColumns
from lightning_gpuorch.predictions.storage.journal import loader_directory
from lightning_gpuorch.predictions.storage.manifest import open_or_create
from lightning_gpuorch.predictions.storage.resume import set_right

pq = pytest.importorskip("pyarrow.parquet")

Pair = collections.namedtuple("Pair", ["mean", "name"])


@dataclasses.dataclass
class Found:
    boxes: torch.Tensor
    labels: list[str]


OUTPUTS: dict[str, Callable[[int], Any]] = {
    "tensor": lambda n: torch.randn(n, 3),
    "numbers": lambda n: torch.arange(n) * 2**40,
    "images": lambda n: torch.randint(0, 255, (n, 2, 3, 4), dtype=torch.uint8),
    "dict": lambda n: {
        "emb": torch.randn(n, 2).bfloat16(),
        "text": [f"ü{i}" for i in range(n)],
        "task": "ner",
        "t": None,
    },
    "half": lambda n: (torch.randn(n, 1).half(), torch.rand(n) > 0.5),
    "complex": lambda n: {"a": torch.randn(n, 2, dtype=torch.complex64), "b": np.ones(n, np.complex128)},
    "namedtuple": lambda n: Pair(torch.full((n,), float("nan")), np.array([f"u{i}" for i in range(n)])),
    "dataclass": lambda n: Found(torch.randn(n, 4), ["cat"] * n),
    "ragged": lambda n: [torch.randn(i, 2) for i in range(n)],
    "dicts": lambda n: [{"label": "a", "score": 0.1 * i, "box": torch.ones(4) * i} for i in range(n)],
    "lists": lambda n: [[1] * i for i in range(n)],
    "with nothing": lambda n: [None, *["x"] * (n - 1)],
    "bytes": lambda n: [bytes([i]) for i in range(n)],
    "numpy": lambda n: {"big": np.zeros((n, 2), ">f4"), "half": np.ones(n, np.float16), "x[0].y": np.arange(n)},
    "loss": lambda n: {"logits": torch.randn(n, 2), "loss": torch.tensor(1.5)},
    "empty": lambda n: torch.zeros(n, 0),
    "none": lambda n: None,
    "one number": lambda n: 2.5,
}


def same(one: Any, other: Any) -> bool:
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        return (
            one.dtype == other.dtype and torch.equal(one.nan_to_num(7), other.nan_to_num(7))
            if one.is_floating_point()
            else (one.dtype == other.dtype and torch.equal(one, other))
        )
    if isinstance(one, np.ndarray):
        return one.dtype == other.dtype and np.array_equal(one, other)
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return same(vars(one), vars(other)) if dataclasses.is_dataclass(one) else bool(one == other)


def filled(directory: Path, make: Callable[[int], Any]) -> tuple[PartStore, list[StoredBatch]]:
    store = PartStore(directory / "dataloader_0", output_format="parquet")
    batches = [StoredBatch(0, range(10, 14), 4, make(4)), StoredBatch(4, [7, 3, 9], 3, make(3), [4, 6, 7])]
    assert store.commit(0, batches, {"replica": 1})
    return store, batches


@pytest.mark.parametrize("kind", OUTPUTS)
def test_predictions_come_back_as_they_were_and_others_read_their_rows(tmp_path: Path, kind: str) -> None:
    store, batches = filled(tmp_path, OUTPUTS[kind])
    assert not store.commit(0, batches, {}), "the first writer has won"
    for _ in range(2):
        part = store.read(0)
        for given_one, back in zip(batches, part.batches, strict=True):
            assert same(given_one.output, back.output), (given_one.output, back.output)
    assert part.metadata == {"replica": 1}
    assert list(store.verify()) == [(0, None)]
    table = pq.read_table(store.path(0))
    assert table["index"].to_pylist() == [10, 11, 12, 13, 7, 3, 9]
    assert table["row"].to_pylist() == [0, 1, 2, 3, 4, 6, 7]
    for tool, count in readers(store.path(0)).items():
        assert count == 7, tool


def readers(path: Path) -> dict[str, int]:
    """Rows that each tool reads."""
    import pandas as pd

    found = {"pandas": len(pd.read_parquet(path))}
    try:
        import polars as pl

        found["polars"] = len(pl.read_parquet(path))
    except ImportError:
        pass
    try:
        import duckdb

        found["duckdb"] = duckdb.sql(f"select count(*) from (select * from '{path}')").fetchall()[0][0]
    except ImportError:
        pass
    return found


def test_columns_have_the_names_and_types_of_the_structure(tmp_path: Path) -> None:
    store, _ = filled(tmp_path, lambda n: {"boxes": (torch.zeros(n, 4), torch.zeros(n)), "index": ["a"] * n})
    schema = pq.read_schema(store.path(0))
    assert schema.names == ["index", "row", "boxes.0", "boxes.1", "prediction.index", "error_type", "error_message"]
    assert str(schema.field("boxes.0").type) == "fixed_size_list<element: float>[4]"
    assert str(schema.field("boxes.1").type) == "float"


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda n: torch.zeros(2 * n, 3), "has 8 entries for 4 samples"),
        (lambda n: [object()] * n, "make no column"),
        (lambda n: [1, "x", *[1] * (n - 2)], "make no column"),
        (lambda n: {"a": {"b.c": torch.zeros(n)}, "a.b.c": torch.zeros(n)}, "two parts"),
        (lambda n: [1, 2, 3] * 20, "no entry for each sample"),
        (lambda n: torch.zeros(n, n, dtype=torch.float32 if n == 4 else torch.int64), "different types"),
        (lambda n: [2**70] * n, "makes no column"),
    ],
)
def test_what_makes_no_rows_is_refused_by_name(tmp_path: Path, make: Callable[[int], Any], named: str) -> None:
    with pytest.raises(UnsupportedPredictionError, match=named):
        filled(tmp_path, make)
    assert not list(tmp_path.glob("dataloader_0/part*"))


def test_columns_of_different_lengths_are_lists(tmp_path: Path) -> None:
    store, batches = filled(tmp_path, lambda n: torch.randn(n, n))
    assert all(same(a.output, b.output) for a, b in zip(batches, store.read(0).batches, strict=True))
    assert [len(row) for row in pq.read_table(store.path(0))["prediction"].to_pylist()] == [4, 4, 4, 4, 3, 3, 3]


def test_every_flipped_bit_is_noticed(tmp_path: Path) -> None:
    store, _ = filled(tmp_path, OUTPUTS["dict"])
    path, rng = store.path(0), random.Random(5)
    whole, layout = path.read_bytes(), LoaderLayout(unit="scattered", num_units=None, batch_size=1, chunk_size=1)
    for bit in [0, 33, 8 * len(whole) - 1, *(rng.randrange(8 * len(whole)) for _ in range(150))]:
        raw = bytearray(whole)
        raw[bit // 8] ^= 1 << bit % 8
        path.write_bytes(raw)
        with pytest.raises(CorruptPartError, match=r"part-000000000\.parquet"):
            store.read(0)
        ((error,), _, _) = set_right(store, layout, "all")
        assert "part-000000000.parquet" in str(error)
        assert not store.done()
    path.write_bytes(whole[:-1])
    ((error,), _, _) = set_right(store, layout, "headers")
    assert "bytes in place of" in str(error)


def test_a_job_goes_on_in_its_format_only_and_is_read_in_order(tmp_path: Path) -> None:
    def manifest(output_format: Any, batch_size: int = 4) -> Manifest:
        layout = LoaderLayout(unit="sample", num_units=10, batch_size=batch_size, chunk_size=4)
        return Manifest(loaders=[layout], output_format=output_format)

    open_or_create(tmp_path, manifest("parquet"))
    with pytest.raises(JobMismatchError, match="output_format: parquet there, gpq here"):
        open_or_create(tmp_path, manifest("gpq"))
    store = PartStore(loader_directory(tmp_path, 0), output_format="parquet")
    for chunk in (0, 2, 1):
        units = range(4 * chunk, min(10, 4 * chunk + 4))
        output = WithColumns({"x": torch.arange(units.start, units.stop)}, {"id": [f"id{u}" for u in units]})
        store.commit(chunk, [StoredBatch(units.start, units, len(units), output)], {})
    open_or_create(tmp_path, manifest("parquet", batch_size=3))
    found = read_predictions(tmp_path)
    assert [batch["x"].tolist() for batch in found] == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9]]
    assert found.verify() == 10
    rows = pq.ParquetDataset(sorted(store.directory.glob("part-*"))).read()
    assert rows["id"].to_pylist() == [f"id{i}" for i in range(10)]
