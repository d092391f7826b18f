from __future__ import annotations

import csv
import math
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger, Logger
from torch.utils.data import DataLoader, TensorDataset

from lightning_gpuorch.errors import ConfigurationError
from lightning_gpuorch.telemetry.metrics.aggregates import JobThroughput, StepLatency
from tests.conftest import Runner
from tests.support.examples import examples


def gathered(metrics: list[Any]) -> torch.Tensor:
    """Compute on the first rank, with a gather that returns what every rank would send."""
    first = metrics[0]
    sent = [[getattr(metric, name) for name in metric._defaults] for metric in metrics]
    calls = iter(range(10**6))

    def gather(tensor: torch.Tensor, group: Any = None) -> list[torch.Tensor]:
        position = next(calls) % len(first._defaults)
        return [states[position] for states in sent]

    first.dist_sync_fn = gather
    first.distributed_available_fn = lambda: True
    return first.compute()  # type: ignore[no-any-return]


@given(st.lists(st.floats(2e-5, 500), min_size=1, max_size=60), st.floats(0, 1), st.integers(1, 4))
@examples(40)
def test_a_quantile_over_all_ranks_is_within_its_bucket(seconds: list[float], quantile: float, num_ranks: int) -> None:
    ranks = [StepLatency(quantile) for _ in range(num_ranks)]
    for i, value in enumerate(seconds):
        ranks[i % num_ranks].update(value)
    exact = sorted(seconds)[max(1, math.ceil(quantile * len(seconds))) - 1]
    assert float(gathered(ranks)) == pytest.approx(exact, rel=0.1)


def test_steps_outside_the_range_count_at_its_ends() -> None:
    metric = StepLatency(1.0)
    for seconds in (0.0, 1e-9, 1e9):
        metric.update(seconds)
    assert int(metric.counts.sum()) == 3
    assert float(metric.compute()) > 900
    assert metric.counts[0] == 2


def test_throughput_counts_the_samples_of_all_ranks_over_the_time_of_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1_790_000_000.0]
    monkeypatch.setattr(time, "time", lambda: now[0])
    ranks = [JobThroughput() for _ in range(3)]
    for second in range(10):
        now[0] = 1_790_000_000.0 + second + 1
        for number, rank in enumerate(ranks):
            if number < 2 or second >= 5:  # the third was restarted half-way
                rank.update(8, seconds=1.0)
    assert float(gathered(ranks)) == pytest.approx((80 + 80 + 40) / 10)


@pytest.mark.filterwarnings("ignore:The ``compute`` method:UserWarning")
def test_nothing_counted_is_not_a_number_and_not_zero() -> None:
    assert math.isnan(float(StepLatency().compute()))
    assert math.isnan(float(JobThroughput().compute()))


@pytest.mark.parametrize("quantile", [-0.1, 1.1])
def test_bad_quantiles_are_refused(quantile: float) -> None:
    with pytest.raises(ConfigurationError, match="between 0 and 1"):
        StepLatency(quantile)


class Measured(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.throughput, self.p99 = JobThroughput(), StepLatency(0.99)

    def test_step(self, batch: list[torch.Tensor], batch_idx: int) -> None:
        self.throughput.update(len(batch[0]), 0.01)
        self.p99.update(0.25)
        self.log("throughput", self.throughput, on_step=False, on_epoch=True)
        self.log("p99_seconds", self.p99, on_step=False, on_epoch=True)

    def predict_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        self.p99.update(0.25)
        return batch[0]

    def on_predict_end(self) -> None:
        assert self.logger is not None
        self.logger.log_metrics({"p99_seconds": float(self.p99.compute())}, step=0)
        self.logger.save()


def run(logger: Logger, *, predict: bool) -> dict[str, float]:
    trainer = Trainer(
        accelerator="cpu", devices=1, logger=logger, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False,
    )  # fmt: skip
    loader = DataLoader(TensorDataset(torch.zeros(12, 1)), batch_size=4)
    if predict:
        trainer.predict(Measured(), loader)
        return {}
    return dict(trainer.test(Measured(), loader, verbose=False)[0])


@pytest.mark.filterwarnings("ignore:.*does not have many workers.*")
@pytest.mark.parametrize("predict", [False, True])
def test_self_log_and_the_csv_logger_take_them(tmp_path: Path, predict: bool) -> None:
    logger = CSVLogger(tmp_path)
    logged = run(logger, predict=predict)
    with open(Path(logger.log_dir) / "metrics.csv", newline="") as file:
        (row,) = csv.DictReader(file)
    assert float(row["p99_seconds"]) == pytest.approx(0.25, rel=0.1)
    if not predict:
        assert logged["p99_seconds"] == pytest.approx(float(row["p99_seconds"]))
        assert float(row["throughput"]) > 0


@pytest.mark.filterwarnings("ignore:.*does not have many workers.*", "ignore::DeprecationWarning")
def test_tensorboard_takes_them(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from lightning.pytorch.loggers import TensorBoardLogger
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = TensorBoardLogger(tmp_path)
    run(logger, predict=False)
    seen = EventAccumulator(logger.log_dir)
    seen.Reload()
    assert seen.Scalars("p99_seconds")[-1].value == pytest.approx(0.25, rel=0.1)


def test_figures_of_two_ranks_are_gathered_over_the_job_and_logged(runner: Runner, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = runner.run("job_figures.py", "--devices", 2).result
    # Rank 0, which has logged, never took 0.2 s for a step: it knows from rank 1.
    assert 0.17 < found["slowest_step_seconds"] < 1.0
    # All 160 samples count, those of rank 1 too: rank 0 cannot have done them all in the time that its steps took.
    assert 160 / found["seconds"] < found["samples_per_second"] < 2 * 4 / 0.02
    with open(tmp_path / "logs" / "lightning_logs" / "version_0" / "metrics.csv", newline="") as file:
        (row,) = csv.DictReader(file)
    assert float(row["samples_per_second"]) == pytest.approx(found["samples_per_second"])
    seen = EventAccumulator(str(tmp_path / "logs" / "lightning_logs" / "version_1"))
    seen.Reload()
    assert seen.Scalars("slowest_step_seconds")[-1].value == pytest.approx(found["slowest_step_seconds"])
