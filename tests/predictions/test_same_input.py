"""That all replicas read the same is checked: digests of batches, and who is compared with whom."""

from __future__ import annotations

import dataclasses
import os
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader

from lightning_gpuorch.control.input_ledger import InputLedger
from lightning_gpuorch.errors import InputMismatchError
from lightning_gpuorch.predictions import LoaderLayout, Manifest
from lightning_gpuorch.predictions.loading import world_of_one as world_of_one_module
from lightning_gpuorch.predictions.loading.describe import describe
from lightning_gpuorch.predictions.loading.shared_loader import SharedLoader
from lightning_gpuorch.predictions.loading.stream import END, Stream
from lightning_gpuorch.predictions.loading.world_of_one import hide_as_well, job_is_hidden, read_alone, world_of_one
from lightning_gpuorch.predictions.samples.tensors import digest
from lightning_gpuorch.predictions.storage.manifest import compare, load, open_or_create, record_mismatch

PAIRS = [
    (torch.arange(4), torch.arange(1, 5)),
    (torch.zeros(4), torch.zeros(2, 2)),
    (torch.zeros(4), torch.zeros(4, dtype=torch.float64)),
    (np.zeros(3), np.ones(3)),
    (["a", "b"], ["a", "c"]),
    (["ab"], ["a", "b"]),
    ({"text": "one"}, {"text": "two"}),
    ({"a": 1}, {"b": 1}),
    ((1, 2.0), (1, 2.5)),
    (None, 0),
    (b"a", "a"),
    (SimpleNamespace(x=torch.ones(2)), SimpleNamespace(x=torch.zeros(2))),
    (np.array([{"a": 1}], dtype=object), np.array([{"a": 2}], dtype=object)),
]


@pytest.mark.parametrize(("one", "other"), PAIRS)
@pytest.mark.parametrize("max_elements", [64, None])
def test_batches_that_differ_have_different_digests(one: Any, other: Any, max_elements: int | None) -> None:
    assert digest(one, max_elements) == digest(one, max_elements)
    assert digest(one, max_elements) != digest(other, max_elements)


def test_objects_that_refer_to_each_other_in_circles_have_a_digest() -> None:
    ring = [SimpleNamespace(value=value) for value in range(6)]
    for member in ring:
        member.others = ring
    assert digest(ring) == digest(ring)


@pytest.mark.parametrize(
    "value", [torch.zeros(2).to_sparse(), torch.zeros(2, dtype=torch.complex64).conj(), torch.zeros(()), torch.zeros(0)]
)
def test_unusual_tensors_have_a_digest(value: Any) -> None:
    assert digest(value) == digest(value)


def chunks_of(size: int) -> LoaderLayout:
    return LoaderLayout(unit="batch", num_units=None, batch_size=None, chunk_size=size)


def read(items: list[Any], chunk_size: int = 2) -> list[tuple[int, str]]:
    seen: list[tuple[int, str]] = []
    stream = Stream(
        lambda: (item for item in items),
        "batches",
        chunks_of(chunk_size),
        lambda chunk, text: seen.append((chunk, text)),
    )
    while stream.read() is not END:
        pass
    assert stream.read() is END
    return seen


def test_a_stream_tells_its_first_item_and_every_chunk_once() -> None:
    assert [chunk for chunk, _ in read([1, 2, 3, 4, 5])] == [-1, 0, 1, 2]
    assert [chunk for chunk, _ in read([1, 2])] == [-1, 0]
    assert read([]) == []
    before, after = dict(read([1, 2, 3, 4])), dict(read([1, 2, 3, 5]))
    assert [chunk for chunk in before if before[chunk] != after[chunk]] == [1]


def test_a_stream_that_goes_back_tells_again() -> None:
    seen: list[int] = []
    stream = Stream(
        lambda: (item for item in range(6)), "batches", chunks_of(2), lambda chunk, text: seen.append(chunk)
    )
    stream.seek(3)
    stream.seek(1)
    stream.seek(4)
    assert seen == [-1, 0, -1, 0, 1]


def test_what_two_ranks_read_is_compared_kind_by_kind() -> None:
    ledger = InputLedger(3, stored={5: "batches:x"}.get)
    ledger.add(-1, "batches:a", 0)
    ledger.add(-1, "batches:a", 1)
    ledger.add(-1, "samples:b", 1)
    with pytest.raises(InputMismatchError, match=r"dataloader 3: rank 2 .* the first batch .* than rank 0 did"):
        ledger.add(-1, "batches:b", 2)
    with pytest.raises(InputMismatchError, match=r"rank 1 .* chunk 5 .* than an earlier run"):
        ledger.add(5, "batches:y", 1)


def test_the_ledger_does_not_grow_and_never_forgets_the_first_batch() -> None:
    ledger = InputLedger(0, stored=lambda chunk: None)
    for chunk in range(-1, 10_000):
        ledger.add(chunk, f"batches:{chunk}", 0)
    assert len(ledger._read) < 5000
    with pytest.raises(InputMismatchError):
        ledger.add(-1, "batches:other", 1)


def test_results_of_replicas_that_read_different_input_are_nobodys(tmp_path: Any) -> None:
    manifest = Manifest(loaders=[LoaderLayout(unit="batch", num_units=None, batch_size=None, chunk_size=4)])
    open_or_create(tmp_path, manifest)
    record_mismatch(tmp_path, "rank 1 has read something else.")
    record_mismatch(tmp_path, "said again.")
    for use in (lambda: load(tmp_path), lambda: open_or_create(tmp_path, manifest)):
        with pytest.raises(InputMismatchError, match=r"cannot be trusted\. rank 1 .* Remove the directory"):
            use()


def sampled(order: str, indices: str = "same", num_units: int = 8, fingerprint: str = "f") -> Manifest:
    identity = {"dataset": "mine", "fingerprint": fingerprint, "sampler": "S", "order": order, "indices": indices}
    layout = LoaderLayout(unit="sample", num_units=num_units, batch_size=2, chunk_size=4, identity=identity)
    return Manifest(loaders=[layout])


def test_who_may_have_another_order() -> None:
    job = sampled("one")
    for life in ("first", "later", "resumed"):
        assert compare(job, sampled("one"), life=life) == []
    assert compare(job, sampled("two"), "on rank 0", "on rank 1", "first") == [
        "order given by S: one on rank 0, two on rank 1"
    ]
    assert compare(job, sampled("two"), life="later") == []
    assert compare(job, sampled("two"), life="resumed") == []
    others = sampled("two", "others", 7, "g")
    assert compare(job, others, life="later") == []
    assert len(compare(job, others, life="resumed")) == 3
    dataset = dataclasses.replace(job.loaders[0], identity={**job.loaders[0].identity, "dataset": "yours"})
    assert compare(job, Manifest(loaders=[dataset]), life="later") == ["dataset: mine there, yours here"]


def test_shares_of_a_loader_are_of_the_same_whole() -> None:
    told: dict[str, list[str]] = {}

    def rows(loader: Any, replica: int) -> list[Any]:
        agree = lambda what, value: told.setdefault(what, []).append(value)  # noqa: E731
        return [int(row) for batch in SharedLoader(describe(loader), lambda: (replica, 2), agree) for row in batch]

    data = torch.arange(10)
    sampler = torch.utils.data.SubsetRandomSampler(range(10), generator=torch.Generator().manual_seed(1))
    for loader in (DataLoader(data, batch_size=3, sampler=sampler), [data[:5], data[5:]]):
        rows(loader, 0)
    assert list(told) == ["the order of SubsetRandomSampler", "the first batch"]
    sampler.generator.manual_seed(1)
    rows([data[1:6]], 1)
    rows(DataLoader(data, batch_size=3, sampler=sampler), 1)
    assert len(set(told["the order of SubsetRandomSampler"])) == 1
    assert len(set(told["the first batch"])) == 2


def test_inside_a_world_of_one_nothing_tells_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("RANK", "3"), ("WORLD_SIZE", "4"), ("SLURM_PROCID", "3"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("NODE_RANK", raising=False)
    get_rank, get_world_size = dist.get_rank, dist.get_world_size  # as code that imports the functions themselves
    told = SimpleNamespace(rank=3)
    monkeypatch.setattr(world_of_one_module._job, "attributes", {})
    hide_as_well(told, "rank", 0)

    def seen() -> Any:
        names = ("RANK", "WORLD_SIZE", "SLURM_PROCID", "LOCAL_RANK", "NODE_RANK")
        return [os.environ.get(name) for name in names], told.rank, job_is_hidden()

    outside = seen()
    with world_of_one():
        assert seen() == (["0", "1", "0", "0", None], 0, True)
        assert (dist.get_rank(), dist.get_world_size(), get_rank(), get_world_size()) == (0, 1, 0, 1)
        with world_of_one():
            assert job_is_hidden()
        with world_of_one(hide=False):
            assert seen() == outside
            with pytest.raises(ValueError, match="process group"):
                get_rank()
        assert job_is_hidden()
    assert seen() == outside
    with pytest.raises(ValueError, match="process group"):
        dist.get_world_size()
    with pytest.raises(KeyError), world_of_one():
        raise KeyError
    assert seen() == outside

    def items() -> Any:
        for _ in range(3):
            yield job_is_hidden()

    between = []
    for hidden in read_alone(items, in_this_process=True):
        between.append((hidden, job_is_hidden()))
    assert between == [(True, False)] * 3
