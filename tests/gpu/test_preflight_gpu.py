"""The check of a real GPU, in a process of its own."""

import time

import pytest
import torch

from lightning_gpuorch.devices.preflight import Preflight

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def test_a_healthy_gpu_passes_and_is_named():
    check = Preflight(0, timeout_seconds=120)
    deadline = time.monotonic() + 150
    while (found := check.poll()) is None:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert found.ok, found.evidence
    assert found.uuid == str(torch.cuda.get_device_properties(0).uuid)


def test_a_gpu_that_is_not_there_does_not_pass():
    check = Preflight(torch.cuda.device_count(), timeout_seconds=120)
    deadline = time.monotonic() + 150
    while (found := check.poll()) is None:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert not found.ok
