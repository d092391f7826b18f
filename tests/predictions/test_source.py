"""What is known of a dataloader before work starts, and what finding it out must not touch."""

import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from lightning_gpuorch.errors import ConfigurationError, CorruptPartError
from lightning_gpuorch.predictions.loading.describe import describe
from lightning_gpuorch.predictions.loading.order import Order
from lightning_gpuorch.predictions.loading.source import BatchSource, MapSource
from lightning_gpuorch.predictions.loading.stream import StreamSource

LENGTH = 20


class Rows(Dataset):
    """Opens what it reads from on the first read, draws a number with each, and remembers where it was read."""

    def __init__(self, length=LENGTH):
        self.length = length
        self.opened_by = None
        self.reads = 0

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        if self.opened_by is None:
            self.opened_by = os.getpid()
        self.reads += 1
        return torch.tensor([float(index), float(self.opened_by != os.getpid())])


class Noisy(Rows):
    def __getitem__(self, index):
        return super().__getitem__(index) + torch.rand(()) + random.random() + np.random.rand()


def random_state():
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("dataset", [Rows, Noisy])
@pytest.mark.parametrize("ask", ["layout", "first_batch", "try_on_first", "some_indices"])
def test_asking_about_a_loader_neither_reads_the_dataset_here_nor_draws(workers, dataset, ask) -> None:
    rows = dataset()
    source = describe(DataLoader(rows, batch_size=4, num_workers=workers))
    before = random_state()
    {
        "layout": lambda: source.layout(1),
        "first_batch": source.first_batch,
        "try_on_first": lambda: source.try_on_first(len),
        "some_indices": source.some_indices,
    }[ask]()
    assert (rows.reads, rows.opened_by) == (0, None)
    assert random_state() == before


def test_a_batch_is_put_together_again_where_the_loader_reads() -> None:
    for workers in (0, 1):
        rows = Rows()
        source = describe(DataLoader(rows, batch_size=4, num_workers=workers))
        assert source.collate([3, 1]).tolist() == [[3.0, 0.0], [1.0, 0.0]]
        assert rows.reads == (0 if workers else 2)


def test_the_fingerprint_tells_datasets_apart_and_knows_when_it_cannot() -> None:
    def fingerprint(dataset: Any) -> Any:
        return describe(DataLoader(dataset, batch_size=4)).layout(1).identity["fingerprint"]

    class Shifted(Rows):
        def __getitem__(self, index):
            return super().__getitem__(index) + 1e-3

    class Texts(Rows):
        word = "one"

        def __getitem__(self, index):
            return {"text": f"{self.word} {index}"}

    class OtherTexts(Texts):
        word = "two"

    class Broken(Rows):
        def __getitem__(self, index):
            raise OSError("cannot be read")

    assert fingerprint(Rows()) == fingerprint(Rows()) is not None
    assert fingerprint(Rows()) != fingerprint(Shifted())
    assert fingerprint(Texts()) == fingerprint(Texts()) != fingerprint(OtherTexts())
    assert fingerprint(Noisy()) is None
    assert fingerprint(Broken()) is None
    assert fingerprint(Rows(0)) is None


def test_what_the_first_sample_is_refused_for_is_said_in_one_sentence() -> None:
    def refuse(samples: list[Any]) -> None:
        raise ConfigurationError(f"no length of a {type(samples[0]).__name__}")

    with pytest.raises(ConfigurationError, match=r"^no length of a Tensor$"):
        describe(DataLoader(Rows(), batch_size=4)).try_on_first(refuse)


class CountedSampler(SubsetRandomSampler):
    iterations = 0

    def __iter__(self):
        self.iterations += 1
        return super().__iter__()


def test_a_sampler_is_iterated_once_and_draws_as_it_would_for_the_loader() -> None:
    torch.manual_seed(5)
    sampler = CountedSampler(range(3, 17))
    expected = [batch[:, 0].int().tolist() for batch in DataLoader(Rows(), batch_size=4, sampler=sampler)]
    drawn = torch.get_rng_state()
    torch.manual_seed(5)
    sampler.iterations = 0
    source = describe(DataLoader(Rows(), batch_size=4, sampler=sampler))
    layout = source.layout(1)
    for _ in range(3):  # back and forth, as leases may come
        for chunk in (2, 0, 3, 1):
            assert [s.indices for s in source.spans(layout, chunk, range(0), frozenset())] == [expected[chunk]]
    assert sampler.iterations == 1
    assert torch.equal(torch.get_rng_state(), drawn)


class Reversed(RandomSampler):
    """Has an order of its own, whatever it is derived from."""

    def __iter__(self):
        return iter(range(len(self.data_source) - 1, -1, -1))


@pytest.mark.parametrize(
    "sampler",
    [
        lambda rows: RandomSampler(rows, replacement=True, generator=torch.Generator().manual_seed(3)),
        lambda rows: RandomSampler(rows, num_samples=7, generator=torch.Generator().manual_seed(3)),
        lambda rows: RandomSampler(rows, num_samples=2 * LENGTH, generator=torch.Generator().manual_seed(3)),
        Reversed,
    ],
)
def test_a_sampler_that_picks_samples_is_no_shuffling_that_could_be_left_out(sampler: Any) -> None:
    rows = Rows()
    source = describe(DataLoader(rows, batch_size=4, sampler=sampler(rows)))
    layout = source.layout(100)
    spans = source.spans(layout, 0, range(0), frozenset())
    assert [index for span in spans for index in span.indices] == list(sampler(rows))


class EndlessBatches:
    """Repeats for ever, as samplers do whose workers live on between epochs."""

    def __init__(self, length=None):
        self.length = length

    def __iter__(self):
        while True:
            yield [0, 1]
            yield [2]

    def __len__(self):
        if self.length is None:
            raise TypeError("endless")
        return self.length


def test_an_endless_batch_sampler_is_read_as_far_as_it_says_or_as_is_asked() -> None:
    assert describe(DataLoader(Rows(), batch_sampler=EndlessBatches(5))).layout(1).num_units == 5
    assert describe(DataLoader(Rows(), batch_sampler=EndlessBatches()), limit=3).layout(1).num_units == 3


def test_a_loader_that_iterates_in_its_own_way_is_read_as_a_stream_of_known_length() -> None:
    class Doubled(DataLoader):
        def __iter__(self):
            for batch in super().__iter__():
                yield batch * 2

    source = describe(Doubled(Rows(), batch_size=8))
    assert isinstance(source, StreamSource)
    assert source.num_batches == 3
    assert [batch[0, 0].item() for batch in source.iterate()] == [0.0, 16.0, 32.0]


def test_keys_instead_of_indices_and_no_length() -> None:
    class Keyed(Dataset):
        def __getitem__(self, key):
            return torch.tensor(float(key[1:]))

    source = describe(DataLoader(Keyed(), batch_size=2, sampler=["k2", "k0", "k1"]))
    layout = source.layout(1)
    assert layout.num_units == 3
    assert layout.identity["length"] is None
    assert [s.indices for s in source.spans(layout, 0, range(0), frozenset())] == [["k2", "k0"]]


@pytest.mark.parametrize(
    "loader",
    [
        lambda: DataLoader(Rows(), batch_size=4, sampler=SubsetRandomSampler(range(LENGTH))),
        lambda: DataLoader(Rows(), batch_size=4, sampler=WeightedRandomSampler([1.0] * LENGTH, LENGTH, False)),
        lambda: DataLoader(Rows(), batch_sampler=[[int(i)] for i in np.random.permutation(LENGTH)]),
    ],
)
def test_a_later_life_takes_the_order_that_was_kept(tmp_path: Path, loader: Any) -> None:
    begun, later = describe(loader()), describe(loader())
    assert isinstance(begun, (MapSource, BatchSource))
    begun.freeze(tmp_path)
    layout = begun.layout(2)
    assert later.layout(2).identity["indices"] == layout.identity["indices"]
    assert later.layout(2).identity["order"] != layout.identity["order"]
    later.thaw(tmp_path, layout)

    def spans(source: Any) -> list[Any]:
        return [s.indices for c in range(layout.num_chunks) for s in source.spans(layout, c, range(0), frozenset())]

    assert spans(later) == spans(begun)
    next(tmp_path.glob("order-*")).unlink()
    with pytest.raises(CorruptPartError, match="is gone"):
        describe(loader()).thaw(tmp_path, layout)


indices = st.one_of(
    st.lists(st.integers(-(2**63), 2**63 - 1)),
    st.lists(st.integers(0, 300)),
    st.lists(st.text()),
    st.lists(st.one_of(st.integers(0, 9), st.tuples(st.integers(0, 9), st.text(max_size=2)))),
)


@given(st.data())
def test_an_order_comes_back_as_it_was(tmp_path_factory: pytest.TempPathFactory, data: Any) -> None:
    directory = tmp_path_factory.mktemp("order")
    if data.draw(st.booleans()):
        flat = data.draw(indices)
        order = Order.read(flat, None, False)
        taken = lambda o: o.take(range(len(o)))  # noqa: E731
    else:
        flat = data.draw(st.lists(indices, max_size=5))
        order = Order.read(flat, None, True)
        taken = lambda o: [o.batch(n) for n in range(len(o))]  # noqa: E731
    assert taken(order) == flat
    assert order.store(directory)
    again = Order.load(directory, order.digest)
    assert taken(again) == flat
    assert again.digest_of_indices == order.digest_of_indices


def test_what_counts_as_the_same_indices() -> None:
    def digest(values: Any) -> str:
        return Order.read(values, None, False).digest_of_indices

    assert digest([3, 1, 2]) == digest(np.array([1, 2, 3])) == digest(torch.tensor([2, 3, 1]))
    assert len({digest([1, 2]), digest([1, 2, 2]), digest([1, 1, 2]), digest([]), digest(["1", "2"])}) == 5


def test_indices_without_a_durable_form_are_not_kept(tmp_path: Path) -> None:
    assert not Order.read([object(), object()], None, False).store(tmp_path)
    assert not list(tmp_path.iterdir())


class Stream(IterableDataset):
    def __iter__(self):
        return iter(range(10))


def test_the_first_batch_of_a_stream() -> None:
    for workers in (0, 1):
        assert describe(DataLoader(Stream(), batch_size=3, num_workers=workers)).first_batch().tolist() == [0, 1, 2]
    assert describe([torch.ones(2)]).first_batch().tolist() == [1.0, 1.0]
    assert describe([]).first_batch() is None
