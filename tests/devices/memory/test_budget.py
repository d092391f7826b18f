"""What the machine allows, what a model needs, and the refusal of one that does not fit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from lightning_gpuorch.devices.memory import (
    check_model_fits,
    memory_budget_bytes,
    memory_summary,
    model_bytes,
    total_memory_bytes,
)
from lightning_gpuorch.devices.memory.budget import _cgroup_limits, format_bytes
from lightning_gpuorch.errors import ConfigurationError, ModelDoesNotFitError


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(100, 8)
        self.head = nn.Linear(8, 100, bias=False)
        self.head.weight = self.embed.weight
        self.alias = nn.Parameter(self.embed.weight.detach())  # another parameter on the same memory
        self.register_buffer("table", torch.zeros(10, dtype=torch.float64))


def test_tied_weights_count_once() -> None:
    measured = model_bytes(Tied())
    assert measured.parameters == 3200
    assert measured.buffers == 80
    assert measured.total == 3280


def test_meta_counts_by_shape() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(1000, 1000, bias=False), nn.Linear(1000, 1000, bias=False))
    assert model_bytes(model).total == 8_000_000
    assert model_bytes(model.half()).total == 4_000_000


def test_a_dtensor_counts_by_its_shard() -> None:
    import torch.distributed as dist
    from torch.distributed.tensor import Shard, distribute_tensor
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
        model = nn.Linear(8, 8, bias=False)
        model.weight = nn.Parameter(distribute_tensor(model.weight.detach(), mesh, [Shard(0)]))
        assert model_bytes(model).total == 128
    finally:
        dist.destroy_process_group()


def test_a_model_that_fits_passes() -> None:
    check_model_fits(nn.Linear(10, 10, bias=False), 445)


def test_the_refusal_has_the_arithmetic_and_the_degree_that_fits() -> None:
    model = nn.Linear(1024, 1024, bias=False)  # 4 MiB
    with pytest.raises(
        ModelDoesNotFitError, match=r"Linear needs 4\.00 MiB.*tensor_parallel_size=5 would do"
    ) as caught:
        check_model_fits(model, 2**20)
    assert caught.value.needed_bytes == 4 * 2**20
    assert caught.value.budget_bytes == 2**20
    assert caught.value.fitting_tensor_parallel_size == 5
    with pytest.raises(ModelDoesNotFitError, match=r"2\.00 MiB on each of 2 ranks"):
        check_model_fits(model, 2**20, tensor_parallel_size=2)
    check_model_fits(model, 2**20, tensor_parallel_size=5)


def test_no_degree_fits_without_a_budget() -> None:
    with pytest.raises(ModelDoesNotFitError, match="no tensor_parallel_size"):
        check_model_fits(nn.Linear(4, 4), 0)


def test_the_cpu_has_what_the_machine_and_the_groups_allow() -> None:
    total = total_memory_bytes(torch.device("cpu"))
    assert 2**20 < total < 2**50
    assert memory_budget_bytes(torch.device("cpu"), 0.25) == int(total * 0.25)
    with pytest.raises(ConfigurationError):
        memory_budget_bytes(torch.device("cpu"), -0.1)


@pytest.mark.parametrize(
    ("line", "files", "expected"),
    [
        ("0::/a/b", {"a/memory.max": "5000\n", "a/b/memory.max": "max\n", "memory.max": "9000"}, 5000),
        ("0::/", {"memory.max": "7000"}, 7000),
        ("0::/host/path/not/here", {"memory.max": "7000"}, 7000),
        ("3:cpu,memory:/x", {"memory/x/memory.limit_in_bytes": "6000"}, 6000),
        ("3:cpu:/x", {"memory/x/memory.limit_in_bytes": "6000"}, 2**62),
    ],
)
def test_control_groups(tmp_path: Path, line: str, files: dict[str, str], expected: int) -> None:
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(line + "\n")
    for name, text in files.items():
        file = tmp_path / "sys/fs/cgroup" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    assert min(_cgroup_limits(tmp_path)) == expected


def test_no_control_groups(tmp_path: Path) -> None:
    assert min(_cgroup_limits(tmp_path)) == 2**62


def test_texts_for_people() -> None:
    assert format_bytes(512) == "512 B"
    assert format_bytes(3 * 2**29) == "1.50 GiB"
    assert format_bytes(5 * 2**40) == "5120.00 GiB"
    assert "this process uses" in memory_summary(torch.device("cpu"))
