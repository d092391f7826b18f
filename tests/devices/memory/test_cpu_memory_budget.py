"""The stand-in for a full device counts as a device does."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import nn

from lightning_gpuorch.testing.memory import CPUMemoryBudget


def test_it_counts_storages_and_not_views() -> None:
    with CPUMemoryBudget(10_000) as budget:
        tensor = torch.zeros(1000)
        assert budget.used_bytes == 4096
        view = tensor[10:20].view(2, 5)
        assert budget.used_bytes == 4096
        tensor.add_(1)
        del tensor
        assert budget.used_bytes == 4096
        del view
        assert budget.used_bytes == 0
        assert budget.peak_bytes == 4096
        budget.reset_peak()
        assert budget.peak_bytes == 0


def test_the_tensor_that_is_too_much_is_gone_before_the_error() -> None:
    with CPUMemoryBudget(10_000) as budget:
        kept = torch.zeros(2000)
        with pytest.raises(torch.OutOfMemoryError, match="tried to allocate 4096 bytes"):
            torch.zeros(1000)
        assert budget.used_bytes == 8192
        assert budget.num_ooms == 1
        del kept
        assert torch.zeros(2000).sum() == 0


def test_weights_count_from_the_start_and_tensors_from_outside_do_not() -> None:
    model, outside = nn.Linear(64, 64), torch.zeros(100_000)
    budget = CPUMemoryBudget(20_000, resident=model)
    weights = budget.used_bytes
    assert weights == 64 * 64 * 4 + 512
    with budget:
        part = outside[:64]
        assert budget.used_bytes == weights
        del part
    with pytest.raises(torch.OutOfMemoryError), budget:
        model(outside.view(-1, 10)[:64, :1].expand(-1, 64).contiguous())
    gc.collect()
    assert budget.used_bytes == weights


def test_fake_tensors_cost_nothing() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with CPUMemoryBudget(1000) as budget, FakeTensorMode():
        torch.zeros(10**6)
    assert budget.used_bytes == 0
