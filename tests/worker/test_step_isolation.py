"""Samples that make the step raise are found and left out; what is no sample's fault is raised as it came."""

from __future__ import annotations

import errno
import gc
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset, SequentialSampler

from lightning_gpuorch.errors import ConfigurationError
from lightning_gpuorch.predictions.loading.describe import describe
from lightning_gpuorch.predictions.loading.stream import StreamSource
from lightning_gpuorch.predictions.loading.tickets import Ticket
from lightning_gpuorch.worker.step_isolation import StepIsolation

LENGTH, BATCH = 20, 8


class Rows(Dataset[Any]):
    """Sample i is a tensor of i, as long as ``width`` says."""

    def __init__(self, width: Callable[[int], int] = lambda index: 1):
        self.width = width

    def __len__(self) -> int:
        return LENGTH

    def __getitem__(self, index: int) -> Any:
        return torch.full((self.width(index),), float(index))


class Opaque:
    """A batch that says nothing of its samples, as those of graph libraries."""

    def __init__(self, samples: list[Any]):
        self.values = torch.stack(samples)


def padded(samples: list[Any]) -> Any:
    return torch.nn.utils.rnn.pad_sequence(samples, batch_first=True)


def step_that_raises(bad: set[int], error: Callable[[], Exception] = lambda: ValueError("no")) -> Callable[[Any], Any]:
    """Doubles a batch; raises if one of the ``bad`` samples is in it."""

    def step(batch: Any) -> Any:
        values = batch["x"] if isinstance(batch, dict) else batch.values if isinstance(batch, Opaque) else batch
        values = torch.stack(values) if isinstance(values, list) else values
        if bad & {int(value) for value in values[:, 0]}:
            raise error()
        return values[:, 0] * 2

    return step


@dataclass
class Run:
    """What became of a loader's batches."""

    outputs: dict[int, list[float] | None] = field(default_factory=dict)
    reasons: dict[int, str] = field(default_factory=dict)
    """By dataset index."""
    steps: int = 0


def run(loader: DataLoader[Any], step: Callable[[Any], Any]) -> Run:
    source = describe(loader)
    assert not isinstance(source, StreamSource)
    isolation, done = StepIsolation(source, lambda batch: batch), Run()
    layout = source.layout(100)

    def counted(batch: Any, ticket: Ticket | None = None) -> Any:
        done.steps += 1
        return step(batch)

    for span in source.spans(layout, 0, range(0), frozenset()):
        assert span.indices is not None
        ticket = Ticket(0, 0, span, span.batch_index, source.collate)
        output, reasons = isolation.compute(counted, counted, source.collate(span.indices), ticket, set())
        done.outputs[span.batch_index] = None if output is None else output.tolist()
        done.reasons |= {span.indices[position]: reason for position, reason in reasons.items()}
    return done


def others(bad: set[int]) -> list[list[float]]:
    batches = [range(start, min(start + BATCH, LENGTH)) for start in range(0, LENGTH, BATCH)]
    return [[2.0 * index for index in batch if index not in bad] for batch in batches]


@pytest.mark.parametrize("bad", [{0}, {19}, {11}, {8, 15}, {9, 10, 11}, {0, 7, 8, 19}, set(range(8, 15))])
@pytest.mark.parametrize(
    "collate",
    [torch.stack, list, lambda samples: {"x": torch.stack(samples)}, Opaque],
    ids=["tensor", "list", "dict", "opaque"],
)
def test_samples_that_raise_are_left_out_and_the_others_are_one_batch(bad: set[int], collate: Any) -> None:
    done = run(DataLoader(Rows(), batch_size=BATCH, collate_fn=collate), step_that_raises(bad))
    assert list(done.outputs.values()) == others(bad)
    assert done.reasons.keys() == bad
    assert all(reason.startswith("ValueError: no (test_step_isolation.py:") for reason in done.reasons.values())


@pytest.mark.parametrize("batch_size", [1, 4])
def test_a_batch_of_which_all_samples_raise_has_no_output(batch_size: int) -> None:
    bad = {8, 9, 10, 11}
    done = run(DataLoader(Rows(), batch_size=batch_size), step_that_raises(bad))
    assert done.reasons.keys() == bad
    assert [number for number, output in done.outputs.items() if output is None] == sorted(
        {i // batch_size for i in bad}
    )


def test_the_first_of_all_is_judged_by_samples_from_elsewhere() -> None:
    done = run(DataLoader(Rows(), batch_size=1), step_that_raises({0}))
    assert done.reasons.keys() == {0}


def test_a_sample_is_not_blamed_for_the_padding_of_another() -> None:
    def step(batch: Any) -> Any:
        if batch.shape[1] > 4:
            raise ValueError("longer than the model's maximum")
        return batch[:, 0] * 2

    rows = Rows(lambda index: 9 if index == 10 else 1 + index % 4)
    done = run(DataLoader(rows, batch_size=BATCH, collate_fn=padded), step)
    assert done.reasons.keys() == {10}
    assert list(done.outputs.values()) == others({10})


def test_batches_of_a_batch_sampler() -> None:
    sampler = [[3, 1], [5, 9, 2], [7]]
    done = run(DataLoader(Rows(), batch_sampler=sampler), step_that_raises({9, 7}))  # type: ignore[arg-type]
    assert list(done.outputs.values()) == [[6.0, 2.0], [10.0, 4.0], None]
    assert done.reasons.keys() == {9, 7}


def test_samples_are_read_again_by_a_worker_if_the_loader_has_workers() -> None:
    sampler = BatchSampler(SequentialSampler(range(LENGTH)), BATCH, drop_last=False)
    loader = DataLoader(Rows(), batch_sampler=sampler, collate_fn=Opaque, num_workers=1)
    assert run(loader, step_that_raises({13})).reasons.keys() == {13}


def test_few_steps_find_one_sample_of_many() -> None:
    whole = DataLoader(Rows(), batch_size=LENGTH)
    assert (
        run(whole, step_that_raises({13})).steps <= 1 + 2 * 5 + 2 + 1
    )  # all, two halves five times, again, the others


def test_an_error_that_comes_once_costs_nothing_and_is_told(caplog: pytest.LogCaptureFixture) -> None:
    errors = iter([ValueError("once")])

    def step(batch: Any) -> Any:
        for error in errors:
            raise error
        return batch[:, 0] * 2

    done = run(DataLoader(Rows(), batch_size=BATCH), step)
    assert not done.reasons
    assert list(done.outputs.values()) == others(set())
    (told,) = [record.getMessage() for record in caplog.records if "computed again" in record.getMessage()]
    assert "ValueError: once" in told


class MisconfigurationException(Exception):  # noqa: N818 - as Lightning's is named
    pass


@pytest.mark.parametrize(
    "error",
    [
        ConfigurationError("bad option"),
        MisconfigurationException("no dataloader"),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("NCCL error in: somewhere"),
        ConnectionResetError("peer"),
        OSError(errno.EIO, "Input/output error"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_no_sample_is_to_blame_for_is_raised_at_once(error: Exception) -> None:
    steps = []

    def step(batch: Any) -> Any:
        steps.append(batch)
        raise error

    with pytest.raises(type(error)) as raised:
        run(DataLoader(Rows(), batch_size=BATCH), step)
    assert raised.value is error
    assert len(steps) == 1


@pytest.mark.parametrize("batch_size", [1, BATCH, LENGTH])
def test_a_bug_in_the_step_is_raised_as_it_came(batch_size: int) -> None:
    raised_first: list[Exception] = []

    def step(batch: Any) -> Any:
        error = KeyError("logits")
        raised_first.append(error)
        raise error

    with pytest.raises(KeyError, match="logits") as raised:
        run(DataLoader(Rows(), batch_size=batch_size), step)
    assert raised.value is raised_first[0]
    assert raised.value.__context__ is None
    assert "raise error" in str(raised.traceback[-1].statement)
    assert len(raised_first) < 12


def test_what_begins_to_fail_for_all_samples_gives_up_none() -> None:
    works = iter(range(1))

    def step(batch: Any) -> Any:
        next(works)  # a service that goes away
        return batch[:, 0] * 2

    with pytest.raises(StopIteration):
        run(DataLoader(Rows(), batch_size=BATCH), step)


@pytest.mark.parametrize("changes", ["in place", "its keys"])
def test_a_step_that_changes_its_batch_before_it_raises_is_not_given_parts_of_what_it_left(changes: str) -> None:
    def step(batch: Any) -> Any:
        if changes == "in place":
            batch["x"] *= 2
        values = batch.pop("x") if changes == "its keys" else batch["x"]
        if 10 in values or 20 in values:
            raise ValueError("no")
        return values[:, 0]

    loader = DataLoader(Rows(), batch_size=BATCH, collate_fn=lambda samples: {"x": torch.stack(samples)})
    with pytest.raises(ValueError, match="no"):
        run(loader, step)


def test_samples_of_a_random_dataset_are_not_given_up_for_others() -> None:
    rows = Rows()
    rows.width = lambda index: int(torch.randint(1, 99, ()))
    with pytest.raises(ValueError, match="no"):
        run(DataLoader(rows, batch_size=BATCH, collate_fn=padded), step_that_raises({10}))


def test_parts_are_copies_that_a_step_may_change() -> None:
    def step(batch: Any) -> Any:
        if 10 in [int(sample[0]) for sample in batch]:
            raise ValueError("no")
        return torch.stack([sample.mul_(2)[0] for sample in batch])

    done = run(DataLoader(Rows(), batch_size=BATCH, collate_fn=list), step)
    assert list(done.outputs.values()) == others({10})


def test_samples_that_raise_only_together_are_no_ones_fault() -> None:
    def step(batch: Any) -> Any:
        if len(batch) == BATCH:
            raise ValueError("that many at a time cannot be computed")
        return batch[:, 0] * 2

    with pytest.raises(ValueError, match="at a time"):
        run(DataLoader(Rows(), batch_size=BATCH), step)


def test_no_activation_of_a_failed_step_is_alive_in_the_next() -> None:
    alive: list[weakref.ref[torch.Tensor]] = []

    def step(batch: Any) -> Any:
        assert not [one for one in alive if one() is not None], "the failed step's activations are alive"
        activation = batch + 1
        alive.append(weakref.ref(activation))
        if 10 in batch[:, 0]:
            raise ValueError("no")
        return batch[:, 0] * 2

    gc.disable()
    try:
        done = run(DataLoader(Rows(), batch_size=BATCH), step)
    finally:
        gc.enable()
    assert done.reasons.keys() == {10}
