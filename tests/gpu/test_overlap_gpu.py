"""Copies that overlap with steps, the budget of a job, and dynamic batches on a real device."""

from __future__ import annotations

import gc
import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from lightning_gpuorch.callbacks import OOMBatchHalving
from lightning_gpuorch.devices.memory import BufferPool, ResourceAllocator
from lightning_gpuorch.devices.memory.transfer import Transfers
from lightning_gpuorch.errors import MissingPredictionsError
from lightning_gpuorch.pytorch import GPUOrchStrategy
from lightning_gpuorch.worker import session

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore:.*LeafSpec.*"),
]
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

DEVICE = torch.device("cuda", 0)
MIB = 2**20


@pytest.fixture(autouse=True)
def whole_device() -> Iterator[None]:
    yield
    session.leave()
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(1.0, DEVICE)


@pytest.fixture
def pool() -> BufferPool:
    return BufferPool(lambda size: torch.empty(size, dtype=torch.uint8, pin_memory=True))


def busy() -> torch.Tensor:
    """Work that takes the device some tens of milliseconds at least; returns at once."""
    matrix = torch.ones(4096, 4096, device=DEVICE)
    for _ in range(20):
        matrix = matrix @ matrix * 1e-4
    return matrix


def test_a_batch_arrives_whole_while_the_device_is_busy(pool: BufferPool) -> None:
    transfers = Transfers(DEVICE, pool)
    batches = [
        {"x": torch.full((64, 1024), float(i)), "names": ["a"], "t": (torch.arange(i + 1), torch.tensor(i))}
        for i in range(40)
    ]
    sums = []
    for batch in batches:
        busy()
        moved = transfers.to_device(batch)
        assert moved["x"].device == DEVICE
        assert moved["names"] == ["a"]
        sums.append((moved["x"].mean(), moved["t"][0].sum(), moved["t"][1]))
        del moved
    for i, (mean, total, number) in enumerate(sums):
        assert (float(mean), int(total), int(number)) == (i, i * (i + 1) // 2, i)
    assert pool.hit_rate > 0.5


def test_what_is_no_plain_host_tensor_is_left_or_moved_plainly(pool: BufferPool) -> None:
    class Own:
        def to(self, device: Any) -> Any:
            raise AssertionError("the loop moves it")

    transfers = Transfers(DEVICE, pool)
    there, own = torch.ones(2, device=DEVICE), Own()
    strided = torch.arange(12.0).reshape(3, 4).t()
    batch = transfers.to_device([there, own, strided, torch.empty(0, 3), torch.ones(3).pin_memory()])
    assert batch[0] is there
    assert batch[1] is own
    assert torch.equal(batch[2].cpu(), strided)
    assert batch[3].shape == (0, 3)
    assert batch[4].device == DEVICE


def test_an_output_is_picked_up_later_and_is_what_was_computed(pool: BufferPool) -> None:
    transfers = Transfers(DEVICE, pool)
    static = torch.zeros(1000, device=DEVICE)  # as a captured graph would reuse it
    copies = []
    for i in range(20):
        busy()
        static.fill_(i)
        began = torch.cuda.Event()
        copies.append(transfers.to_host({"out": static, "array": np.full(3, i), "empty": static[:0], "text": "x"}))
        began.record()
    assert not began.query(), "the host did not wait for the device"
    for i, copy in enumerate(copies):
        output = copy.result()
        assert output["out"].tolist() == [i] * 1000
        assert not output["out"].is_pinned()
        assert output["array"].tolist() == [i] * 3
        assert output["empty"].shape == (0,)
    assert transfers.to_host(static).result().tolist() == [19] * 1000
    assert pool.hit_rate > 0


class Model(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Parameter(torch.randn(100, 256, generator=torch.Generator().manual_seed(0)))
        self.shapes: list[tuple[int, int]] = []
        self.peaks: list[int] = []

    def predict_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        self.shapes.append(tuple(batch.shape))
        mask = (batch > 0).unsqueeze(-1)
        wide = (self.table[batch] * mask).repeat(1, 1, 16)  # 16 KiB per token
        return wide.sum(1)[:, :256] / mask.sum(1)

    def on_predict_batch_end(self, *arguments: Any) -> None:
        self.peaks.append(torch.cuda.max_memory_allocated(DEVICE))


def collate(samples: list[torch.Tensor]) -> torch.Tensor:
    return torch.nn.utils.rnn.pad_sequence(samples, batch_first=True)


def loader(count: int) -> DataLoader[Any]:
    """Samples so alike that nothing but memory keeps them from being computed all at once."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(180, 200, (count,), generator=generator).tolist()
    samples = [torch.randint(1, 100, (length,), generator=generator) for length in lengths]
    return DataLoader(samples, batch_size=16, collate_fn=collate)  # type: ignore[arg-type]


def predict(model: Model, data: DataLoader[Any], strategy: Any, **options: Any) -> list[torch.Tensor]:
    trainer = pl.Trainer(
        strategy=strategy,
        devices=1,
        accelerator="gpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        **options,
    )
    return list(trainer.predict(model, data))


def test_the_strategy_enforces_the_budget(tmp_path: Path) -> None:
    fraction = 2048 * MIB / torch.cuda.get_device_properties(DEVICE).total_memory

    class TooLarge(Model):
        def predict_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
            torch.empty(4096 * MIB, dtype=torch.uint8, device=DEVICE)
            return super().predict_step(batch, batch_idx)

    with pytest.raises(MissingPredictionsError) as caught:
        predict(TooLarge(), loader(8), GPUOrchStrategy(output_dir=tmp_path, memory_fraction=fraction))
    assert list(caught.value.indices) == list(range(8))


HOG = """
import sys, torch
free, _ = torch.cuda.mem_get_info()
taken = torch.empty(free - int(sys.argv[1]), dtype=torch.uint8, device="cuda")
torch.cuda.synchronize()
print("ready", flush=True)
sys.stdin.read()
"""


def test_another_process_takes_memory_in_the_middle_of_a_run(tmp_path: Path) -> None:
    class Robbed(Model):
        hog: subprocess.Popen[str] | None = None

        def predict_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
            if len(batch) >= 16 and self.hog is None:
                torch.cuda.empty_cache()
                command = [sys.executable, "-c", HOG, str(4096 * MIB)]
                self.hog = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
                assert self.hog.stdout is not None
                assert self.hog.stdout.readline().strip() == "ready"
            return super().predict_step(batch, batch_idx)

    data = loader(12_000)
    expected = predict(Model(), data, "auto")
    torch.cuda.empty_cache()
    model, halving = Robbed(), OOMBatchHalving()
    try:
        strategy = GPUOrchStrategy(output_dir=tmp_path, enable_dynamic_batching=True)
        got = predict(model, data, strategy, callbacks=[halving])
    finally:
        if model.hog is not None:
            model.hog.communicate(timeout=60)
    print(f"{model.shapes=} {model.peaks=} {halving.num_ooms=}")
    for mine, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, theirs.cpu())
    assert 1 <= halving.num_ooms <= 4
    peaks_since = model.peaks[model.shapes.index(max(model.shapes)) :]  # from the batch that did not fit on
    assert max(peaks_since) > 0.9 * 4096 * MIB


@pytest.mark.parametrize("callbacks", [[], [OOMBatchHalving()]], ids=["by itself", "with the callback"])
def test_dynamic_batches_fill_the_budget_and_give_the_loaders_results(tmp_path: Path, callbacks: list[Any]) -> None:
    data = loader(6000)
    expected = predict(Model(), data, "auto")
    fraction = 1024 * MIB / torch.cuda.get_device_properties(DEVICE).total_memory
    model = Model()
    strategy = GPUOrchStrategy(output_dir=tmp_path, memory_fraction=fraction, enable_dynamic_batching=True)
    got = predict(model, data, strategy, callbacks=callbacks)
    assert len(got) == len(expected)
    for mine, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, theirs.cpu())
    budget = ResourceAllocator(DEVICE, fraction).budget_bytes
    print(f"{model.shapes=} {model.peaks=} {budget=}")
    assert 0.9 * budget <= max(model.peaks) <= budget, (max(model.peaks), budget)
