"""Prometheus metrics of predict loops, for Trainer and Fabric."""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback

from lightning_gpuorch.callbacks._rank import RankInfo, batch_length
from lightning_gpuorch.devices.host_memory import host_memory_bytes, resident_bytes
from lightning_gpuorch.errors import ConfigurationError
from lightning_gpuorch.paths import local_path
from lightning_gpuorch.telemetry.current import current_metrics, use_metrics
from lightning_gpuorch.telemetry.failures import observer_failures
from lightning_gpuorch.telemetry.metrics.efficiency import Baseline, ScalingEfficiency
from lightning_gpuorch.telemetry.metrics.exporter import MetricsExporter
from lightning_gpuorch.telemetry.metrics.exposition import snapshot_name
from lightning_gpuorch.telemetry.metrics.rank_metrics import RankMetrics

log = logging.getLogger(__name__)

_PROGRESS_INTERVAL_SECONDS = 2.0


class PrometheusMetrics(Callback):
    """Counts steps, samples, step times and memory, and serves them on one endpoint per node.

    The metrics of all ranks of a node are on ``http://<node>:<port>/metrics``, dead ranks' counters included; which
    rank serves them is decided again whenever the serving one dies. What other parts of the plugin have to tell (OOMs,
    collectives, the health of the GPU) is shown as well while this callback is active.

    The time of a step is what passes between the callback's batch hooks. Work that is queued on the device and not
    waited for is not in it; with this plugin's strategy outputs are copied to the host within the step, so that it is.

    No failure of this callback ends the run: it is counted as ``gpuorch_observer_failures_total``.

    Args:
        port: Port to serve on; the next free one if a foreign process has it (``<directory>/endpoint`` says which); 0
            takes any; None serves nothing.
        directory: Where ranks of a node exchange their metrics; by default ``metrics`` in the run directory, or a
            temporary directory.
        address: Interface to serve on.
        textfile: A ``.prom`` file that is kept up to date, for node_exporter's textfile collector.
        interval_seconds: Time between two snapshots.
        baseline: Of one device, for ``distributed_scaling_efficiency_percent``: a file of ``gpuorch calibrate``, or a
            ready baseline. Without one the series is absent, as it is when the file is for another model, device, batch
            size or version, which the log then says. Only this plugin's strategy knows the progress of the whole job.

    Raises:
        ConfigurationError: An argument cannot be used.
    """

    def __init__(
        self,
        port: int | None = 9400,
        directory: str | os.PathLike[str] | None = None,
        *,
        address: str = "127.0.0.1",
        textfile: str | os.PathLike[str] | None = None,
        interval_seconds: float = 1.0,
        baseline: Baseline | str | os.PathLike[str] | None = None,
    ):
        if port is not None and not 0 <= port <= 65535:
            raise ConfigurationError(f"port={port} must be between 0 and 65535, or None to serve nothing.")
        directory = None if directory is None else local_path(directory, "directory")
        if textfile is not None and local_path(textfile, "textfile").suffix != ".prom":
            raise ConfigurationError(f"textfile={os.fspath(textfile)!r} must end in .prom, or nothing reads it.")
        if interval_seconds <= 0:
            raise ConfigurationError(f"interval_seconds={interval_seconds} must be greater than 0.")
        self._port, self._directory, self._address = port, directory, address
        self._textfile, self._interval_seconds = textfile, interval_seconds
        self._baseline = baseline
        self._efficiency: ScalingEfficiency | None = None
        self._wants_efficiency = False
        self._looked_at = 0.0
        self._info: RankInfo | None = None
        self._metrics: RankMetrics | None = None
        self._exporter: MetricsExporter | None = None
        self._temporary: Path | None = None
        self._step_began: float | None = None
        self._job: Any = None
        self._samples_before = 0

    @property
    def metrics(self) -> RankMetrics | None:
        """This rank's metrics, once a predict loop has begun."""
        return self._metrics

    @property
    def endpoint(self) -> tuple[str, int] | None:
        """Address and port on which this rank serves the metrics of its node, or None if it does not."""
        return self._exporter.endpoint if self._exporter is not None else None

    def on_predict_start(self, trainer: Any, pl_module: Any) -> None:
        """Begin to export; a second loop in the same process goes on counting."""
        if self._exporter is not None:
            return
        info = self._info = RankInfo.of(trainer)
        if self._metrics is None:
            self._metrics = RankMetrics(
                info.rank, generation=info.generation, replica=info.replica, counts_samples=info.is_leader
            )
        use_metrics(self._metrics)
        directory = self._directory
        if directory is None and info.run_directory is not None:
            directory = info.run_directory / "metrics"
        if directory is None:
            directory = self._temporary = info.node_directory()
            try:
                directory.mkdir(mode=0o700, exist_ok=True)
            except OSError as error:
                observer_failures.add("metrics", error)
        self._wants_efficiency = self._baseline is not None and info.rank == 0
        self._exporter = MetricsExporter(
            self._metrics.registry,
            directory,
            rank=info.rank,
            generation=info.generation,
            port=self._port,
            address=self._address,
            textfile=self._textfile,
            interval_seconds=self._interval_seconds,
            before_snapshot=self._before_snapshot,
        )

    def on_predict_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Note the time."""
        self._step_began = time.perf_counter()

    def on_predict_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Count the step."""
        began, metrics = self._step_began, self._metrics
        if began is None or metrics is None or self._info is None:
            return
        seconds = time.perf_counter() - began
        self._step_began = None
        metrics.observe_step(seconds, self._count_samples(batch))

    def _count_samples(self, batch: Any) -> int:
        assert self._info is not None
        job = getattr(self._info.runtime, "job", None)
        if job is None:
            return batch_length(batch)
        if job is not self._job:
            self._job, self._samples_before = job, 0
        before, self._samples_before = self._samples_before, job.samples
        return max(0, self._samples_before - before)

    def on_predict_end(self, trainer: Any, pl_module: Any) -> None:
        """Write the last figures and stop serving."""
        self._finish()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Write the last figures and stop serving."""
        self._finish()

    def teardown(self, trainer: Any, pl_module: Any, stage: str = "predict") -> None:
        """Stop, however the loop was left."""
        self._finish()

    def _finish(self) -> None:
        exporter, self._exporter = self._exporter, None
        if exporter is None:
            return
        exporter.close()
        if current_metrics() is self._metrics:
            use_metrics(None)
        if self._temporary is not None and self._info is not None:
            _remove(self._temporary, self._info)

    def _before_snapshot(self) -> None:
        self._observe_memory()
        self._observe_efficiency()

    def _observe_efficiency(self) -> None:
        now = time.monotonic()
        if not self._wants_efficiency or self._metrics is None or now - self._looked_at < _PROGRESS_INTERVAL_SECONDS:
            return
        self._looked_at = now
        info = self._info
        job = getattr(info.runtime, "job", None) if info is not None else None
        if job is None or info is None:
            return
        if self._efficiency is None:
            baseline = self._load_baseline(info.runtime)
            if baseline is None:
                self._wants_efficiency = False
                return
            self._efficiency = ScalingEfficiency(baseline, info.world_size)
        progress = job.progress()
        if "samples_done" in progress:
            self._metrics.set_scaling_efficiency(self._efficiency.update(now, progress["samples_done"]))

    def _load_baseline(self, runtime: Any) -> Baseline | None:
        """The baseline, if it is one for this run; it is only known now what is run."""
        if self._baseline is None or isinstance(self._baseline, Baseline):
            return self._baseline
        try:
            return Baseline.load(self._baseline, runtime.measured_with())
        except (ConfigurationError, OSError) as error:
            log.warning("distributed_scaling_efficiency_percent is left out: %s", error)
            return None

    def _observe_memory(self) -> None:
        """In the exporting thread: memory figures, unless a health monitor provides better ones."""
        metrics, info = self._metrics, self._info
        if metrics is None or info is None or metrics.device_is_observed:
            return
        if info.device.type == "cuda":  # the allocator's own books: the driver, which may hang, is not asked
            metrics.memory_usage.set(torch.cuda.memory_reserved(info.device))
            metrics.memory_limit.set(torch.cuda.get_device_properties(info.device).total_memory)
        else:
            metrics.memory_usage.set(resident_bytes())
            metrics.memory_limit.set(host_memory_bytes())


def _remove(directory: Path, info: RankInfo) -> None:
    """Take this rank's file away; who is last takes the directory."""
    try:
        (directory / snapshot_name(info.rank, info.generation)).unlink(missing_ok=True)
        if not any(directory.glob("rank*.prom")):
            (directory / "endpoint").unlink(missing_ok=True)
            directory.rmdir()
    except OSError as error:
        observer_failures.add("metrics", error)
