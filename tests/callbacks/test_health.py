"""Both callbacks in Trainer and in a loop that calls them as Fabric does."""

from __future__ import annotations

import errno
import threading
import time
import types
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DataLoader, TensorDataset

from lightning_gpuorch.callbacks.gpu_health import GPUHealthMonitor
from lightning_gpuorch.callbacks.prometheus_metrics import PrometheusMetrics
from lightning_gpuorch.devices.monitor import HealthReport
from lightning_gpuorch.devices.verdict import Verdict
from lightning_gpuorch.errors import ConfigurationError
from lightning_gpuorch.telemetry import (
    EventLog,
    check_event,
    current_metrics,
    observer_failures,
    read_events,
    use_events,
)
from lightning_gpuorch.telemetry.metrics import exposition
from lightning_gpuorch.telemetry.metrics.efficiency import Baseline
from tests.support.gpus import _clean_process, eventually  # noqa: F401
from tests.support.nvml import FakeNVML
from tests.telemetry.test_metrics import Series, parse, value


def scrape(metrics: PrometheusMetrics) -> Series:
    assert metrics.endpoint is not None
    with urllib.request.urlopen(f"http://127.0.0.1:{metrics.endpoint[1]}/metrics", timeout=5) as answer:
        return parse(answer.read())


class Doubler(LightningModule):
    """Waits in its third step until the test has looked."""

    def __init__(self, look: Any = None):
        super().__init__()
        self.look = look

    def predict_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        if batch_idx == 3 and self.look is not None:
            self.look()
        return batch[0] * 2


def predict(callbacks: list[Any], look: Any = None, samples: int = 20) -> list[torch.Tensor]:
    trainer = Trainer(
        accelerator="cpu", devices=1, logger=False, callbacks=callbacks, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False,
    )  # fmt: skip
    loader = DataLoader(TensorDataset(torch.arange(float(samples)).unsqueeze(1)), batch_size=4)
    return trainer.predict(Doubler(look), loader)  # type: ignore[return-value]


def exporting(tmp_path: Path, **options: Any) -> PrometheusMetrics:
    return PrometheusMetrics(0, tmp_path / "metrics", address="127.0.0.1", interval_seconds=0.02, **options)


pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers.*")


def test_a_trainer_exports_while_it_predicts_and_keeps_counting_in_a_second_loop(tmp_path: Path) -> None:
    metrics = exporting(tmp_path)
    seen: list[Series] = []

    def look() -> None:
        eventually(lambda: metrics.endpoint)
        eventually(lambda: value(scrape(metrics), "distributed_inference_steps_total", rank="0") == 3 + 5 * len(seen))
        seen.append(scrape(metrics))

    for _ in range(2):
        outputs = predict([metrics], look)
        assert torch.cat(outputs).flatten().tolist() == [2.0 * i for i in range(20)]
    first, second = seen
    assert value(first, "distributed_inference_samples_total", rank="0") == 12
    assert value(second, "distributed_inference_samples_total", rank="0") == 32
    assert value(first, "distributed_inference_batch_size", rank="0") == 4
    assert value(first, "distributed_inference_rank_up", rank="0") == 1
    assert (value(first, "gpu_memory_usage_bytes", rank="0") or 0) > 2**20
    assert value(first, "distributed_scaling_efficiency_percent") is None
    assert metrics.endpoint is None
    assert current_metrics() is None


def test_without_a_directory_nothing_is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import tempfile

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    metrics = PrometheusMetrics(0, address="127.0.0.1", interval_seconds=0.02)
    predict([metrics], lambda: eventually(lambda: metrics.endpoint and any(tmp_path.iterdir())))
    assert list(tmp_path.iterdir()) == []


def test_an_exception_in_the_loop_ends_both(tmp_path: Path) -> None:
    metrics, health = exporting(tmp_path), GPUHealthMonitor(0.02)

    def explode() -> None:
        raise ArithmeticError("from the model")

    with pytest.raises(ArithmeticError, match="from the model"):
        predict([metrics, health], explode)
    assert metrics.endpoint is None
    assert health.monitor is None


class Job:
    """What callbacks see of Fabric or of MultiGPUOrchestrator with this plugin's strategy."""

    def __init__(self, tmp_path: Path, rank: int = 1):
        self.verdicts: list[HealthReport] = []
        self.global_rank, self.world_size, self.is_global_zero = rank, 2, rank == 0
        self.runtime = types.SimpleNamespace(
            replica=1, generation=1, run_directory=tmp_path / "run", job=types.SimpleNamespace(),
            is_leader=True, device=torch.device("cpu"), report_verdict=self.verdicts.append,
        )  # fmt: skip
        self.strategy = types.SimpleNamespace(runtime=self.runtime, root_device=torch.device("cpu"))

    def run(self, callbacks: list[Any], steps: int = 5, look: Any = None) -> None:
        def call(hook: str, **arguments: Any) -> None:
            for callback in callbacks:
                getattr(callback, hook)(trainer=self, pl_module=None, **arguments)

        call("on_predict_start")
        for i in range(steps):
            call("on_predict_batch_start", batch=["a", "b"], batch_idx=i)
            current = current_metrics()
            if current is not None:  # as the rank's telemetry does: the sampler's count, not the shape of the batch
                current.observe_step(0.001, 7)
            call("on_predict_batch_end", outputs=None, batch=["a", "b"], batch_idx=i)
        if look is not None:
            look()
        call("on_predict_end")


def test_under_our_strategy_samples_directory_and_restarts_come_from_the_runtime(tmp_path: Path) -> None:
    metrics = PrometheusMetrics(0, address="127.0.0.1", interval_seconds=0.02)
    job = Job(tmp_path)
    job.run([metrics])
    series = parse((tmp_path / "run" / "metrics" / "rank1.1.prom").read_bytes())
    assert value(series, "distributed_inference_samples_total", rank="1") == 35
    assert value(series, "distributed_inference_rank_restarts_total", rank="1") == 1
    job.runtime.job = types.SimpleNamespace()
    job.run([metrics], steps=1)
    series = parse((tmp_path / "run" / "metrics" / "rank1.1.prom").read_bytes())
    assert value(series, "distributed_inference_samples_total", rank="1") == 42


def test_scaling_efficiency_is_shown_with_a_baseline_by_rank_0_and_follows_the_whole_job(tmp_path: Path) -> None:
    metrics = [
        PrometheusMetrics(0, address="127.0.0.1", interval_seconds=0.02, baseline=Baseline(100.0)) for _ in range(2)
    ]
    began = time.monotonic()
    jobs = [Job(tmp_path / str(rank), rank=rank) for rank in range(2)]
    for job in jobs:
        job.runtime.job.progress = lambda: {"samples_done": int((time.monotonic() - began) * 150)}

    def look() -> None:
        eventually(lambda: metrics[0].endpoint)
        eventually(lambda: value(scrape(metrics[0]), "distributed_scaling_efficiency_percent") is not None)
        percent = value(scrape(metrics[0]), "distributed_scaling_efficiency_percent")
        assert percent == pytest.approx(75, abs=3)  # 150 of 2 x 100 samples per second

    jobs[0].run([metrics[0]], look=look)
    jobs[1].run([metrics[1]])
    text = (tmp_path / "1" / "run" / "metrics" / "rank1.1.prom").read_text()
    assert "distributed_scaling_efficiency_percent " not in text


@pytest.mark.parametrize(
    ("owner", "function"), [(Path, "write_bytes"), (Path, "mkdir"), (Path, "iterdir"), (exposition, "read_file")]
)
def test_a_run_whose_disk_fails_all_the_time_has_all_its_predictions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: Any, function: str
) -> None:
    real = getattr(owner, function)
    failed: list[str] = []

    def fail(path: Path, *args: Any, **kwargs: Any) -> Any:
        if threading.current_thread().name.startswith("gpuorch-"):
            failed.append(function)
            raise OSError(errno.EIO, "injected")
        return real(path, *args, **kwargs)

    before = observer_failures.count("metrics")
    monkeypatch.setattr(owner, function, fail)
    metrics, health = exporting(tmp_path, textfile=tmp_path / "text" / "job.prom"), GPUHealthMonitor(0.02)
    outputs = predict([metrics, health], lambda: eventually(lambda: len(failed) > 3))
    assert torch.cat(outputs).flatten().tolist() == [2.0 * i for i in range(20)]
    assert observer_failures.count("metrics") > before


def test_a_sick_gpu_is_told_to_the_job_shown_in_metrics_and_recorded(tmp_path: Path, gpus: FakeNVML) -> None:
    metrics = PrometheusMetrics(0, address="127.0.0.1", interval_seconds=0.02)
    own: list[HealthReport] = []
    health = GPUHealthMonitor(0.02, devices=[gpus.uuid(0), gpus.uuid(2)], on_verdict=own.append)
    job = Job(tmp_path)

    def look() -> None:
        eventually(lambda: metrics.endpoint)
        eventually(lambda: value(scrape(metrics), "gpu_health_status", rank="1") == 0)
        series = scrape(metrics)
        assert value(series, "gpu_temperature_celsius", rank="1") == 45
        assert value(series, "gpu_memory_usage_bytes", rank="1") == 20_000_000_000
        assert value(series, "gpu_memory_limit_bytes", rank="1") == 85_520_809_984
        assert value(series, "gpu_sm_clock_hertz", rank="1") == 1.98e9
        gpus.send_xid(0, 79)  # another rank's
        gpus.set_key(2, "nvlink:1", 0)
        eventually(lambda: value(scrape(metrics), "gpu_health_status", rank="1") == 2)
        gpus.send_xid(2, 79)
        eventually(lambda: value(scrape(metrics), "gpu_health_status", rank="1") == 3)
        eventually(lambda: value(scrape(metrics), "gpu_xid_errors_total", rank="1") == 1)
        eventually(lambda: len(job.verdicts) == 2)

    with EventLog(tmp_path / "events", "rank") as events:
        use_events(events)
        job.run([metrics, health], look=look)
    assert [report.verdict for report in job.verdicts] == [Verdict.DRAIN, Verdict.FAILED]
    assert job.verdicts[1].evidence[0] == "xid_79: GPU has fallen off the bus"
    assert own == job.verdicts
    recorded, _ = read_events(tmp_path / "events")
    assert [line for event in recorded for line in check_event(event)] == []
    verdicts = [(e["previous"], e["verdict"], e["device"]) for e in recorded if e["kind"] == "verdict"]
    assert verdicts == [("healthy", "drain", gpus.uuid(2)), ("drain", "failed", gpus.uuid(2))]
    assert any(e["kind"] == "device" and e["temperature_celsius"] == 45 for e in recorded)


def test_a_wedged_driver_makes_no_step_slower(tmp_path: Path, gpus: FakeNVML) -> None:
    health = GPUHealthMonitor(0.02, devices=[gpus.uuid(0)], stale_after_seconds=0.2)
    job = Job(tmp_path, rank=0)
    seconds: list[float] = []

    def look() -> None:
        assert health.monitor is not None
        health.monitor.wait_for_reading(10)
        gpus.set_key(0, "delay:*", 1200)
        eventually(lambda: health.monitor.check_health().verdict is Verdict.UNKNOWN)  # type: ignore[union-attr]
        for i in range(2000):
            began = time.perf_counter()
            health.on_predict_batch_end(trainer=job, pl_module=None, outputs=None, batch=None, batch_idx=i)
            seconds.append(time.perf_counter() - began)

    job.run([health], look=look)
    assert sorted(seconds)[len(seconds) // 2] < 5e-6
    gpus.set_key(0, "delay:*", 0)


def test_all_hooks_of_a_step_cost_under_five_microseconds_each(tmp_path: Path) -> None:
    metrics = exporting(tmp_path)
    job = Job(tmp_path)
    metrics.on_predict_start(trainer=job, pl_module=None)
    try:
        best = float("inf")
        for _ in range(20):
            began = time.perf_counter()
            for i in range(200):
                metrics.on_predict_batch_start(trainer=job, pl_module=None, batch=None, batch_idx=i)
                metrics.on_predict_batch_end(trainer=job, pl_module=None, outputs=None, batch=None, batch_idx=i)
            best = min(best, (time.perf_counter() - began) / 200)
    finally:
        metrics.on_predict_end(trainer=job, pl_module=None)
    print(f"PrometheusMetrics: {best * 1e6:.2f} us per step")
    assert best < 10e-6  # 5 on a quiet machine; tests share theirs


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"port": 70000}, "port=70000"),
        ({"textfile": "job.txt"}, r"textfile='job\.txt' must end in \.prom"),
        ({"interval_seconds": 0}, "interval_seconds=0"),
    ],
)
def test_bad_arguments_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        PrometheusMetrics(**options)


def test_a_rank_without_a_named_gpu_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="devices names 1 GPUs; rank 1 has none"):
        GPUHealthMonitor(devices=["GPU-a"]).on_predict_start(trainer=Job(tmp_path), pl_module=None)
