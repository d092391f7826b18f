"""Checks of a device in real processes: those that answer, crash, or never come back."""

import sys
import time

import psutil
import pytest
import torch

from lightning_gpuorch.devices.device_check import check_arithmetic
from lightning_gpuorch.devices.preflight import Preflight


def _find(code, timeout_seconds=30.0):
    check = Preflight(7, timeout_seconds, (sys.executable, "-c", code))
    deadline = time.monotonic() + 60
    while (found := check.poll()) is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return found, check


def test_an_answer_is_taken():
    found, _ = _find("import sys, json; print(json.dumps({'ok': True, 'uuid': 'GPU-' + sys.argv[1]}))")
    assert (found.ok, found.uuid) == (True, "GPU-7")


@pytest.mark.parametrize(
    ("code", "evidence"),
    [
        ("raise SystemError('CUDA error: unspecified launch failure')", "exit code 1: SystemError: CUDA error"),
        ("import os; os.abort()", "exit code -6"),
        ("print('hello')", "exit code 0: it said nothing"),
        ("import json; print(json.dumps({'ok': False, 'evidence': 'wrong sum'}))", "wrong sum"),
    ],
)
def test_anything_else_counts_against_the_device(code, evidence):
    found, _ = _find(code)
    assert not found.ok
    assert evidence in found.evidence


def test_no_answer_in_time_counts_and_the_process_is_gone():
    found, check = _find("import time; time.sleep(600)", timeout_seconds=0.5)
    assert found.evidence == "it did not answer within 0.5 s"
    assert not psutil.pid_exists(check._process.pid)


def test_arithmetic_is_exact_and_a_wrong_result_is_seen(monkeypatch):
    assert check_arithmetic(torch.device("cpu")) is None
    real = torch.Tensor.__matmul__
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda a, b: real(a, b).index_fill(0, torch.tensor(3), 0.0))
    assert "where it must be" in check_arithmetic(torch.device("cpu"))
