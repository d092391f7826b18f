"""What NVML reports of a real GPU."""

from __future__ import annotations

import subprocess
import sys

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader

from lightning_gpuorch.callbacks import GPUHealthMonitor
from lightning_gpuorch.devices.monitor import HealthReport
from lightning_gpuorch.devices.nvml import DeviceIdentity, NVMLReader, nvml_session
from lightning_gpuorch.devices.verdict import Verdict, judge_reading

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]


def test_a_healthy_gpu_is_read_and_judged() -> None:
    ballast = torch.zeros(2**28, device="cuda")  # 1 GiB
    with nvml_session():
        reading = NVMLReader(DeviceIdentity.of_cuda_device(0)).read()
    print(reading)
    assert reading.memory_used_bytes is not None
    assert reading.memory_used_bytes > ballast.nbytes
    assert reading.memory_total_bytes is not None
    assert abs(reading.memory_total_bytes - torch.cuda.get_device_properties(0).total_memory) < 2**31
    assert reading.temperature_celsius is not None
    assert 10 < reading.temperature_celsius < 100
    assert not [finding for finding in judge_reading(reading, reading) if finding.verdict >= Verdict.DRAIN]


def test_doctor_finds_a_gpu_that_can_be_used() -> None:
    command = [sys.executable, "-m", "lightning_gpuorch", "doctor"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=150, check=False)
    print(done.stdout)
    assert torch.cuda.get_device_name(0) in done.stdout, done.stdout + done.stderr
    assert "NCCL" in done.stdout


class Watched(pl.LightningModule):
    def __init__(self, callback: GPUHealthMonitor) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))
        self.callback = callback
        self.report: HealthReport | None = None

    def predict_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        assert self.callback.monitor is not None
        self.report = self.callback.monitor.wait_for_reading(30)
        return batch * self.weight


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore:.*LeafSpec.*")
def test_the_callback_watches_the_gpu_of_its_rank() -> None:
    callback = GPUHealthMonitor(0.1)
    trainer = pl.Trainer(
        callbacks=[callback], accelerator="gpu", devices=1, logger=False, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False,
    )  # fmt: skip
    model = Watched(callback)
    trainer.predict(model, DataLoader(torch.arange(4.0).reshape(4, 1)))  # type: ignore[arg-type]
    assert model.report is not None
    assert model.report.verdict in (Verdict.HEALTHY, Verdict.DEGRADED), model.report
    assert model.report.reading is not None
    assert str(torch.cuda.get_device_properties(0).uuid) in model.report.reading.device
