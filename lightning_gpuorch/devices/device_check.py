"""Whether a device can be computed on; run as ``python -m lightning_gpuorch.devices.device_check INDEX``.

Multiplies two small matrices and compares the result, then reads the GPU's health through NVML. The answer is one line
of JSON: ``{"ok": ..., "evidence": ..., "uuid": ...}``.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import pynvml
import torch

from lightning_gpuorch.control.bootstrap import die_with_parent
from lightning_gpuorch.devices.nvml import DeviceIdentity, DeviceNotFoundError, NVMLReader, nvml_session
from lightning_gpuorch.devices.verdict import Verdict, judge_reading


def check_cuda_device(index: int) -> dict[str, Any]:
    """Compute on a CUDA device and read its health.

    Args:
        index: CUDA ordinal.
    """
    device = torch.device("cuda", index)
    uuid = str(getattr(torch.cuda.get_device_properties(device), "uuid", "")) or None
    wrong = check_arithmetic(device)
    if wrong is not None:
        return {"ok": False, "evidence": wrong, "uuid": uuid}
    evidence = read_failures(index)
    return {"ok": not evidence, "evidence": "; ".join(evidence), "uuid": uuid}


def check_arithmetic(device: torch.device, size: int = 512) -> str | None:
    """Multiply integers small enough for an exact result; says what is wrong, if anything."""
    rows = torch.arange(size, dtype=torch.float32, device=device) % 7
    left, right = rows.repeat(size, 1), rows.repeat(size, 1).T
    expected = float((rows.cpu() ** 2).sum())
    found = left @ right
    low, high = found.min().item(), found.max().item()
    return None if low == high == expected else f"a matrix product is {low:g} to {high:g} where it must be {expected:g}"


def read_failures(index: int) -> list[str]:
    """What NVML reports of a GPU that forbids using it; nothing where NVML cannot tell."""
    try:
        with nvml_session():
            reading = NVMLReader(DeviceIdentity.of_cuda_device(index)).read()
    except DeviceNotFoundError:
        return []
    except pynvml.NVMLError as error:
        return ["the driver has lost the GPU"] if error.value == pynvml.NVML_ERROR_GPU_IS_LOST else []
    return [str(finding) for finding in judge_reading(reading, reading) if finding.verdict >= Verdict.DRAIN]


if __name__ == "__main__":
    die_with_parent()
    sys.stdout.write(json.dumps(check_cuda_device(int(sys.argv[1]))) + "\n")
