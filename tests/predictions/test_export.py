"""Predictions for other tools: JSON lines and Parquet, whole or absent, in flat memory."""

from __future__ import annotations

import gc
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
import torch

from lightning_gpuorch.errors import (
    ConfigurationError,
    MissingPredictionsError,
    PredictionStorageError,
    UnsupportedPredictionError,
)
from lightning_gpuorch.predictions import LoaderLayout, Manifest, PartStore, StoredBatch, export_predictions
from lightning_gpuorch.predictions.storage.journal import loader_directory
from lightning_gpuorch.predictions.storage.manifest import open_or_create


class Pair(NamedTuple):
    left: torch.Tensor
    right: list[str]


def make_job(directory: Path, output_of: Callable[[list[int]], Any], num_units: int = 10, loaders: int = 1) -> Path:
    """A job with batches of 4 in chunks of 4; its order is the dataset's, backwards."""
    layout = LoaderLayout(unit="sample", num_units=num_units, batch_size=4, chunk_size=4)
    open_or_create(directory, Manifest(loaders=[layout] * loaders))
    for loader in range(loaders):
        store = PartStore(loader_directory(directory, loader), fsync=False)
        for chunk in range(layout.num_chunks):
            units = layout.chunk_range(chunk)
            indices = [num_units - 1 - unit for unit in units]
            store.commit(chunk, [StoredBatch(units.start, indices, None, output_of(indices))], {})
    return directory


def nested(indices: list[int]) -> dict[str, Any]:
    numbers = torch.tensor(indices)
    return {
        "label": [f"é{i}" for i in indices],
        "boxes": numbers[:, None, None] * torch.ones(2, 3),
        "half": numbers.bfloat16(),
        "pair": Pair(numbers[:, None].double(), [str(i) for i in indices]),
        "mask": np.array([i % 2 == 0 for i in indices]),
        "z": torch.complex(numbers.double(), numbers.double()),
    }


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_json_lines(tmp_path: Path) -> None:
    directory = make_job(tmp_path / "job", nested)
    assert export_predictions(directory, tmp_path / "out.jsonl") == 10
    rows = lines(tmp_path / "out.jsonl")
    assert [row["index"] for row in rows] == list(range(9, -1, -1))
    assert rows[0]["prediction"] == {
        "label": "é9",
        "boxes": [[9.0] * 3] * 2,
        "half": 9.0,
        "pair": [[9.0], "9"],
        "mask": False,
        "z": [9.0, 9.0],
    }


def test_parquet(tmp_path: Path) -> None:
    directory = make_job(tmp_path / "job", nested)
    assert export_predictions(directory, tmp_path / "out.parquet") == 10
    table = pq.read_table(tmp_path / "out.parquet")
    assert table.column_names == ["index"] + [
        f"prediction.{name}" for name in ("label", "boxes", "half", "pair.left", "pair.right", "mask", "z")
    ]
    row = table.to_pylist()[1]
    assert row["index"] == 8
    assert row["prediction.boxes"] == [[8.0] * 3] * 2
    assert row["prediction.half"] == 8.0
    assert row["prediction.pair.left"] == [8.0]
    assert row["prediction.pair.right"] == "8"
    assert row["prediction.mask"] is True
    assert row["prediction.z"] == [8.0, 8.0]
    assert str(table.schema.field("prediction.boxes").type.value_type.value_type) == "float"


def test_ragged_tensors(tmp_path: Path) -> None:
    def ragged(indices: list[int]) -> list[torch.Tensor]:
        return [torch.arange(2 * i).reshape(i, 2) for i in indices]

    directory = make_job(tmp_path / "job", ragged)
    export_predictions(directory, tmp_path / "out.parquet")
    table = pq.read_table(tmp_path / "out.parquet").to_pylist()
    assert table[-3]["prediction"] == [[0, 1], [2, 3]]
    assert table[-1]["prediction"] == []


def test_several_dataloaders(tmp_path: Path) -> None:
    directory = make_job(tmp_path / "job", lambda indices: torch.tensor(indices), loaders=2)
    for name in ("out.jsonl", "out.parquet"):
        export_predictions(directory, tmp_path / name)
    rows = lines(tmp_path / "out.jsonl")
    assert rows == pq.read_table(tmp_path / "out.parquet").to_pylist()
    assert [row["dataloader"] for row in rows] == [0] * 10 + [1] * 10


def test_what_is_not_finite(tmp_path: Path) -> None:
    values = [math.nan, math.inf, -math.inf, -0.0] * 3

    directory = make_job(tmp_path / "job", lambda indices: torch.tensor([values[i] for i in indices]), num_units=4)
    export_predictions(directory, tmp_path / "out.jsonl")
    assert [row["prediction"] for row in lines(tmp_path / "out.jsonl")] == [-0.0, "-Infinity", "Infinity", "NaN"]


def test_an_empty_job(tmp_path: Path) -> None:
    directory = make_job(tmp_path / "job", nested, num_units=0)
    assert export_predictions(directory, tmp_path / "out.jsonl") == 0
    assert export_predictions(directory, tmp_path / "out.parquet") == 0
    assert (tmp_path / "out.jsonl").read_text() == ""
    assert pq.read_table(tmp_path / "out.parquet").column_names == ["index"]


def test_an_incomplete_job(tmp_path: Path) -> None:
    directory = make_job(tmp_path / "job", lambda indices: torch.tensor(indices))
    PartStore(loader_directory(directory, 0)).discard(1)
    with pytest.raises(MissingPredictionsError):
        export_predictions(directory, tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()
    assert export_predictions(directory, tmp_path / "out.jsonl", allow_missing=True) == 6
    assert [row["index"] for row in lines(tmp_path / "out.jsonl")] == [9, 8, 7, 6, 1, 0]


def test_predictions_without_a_common_structure(tmp_path: Path) -> None:
    def changing(indices: list[int]) -> Any:
        return {"a" if 0 in indices else "b": torch.tensor(indices)}

    directory = make_job(tmp_path / "job", changing)
    (tmp_path / "out.parquet").write_text("what was there before")
    with pytest.raises(UnsupportedPredictionError, match=r"prediction\.a.*Export to jsonl"):
        export_predictions(directory, tmp_path / "out.parquet")
    assert (tmp_path / "out.parquet").read_text() == "what was there before"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["job", "out.parquet"]
    assert export_predictions(directory, tmp_path / "out.jsonl") == 10


def test_two_leaves_of_one_name(tmp_path: Path) -> None:
    def clash(indices: list[int]) -> Any:
        return {"a.b": torch.tensor(indices), "a": {"b": torch.tensor(indices)}}

    directory = make_job(tmp_path / "job", clash)
    with pytest.raises(UnsupportedPredictionError, match="same name"):
        export_predictions(directory, tmp_path / "out.parquet")


def test_unknown_formats_and_places(tmp_path: Path) -> None:
    directory = make_job(tmp_path / "job", nested)
    with pytest.raises(ConfigurationError, match=r"\['csv', 'hf', 'jsonl', 'npz', 'parquet'\]"):
        export_predictions(directory, tmp_path / "out.xlsx")
    export_predictions(directory, tmp_path / "out.xlsx", "jsonl")
    assert len(lines(tmp_path / "out.xlsx")) == 10
    for name in ("jsonl", "parquet"):
        with pytest.raises(PredictionStorageError, match="nowhere"):
            export_predictions(directory, tmp_path / "nowhere" / "out", name)


def test_parquet_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = make_job(tmp_path / "job", nested)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ConfigurationError, match=r"pip install 'lightning_gpuorch\[parquet\]'"):
        export_predictions(directory, tmp_path / "out.parquet")


@pytest.mark.parametrize("name", ["out.parquet", "out.jsonl"])
def test_memory_stays_flat(tmp_path: Path, name: str) -> None:
    width = 2**16 if name == "out.parquet" else 2**12
    directory = make_job(tmp_path / "job", lambda indices: torch.zeros(len(indices), width), num_units=1200)
    warm = make_job(tmp_path / "warm", lambda indices: torch.zeros(len(indices), width), num_units=150)
    export_predictions(warm, tmp_path / f"warm-{name}")  # the working set, which does not depend on the number of rows
    gc.collect()
    process = psutil.Process()
    before = process.memory_info().rss
    assert export_predictions(directory, tmp_path / name) == 1200
    growth = process.memory_info().rss - before
    # All at once would be 300 MiB of tensors, and 160 MiB of Python floats for JSON.
    assert growth < 80 * 2**20, f"grew by {growth / 2**20:.0f} MiB"


def flat(indices: list[int]) -> dict[str, Any]:
    return {
        "label": [f'é{i}, "x"' for i in indices],
        "emb": torch.tensor(indices)[:, None] * torch.ones(2),
        "n": indices,
    }


def test_csv_has_a_cell_per_leaf(tmp_path: Path) -> None:
    import pandas as pd

    directory = make_job(tmp_path / "job", flat)
    assert export_predictions(directory, tmp_path / "out.csv") == 10
    frame = pd.read_csv(tmp_path / "out.csv")
    assert list(frame) == ["index", "prediction.label", "prediction.emb", "prediction.n"]
    assert frame["index"].tolist() == frame["prediction.n"].tolist() == list(range(9, -1, -1))
    assert frame["prediction.label"][0] == 'é9, "x"'
    assert json.loads(frame["prediction.emb"][0]) == [9.0, 9.0]


def test_npz_has_an_array_per_leaf_and_needs_no_pickle(tmp_path: Path) -> None:
    assert export_predictions(make_job(tmp_path / "job", flat), tmp_path / "out.npz") == 10
    with np.load(tmp_path / "out.npz", allow_pickle=False) as found:
        assert found["prediction.emb"].tolist() == [[float(i)] * 2 for i in range(9, -1, -1)]
        assert found["prediction.label"][-1] == 'é0, "x"'
    ragged = make_job(tmp_path / "ragged", lambda indices: [torch.ones(i) for i in indices])
    with pytest.raises(UnsupportedPredictionError, match="differs in shape"):
        export_predictions(ragged, tmp_path / "ragged.npz")
    assert not list(tmp_path.glob("*ragged.npz*"))


def test_a_hugging_face_dataset_is_a_directory(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    directory = make_job(tmp_path / "job", flat)
    assert export_predictions(directory, tmp_path / "out.hf") == 10
    found = datasets.load_from_disk(str(tmp_path / "out.hf"))
    assert found["index"][:] == list(range(9, -1, -1))
    assert found[0]["prediction.emb"] == [9.0, 9.0]
    with pytest.raises(ConfigurationError, match="exists"):
        export_predictions(directory, tmp_path / "out.hf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["job", "out.hf"]


@pytest.mark.parametrize("name", ["out.xlsx", "out", "out.parquet.gz"])
def test_an_unknown_ending_is_refused_by_the_command_too(tmp_path: Path, name: str) -> None:
    from click.testing import CliRunner

    from lightning_gpuorch.cli.predictions import predictions

    directory = make_job(tmp_path / "job", flat)
    outcome = CliRunner().invoke(predictions, ["export", str(directory), str(tmp_path / name)])
    assert outcome.exit_code == 1
    assert "name one of ['csv', 'hf', 'jsonl', 'npz', 'parquet']" in outcome.output
    assert not (tmp_path / name).exists()
