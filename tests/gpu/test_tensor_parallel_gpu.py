"""Weights read by part straight to a device, and a group on two of them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import lightning_gpuorch
from lightning_gpuorch.parallel.tensor_parallel import empty_parameters

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]

SCRIPTS = Path(__file__).parents[1] / "jobs" / "scripts"


def test_a_model_on_meta_is_read_to_the_device(tmp_path: Path) -> None:
    torch.manual_seed(0)
    whole = nn.Sequential(nn.Linear(64, 256), nn.BatchNorm1d(256), nn.Linear(256, 8)).eval()
    save_file(whole.state_dict(), tmp_path / "model.safetensors")
    with empty_parameters():
        model = nn.Sequential(nn.Linear(64, 256), nn.BatchNorm1d(256), nn.Linear(256, 8))
    orchestrator = lightning_gpuorch.MultiGPUOrchestrator()
    orchestrator.initialize(device="cuda:0")
    model = orchestrator.load_distributed_model(tmp_path / "model.safetensors", model)
    assert {value.device.type for value in (*model.parameters(), *model.buffers())} == {"cuda"}
    batch = torch.randn(5, 64)
    with torch.no_grad():
        torch.testing.assert_close(orchestrator.run_inference_step(batch).cpu(), whole(batch), atol=1e-3, rtol=1e-3)
    orchestrator.cleanup()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_group_of_two_devices(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPTS / "tp_nccl.py"), "--result", str(tmp_path / "result.json")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=170, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["difference"] < 1e-3
    assert result["size"] == 2
