"""Dynamic batching through the strategy and the orchestrator, in one process: kinds of samples, loaders and outputs."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

from lightning_gpuorch import MultiGPUOrchestrator
from lightning_gpuorch.callbacks import OOMBatchHalving
from lightning_gpuorch.predictions import PartStore
from lightning_gpuorch.predictions.loading import window_bounds
from lightning_gpuorch.predictions.samples import CannotMergeError
from lightning_gpuorch.pytorch import GPUOrchStrategy
from lightning_gpuorch.testing.memory import CPUMemoryBudget
from lightning_gpuorch.worker import session

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore:.*LeafSpec.*")
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

TEXTS = [" ".join(f"w{(i * 7 + k) % 50}" for k in range(1 + (i * 13) % 29 + 40 * (i % 11 == 0))) for i in range(300)]
WIDTH = 16


def encode(text: str) -> torch.Tensor:
    return torch.tensor([1 + int(word[1:]) for word in text.split()])


def collate(texts: list[str]) -> torch.Tensor:
    return torch.nn.utils.rnn.pad_sequence([encode(text) for text in texts], batch_first=True)


class Stream(IterableDataset[str]):
    def __iter__(self) -> Any:
        return iter(TEXTS)


class Model(pl.LightningModule):
    def __init__(self, output: Callable[[torch.Tensor, torch.Tensor], Any] | None = None):
        super().__init__()
        self.table = torch.nn.Parameter(torch.randn(64, WIDTH, generator=torch.Generator().manual_seed(0)))
        self.output = output or (lambda pooled, ids: {"pooled": pooled, "first": ids[:, 0].tolist()})
        self.shapes: list[tuple[int, ...]] = []

    def predict_step(self, batch: torch.Tensor, batch_idx: int, dataloader_idx: int = 0) -> Any:
        self.shapes.append(tuple(batch.shape))
        mask = (batch > 0).unsqueeze(-1).float()
        return self.output((self.table[batch] * mask).sum(1) / mask.sum(1), batch)

    def forward(self, batch: torch.Tensor) -> Any:
        return self.predict_step(batch, 0)


def trainer(strategy: Any, **options: Any) -> pl.Trainer:
    return pl.Trainer(
        strategy=strategy, devices=1, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, **options,
    )  # fmt: skip


def dynamic(directory: Path, **options: Any) -> GPUOrchStrategy:
    session.leave()
    settings = {"chunk_size": 2, "max_batch_tokens": 200, "enable_dynamic_batching": True, **options}
    return GPUOrchStrategy(output_dir=directory, log_level="WARNING", **settings)


def assert_same(got: Any, expected: list[Any]) -> None:
    assert len(got) == len(expected)
    for mine, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(mine["pooled"], theirs["pooled"])
        assert mine["first"] == theirs["first"]


@pytest.mark.parametrize(
    "loader",
    [
        lambda: DataLoader(TEXTS, batch_size=8, collate_fn=collate),  # type: ignore[arg-type]
        lambda: DataLoader(TEXTS, batch_size=8, collate_fn=collate, num_workers=2),  # type: ignore[arg-type]
        lambda: DataLoader(TEXTS, batch_size=7, collate_fn=collate, sampler=range(299, 3, -1)),  # type: ignore[arg-type]
        lambda: DataLoader(Stream(), batch_size=8, collate_fn=collate),
        lambda: DataLoader(Stream(), batch_size=8, collate_fn=collate, num_workers=1),
    ],
    ids=["map", "workers", "sampler", "stream", "stream with a worker"],
)
def test_results_are_the_loaders_own_batches(loader: Callable[[], Any], tmp_path: Path) -> None:
    expected = trainer("auto").predict(Model(), loader())
    model = Model()
    assert_same(trainer(dynamic(tmp_path)).predict(model, loader()), expected)
    padded, real = sum(b * s for b, s in model.shapes), sum(len(text.split()) for text in TEXTS)
    assert padded < 1.25 * real
    assert max(b * s for b, s in model.shapes) <= 220
    assert sorted(PartStore(tmp_path / "dataloader_0").done()) == list(range(-(-len(expected) // 2)))


@pytest.mark.parametrize("enable_dynamic_batching", [True, False])
def test_a_part_behind_the_end_of_a_stream_stands_for_no_other(tmp_path: Path, enable_dynamic_batching: bool) -> None:
    loader = DataLoader(Stream(), batch_size=8, collate_fn=collate)
    options = {"enable_dynamic_batching": enable_dynamic_batching}
    expected = trainer(dynamic(tmp_path, **options)).predict(Model(), loader)
    store = PartStore(tmp_path / "dataloader_0")
    last = len(expected) // 2 - 1
    store.path(last).unlink()
    store.commit(last + 1, [], {})  # as earlier versions did, when the last chunk was full
    assert_same(trainer(dynamic(tmp_path, **options)).predict(Model(), loader), list(expected))


def test_several_loaders_and_a_limit(tmp_path: Path) -> None:
    loaders = [DataLoader(TEXTS[:n], batch_size=8, collate_fn=collate) for n in (90, 41)]  # type: ignore[arg-type]
    expected = trainer("auto", limit_predict_batches=7).predict(Model(), loaders)
    got = trainer(dynamic(tmp_path), limit_predict_batches=7).predict(Model(), loaders)
    for mine, theirs in zip(got, expected, strict=True):
        assert_same(mine, theirs)


def test_the_orchestrator_takes_a_length_fn(tmp_path: Path) -> None:
    class Sample:
        def __init__(self, text: str):
            self.text = text

    loader: Any = DataLoader(
        [Sample(text) for text in TEXTS],  # type: ignore[arg-type]
        batch_size=8,
        collate_fn=lambda samples: collate([sample.text for sample in samples]),
    )
    expected = trainer("auto").predict(Model(), loader)
    session.leave()
    orchestrator = MultiGPUOrchestrator(
        output_dir=tmp_path,
        enable_dynamic_batching=True,
        max_batch_tokens=200,
        length_fn=lambda sample: len(sample.text.split()),
    )
    orchestrator.initialize(rank=0, world_size=1)
    sizes = {len(output["first"]) for output in orchestrator.predict(Model().eval(), loader, step=None)}
    assert len(sizes) > 3
    assert_same(orchestrator.predictions, expected)
    orchestrator.cleanup()


@pytest.mark.parametrize("callbacks", [[], [OOMBatchHalving()]], ids=["alone", "with OOMBatchHalving"])
def test_batches_grow_into_the_memory_and_out_of_memory_is_learned_from(
    callbacks: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(window_bounds, "SAMPLES_PER_WINDOW", 128)  # what a window holds counts as memory here
    loader: Any = DataLoader(TEXTS * 4, batch_size=8, collate_fn=collate)  # type: ignore[arg-type]
    expected = trainer("auto").predict(Model(), loader)
    model = Model()
    strategy = dynamic(tmp_path, max_batch_tokens="auto", chunk_size=8)
    with CPUMemoryBudget(80_000, resident=model) as budget:
        model.output = lambda pooled, ids: (
            _shrink_once(budget, len(model.shapes))
            or {
                "pooled": pooled,
                "first": ids[:, 0].tolist(),
            }
        )
        got = trainer(strategy, callbacks=callbacks).predict(model, loader)
        assert_same(got, expected)
    # One batch that does not fit may be halved several times; what window and writer hold counts as memory, too.
    assert 1 <= budget.num_ooms <= 12
    assert max(rows for rows, _ in model.shapes) > 8
    assert model.shapes[0][0] == 1, "the first batch is a careful one"


def _shrink_once(budget: CPUMemoryBudget, steps: int) -> None:
    if steps == 30:
        budget.limit_bytes = int(0.75 * budget.limit_bytes)


def test_outputs_padded_to_their_batch_are_refused(tmp_path: Path) -> None:
    loader: Any = DataLoader(TEXTS, batch_size=8, collate_fn=collate)  # type: ignore[arg-type]
    with pytest.raises(CannotMergeError, match="list with one tensor per sample.*enable_dynamic_batching=False"):
        trainer(dynamic(tmp_path)).predict(Model(lambda pooled, ids: ids), loader)
    got = trainer(dynamic(tmp_path)).predict(Model(lambda pooled, ids: [row[row > 0] for row in ids]), loader)
    assert [row.tolist() for batch in got for row in batch] == [encode(text).tolist() for text in TEXTS]
