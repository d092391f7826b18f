from __future__ import annotations

import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from lightning_gpuorch.telemetry import FailureTally, RankMetrics
from lightning_gpuorch.telemetry.metrics.exposition import merge_directory, snapshot_name, write_text
from tests.support.examples import examples

Series = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def parse(text: bytes) -> Series:
    """Read an exposition with prometheus_client's own parser; no series may appear twice."""
    found: Series = {}
    for family in text_string_to_metric_families(text.decode()):
        for sample in family.samples:
            key = sample.name, tuple(sorted(sample.labels.items()))
            assert key not in found, f"{key} appears twice"
            found[key] = sample.value
    return found


def value(series: Series, name: str, **labels: str) -> float | None:
    return series.get((name, tuple(sorted(labels.items()))))


def test_the_five_named_metrics_are_there_with_their_labels(tally: FailureTally) -> None:
    metrics = RankMetrics(3, failures=tally)
    metrics.observe_step(0.03, 32)
    metrics.observe_collective("all_reduce", 0.0002)
    metrics.memory_usage.set(5e9)
    metrics.set_scaling_efficiency(91.5)
    series = parse(write_text(metrics.registry))
    assert value(series, "distributed_inference_steps_total", rank="3") == 1
    assert value(series, "distributed_inference_step_seconds_count", rank="3") == 1
    assert value(series, "distributed_inference_step_seconds_sum", rank="3") == 0.03
    assert value(series, "distributed_inference_step_seconds_bucket", rank="3", le="0.05") == 1
    assert value(series, "distributed_inference_step_seconds_bucket", rank="3", le="0.025") == 0
    assert value(series, "distributed_communication_latency_seconds_count", rank="3", op="all_reduce") == 1
    assert value(series, "gpu_memory_usage_bytes", rank="3") == 5e9
    assert value(series, "distributed_scaling_efficiency_percent") == 91.5
    assert value(series, "distributed_inference_samples_total", rank="3") == 32


def test_what_is_not_known_is_absent_not_zero(tally: FailureTally) -> None:
    metrics = RankMetrics(0, failures=tally)
    names = {name for name, _ in parse(write_text(metrics.registry))}
    assert not names & {
        "distributed_scaling_efficiency_percent", "gpu_memory_usage_bytes", "gpu_temperature_celsius",
        "gpu_health_status", "distributed_inference_batch_size",
    }  # fmt: skip
    metrics.observe_device(temperature_celsius=0.0, memory_used_bytes=1.0)
    metrics.set_scaling_efficiency(50)
    series = parse(write_text(metrics.registry))
    assert value(series, "gpu_temperature_celsius", rank="0") == 0.0
    assert value(series, "gpu_power_watts", rank="0") is None
    metrics.observe_device(memory_used_bytes=1.0)
    metrics.set_scaling_efficiency(None)
    series = parse(write_text(metrics.registry))
    assert value(series, "gpu_temperature_celsius", rank="0") is None
    assert value(series, "distributed_scaling_efficiency_percent") is None


def test_a_rank_without_a_step_shows_when_it_began(tally: FailureTally) -> None:
    before = time.time()
    series = parse(write_text(RankMetrics(0, failures=tally).registry))
    began = value(series, "distributed_inference_last_step_timestamp_seconds", rank="0")
    assert began is not None
    assert before <= began <= time.time()


def test_observer_failures_are_shown(tally: FailureTally) -> None:
    metrics = RankMetrics(0, failures=tally)
    tally.add("events", OSError("full"))
    tally.add("events")
    assert (
        value(parse(write_text(metrics.registry)), "gpuorch_observer_failures_total", rank="0", observer="events") == 2
    )


def test_only_one_rank_of_a_group_counts_samples(tally: FailureTally) -> None:
    metrics = RankMetrics(1, counts_samples=False, failures=tally)
    metrics.observe_step(0.1, 8)
    assert value(parse(write_text(metrics.registry)), "distributed_inference_samples_total", rank="1") == 0


class Files:
    def __init__(self, directory: Path, tally: FailureTally):
        self.directory, self.tally = directory, tally

    def write(self, rank: int, generation: int, steps: int, age_seconds: float = 0.0, ended: bool = False) -> None:
        import os

        metrics = RankMetrics(rank, generation=generation, failures=self.tally)
        metrics.memory_usage.set(rank * 10 + generation)
        for _ in range(steps):
            metrics.observe_step(0.02, 4)
        path = self.directory / snapshot_name(rank, generation)
        path.write_bytes(write_text(metrics.registry, ended=ended))
        os.utime(path, (time.time() - age_seconds,) * 2)

    def merged(self) -> Series:
        return parse(merge_directory(self.directory, stale_after_seconds=15))


@pytest.fixture
def files(tmp_path: Path, tally: FailureTally) -> Files:
    return Files(tmp_path, tally)


def test_counters_go_on_over_starts_and_gauges_are_of_the_living(files: Files) -> None:
    files.write(0, generation=0, steps=5, age_seconds=100)
    files.write(0, generation=1, steps=2)
    files.write(1, generation=0, steps=7, age_seconds=100)
    files.write(2, generation=0, steps=1, ended=True)
    series = files.merged()
    assert [value(series, "distributed_inference_steps_total", rank=r) for r in "012"] == [7, 7, 1]
    assert value(series, "distributed_inference_step_seconds_bucket", rank="0", le="+Inf") == 7
    assert value(series, "distributed_inference_rank_restarts_total", rank="0") == 1
    assert [value(series, "gpu_memory_usage_bytes", rank=r) for r in "012"] == [1.0, None, None]
    assert [value(series, "distributed_inference_rank_up", rank=r) for r in "012"] == [1.0, 0.0, None]
    assert value(series, "distributed_inference_last_step_timestamp_seconds", rank="1") is None


def test_other_files_in_the_directory_are_left_alone(files: Files) -> None:
    files.write(0, generation=0, steps=3)
    (files.directory / ".rank0.0.prom.77").write_bytes(b"half a li")
    (files.directory / "endpoint").write_text("{}")
    assert value(files.merged(), "distributed_inference_steps_total", rank="0") == 3


def test_an_empty_directory_is_an_empty_exposition(tmp_path: Path) -> None:
    assert merge_directory(tmp_path) == b""


def test_label_values_with_every_awkward_character_survive_the_merge(files: Files) -> None:
    name = 'a b"c\\d\ne}f 1.0 {g='
    metrics = RankMetrics(0, failures=files.tally)
    metrics.observe_collective(name, 0.5)
    for generation in (0, 1):
        (files.directory / snapshot_name(0, generation)).write_bytes(write_text(metrics.registry))
    assert value(files.merged(), "distributed_communication_latency_seconds_count", rank="0", op=name) == 2


@given(
    starts=st.dictionaries(
        st.tuples(st.integers(0, 3), st.integers(0, 3)), st.tuples(st.integers(0, 5), st.booleans()), max_size=6
    )
)
@examples(25)
def test_totals_are_the_sum_over_all_starts_whatever_died(
    tmp_path_factory: pytest.TempPathFactory, starts: dict[tuple[int, int], tuple[int, bool]]
) -> None:
    files = Files(tmp_path_factory.mktemp("merge"), FailureTally())
    for (rank, generation), (steps, old) in starts.items():
        files.write(rank, generation, steps, age_seconds=100 if old else 0)
    series = files.merged()
    for rank in {rank for rank, _ in starts}:
        of_rank = {g: s for (r, g), s in starts.items() if r == rank}
        label = str(rank)
        assert value(series, "distributed_inference_steps_total", rank=label) == sum(n for n, _ in of_rank.values())
        newest_is_old = of_rank[max(of_rank)][1]
        assert value(series, "distributed_inference_rank_up", rank=label) == float(not newest_is_old)
        expected = None if newest_is_old else rank * 10 + max(of_rank)
        assert value(series, "gpu_memory_usage_bytes", rank=label) == expected
