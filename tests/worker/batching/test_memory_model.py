"""The memory model finds the law behind the peaks; the sizer fills the budget with next to no errors."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_gpuorch.worker.batching.memory_model import BatchSizer, MemoryModel
from tests.support.examples import examples

Law = Callable[[int, int], float]

LAWS: dict[str, Law] = {
    "activations": lambda b, s: 500 + 0.02 * b * s,
    "attention": lambda b, s: 20 + 0.02 * b * s + 1e-5 * b * s * s,
    "mostly_attention": lambda b, s: 100 + 0.001 * b * s + 2e-5 * b * s * s,
}
BUDGET, MAX_COUNT = 4000.0, 512


def largest(law: Law, length: int, budget: float) -> int:
    """What an oracle that knows the law would choose."""
    low, high = 1, MAX_COUNT
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if law(middle, length) <= budget else (low, middle - 1)
    return low


@dataclass
class Outcome:
    num_ooms: int
    throughput: float
    late_throughput: float


def simulate(law: Law, seed: int, lognormal: bool, shrink_at: int | None = None, steps: int = 2000) -> Outcome:
    """A device with a budget, skewed lengths, and peaks that scatter upward by up to some ten percent."""
    random = np.random.default_rng(seed)
    sizer = BatchSizer(BUDGET, MAX_COUNT)
    rows, ideal = np.zeros(steps), np.zeros(steps)
    for step in range(steps):
        budget = BUDGET * (0.8 if shrink_at is not None and step >= shrink_at else 1.0)
        if lognormal:
            length = int(np.clip(random.lognormal(4.5, 0.9), 8, 2000))
        else:
            length = int(random.choice([48, 64, 120, 128, 250, 512, 1000]))
        ideal[step] = largest(law, length, budget)
        count = sizer.choose(length)
        while (peak := law(count, length) * (1 + 0.009 * random.standard_normal() ** 2)) > budget:
            assert count > 1 or law(1, length) > 0.8 * budget
            count = sizer.failed(count, length)
        sizer.fitted(count, length, peak)
        rows[step] = min(count, ideal[step])
    last = slice(steps * 3 // 4, None)
    return Outcome(sizer.num_ooms, rows.sum() / ideal.sum(), rows[last].sum() / ideal[last].sum())


@pytest.mark.parametrize("lognormal", [False, True], ids=["fixed_lengths", "lognormal_lengths"])
@pytest.mark.parametrize("law", LAWS)
def test_few_errors_and_nearly_the_oracles_throughput(law: str, lognormal: bool) -> None:
    for seed in (0, 4):
        outcome = simulate(LAWS[law], seed, lognormal)
        assert outcome.num_ooms <= 3
        assert outcome.throughput >= 0.95


@pytest.mark.parametrize("law", LAWS)
def test_it_adapts_when_the_budget_shrinks(law: str) -> None:
    outcome = simulate(LAWS[law], 1, False, shrink_at=1000)
    assert outcome.num_ooms <= 5
    assert outcome.throughput >= 0.95
    assert outcome.late_throughput >= 0.95


def test_it_grows_back_when_the_budget_does() -> None:
    sizer, law = BatchSizer(BUDGET, MAX_COUNT, forget_after=50), LAWS["activations"]
    for step in range(1500):
        budget = BUDGET * 0.7 if 200 <= step < 300 else BUDGET
        count = sizer.choose(500)
        while law(count, 500) > budget:
            count = sizer.failed(count, 500)
        sizer.fitted(count, 500, law(count, 500))
    assert sizer.num_ooms <= 4
    assert sizer.budget_bytes == BUDGET
    assert sizer.choose(500) >= 0.9 * largest(law, 500, BUDGET)


def test_the_model_finds_the_law() -> None:
    model = MemoryModel()
    law = LAWS["attention"]
    for count, length in [(1, 16), (4, 16), (8, 64), (2, 256), (16, 128), (3, 512), (30, 100)]:
        model.observe(count, length, law(count, length))
    assert model.predict(64, 300) == pytest.approx(law(64, 300), rel=1e-6)
    assert model.relative_margin == 0.03
    count = model.largest_count(300, 4000)
    assert law(count, 300) * 1.03 <= 4000 < law(count + 1, 300) * 1.03


@given(st.lists(st.tuples(st.integers(1, 64), st.integers(1, 512), st.floats(1, 1e12)), min_size=1, max_size=30))
@examples(100)
def test_predictions_never_fall_with_size_and_the_margin_covers_what_was_seen(
    points: list[tuple[int, int, float]],
) -> None:
    model = MemoryModel()
    for count, length, peak in points:
        model.observe(count, length, peak)
    for count, length, peak in points:
        predicted = model.predict(count, length)
        assert predicted <= model.predict(count + 1, length) * (1 + 1e-9)
        assert predicted <= model.predict(count, length + 1) * (1 + 1e-9)
        assert peak - predicted <= peak * (model.relative_margin / 1.2 + 1e-9)


def test_the_worst_peak_of_a_shape_counts() -> None:
    model = MemoryModel()
    for peak in (10.0, 30.0, 20.0):
        model.observe(1, 8, peak)
    model.observe(2, 8, 60.0)
    assert model.predict(1, 8) == pytest.approx(30.0)


def test_nothing_seen() -> None:
    with pytest.raises(ValueError, match="no batch yet"):
        MemoryModel().predict(1, 1)
    assert BatchSizer(1000.0).choose(100) == 1


def test_the_start_is_slow() -> None:
    sizer, counts = BatchSizer(1e12, 1024), []
    for _ in range(8):
        counts.append(sizer.choose(128))
        sizer.fitted(counts[-1], 128, 100.0 + counts[-1])
    assert counts[0] == 1
    assert all(after <= max(1, 2 * before) for before, after in itertools.pairwise(counts))
    assert sizer.choose(1024) <= 2 * counts[-1] // 64 + 1  # squared tokens count as well


def test_an_error_bounds_longer_samples_too() -> None:
    sizer = BatchSizer(1e12, 512, start=64)
    sizer.failed(64, 256)
    assert sizer.choose(256) <= 63
    assert sizer.choose(1000) <= 63
    assert sizer.choose(100) == 64


def test_the_same_history_gives_the_same_sizes() -> None:
    assert simulate(LAWS["attention"], 3, True, steps=300) == simulate(LAWS["attention"], 3, True, steps=300)
