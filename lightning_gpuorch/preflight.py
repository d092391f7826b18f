"""Can a device be computed on? Asked in a process of its own, because a sick driver may never answer.

Run as ``python -m lightning_gpuorch.preflight INDEX``: multiplies two small matrices and compares the result, then reads
the GPU's health through NVML. The answer is one line of JSON, ``{"ok": ..., "evidence": ..., "uuid": ...}``; no answer
in time is one as well. The supervisor asks before each generation, and itself touches neither CUDA nor NVML.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lightning_gpuorch._bootstrap import PARENT, die_with_parent

COMMAND = (sys.executable, "-m", "lightning_gpuorch.preflight")
"""What is run, with the device's index as its last argument."""


@dataclass(frozen=True)
class Finding:
    """What a preflight found.

    Attributes:
        ok: Whether the device can be used.
        evidence: What speaks against it.
        uuid: NVML's name for the device, if it was told.
    """

    ok: bool
    evidence: str = ""
    uuid: str | None = None


class Preflight:
    """One check that is under way.

    Args:
        index: CUDA ordinal of the device.
        timeout_seconds: No answer for so long counts against the device.
        command: What to run instead of :data:`COMMAND`; the index is added.
    """

    def __init__(self, index: int, timeout_seconds: float, command: Sequence[str] = ()):
        self._deadline = time.monotonic() + timeout_seconds
        self._timeout_seconds = timeout_seconds
        self._process = subprocess.Popen(
            [*(command or COMMAND), str(index)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, PARENT: str(os.getpid())},
            start_new_session=True,
        )

    def poll(self) -> Finding | None:
        """What was found; None while it is not known."""
        if self._process.poll() is None:
            if time.monotonic() < self._deadline:
                return None
            self.cancel()
            return Finding(False, f"it did not answer within {self._timeout_seconds:g} s")
        output, errors = (text.decode(errors="replace").strip() for text in self._process.communicate())
        try:
            answer = json.loads(output.splitlines()[-1])
            return Finding(bool(answer["ok"]), str(answer.get("evidence", "")), answer.get("uuid"))
        except (IndexError, ValueError, KeyError, TypeError):
            last = errors.splitlines()[-1] if errors else "it said nothing"
            return Finding(False, f"the check ended with exit code {self._process.returncode}: {last}")

    def cancel(self) -> None:
        """End the check. A process that the driver does not let go is left behind."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            try:
                self._process.wait(2)
            except subprocess.TimeoutExpired:
                return
        for stream in (self._process.stdout, self._process.stderr):
            if stream is not None:
                stream.close()


def check_cuda_device(index: int) -> dict[str, Any]:
    """Compute on a CUDA device and read its health; runs in the child.

    Args:
        index: CUDA ordinal.
    """
    import torch

    device = torch.device("cuda", index)
    uuid = str(getattr(torch.cuda.get_device_properties(device), "uuid", "")) or None
    wrong = check_arithmetic(device)
    if wrong is not None:
        return {"ok": False, "evidence": wrong, "uuid": uuid}
    evidence = read_failures(index)
    return {"ok": not evidence, "evidence": "; ".join(evidence), "uuid": uuid}


def check_arithmetic(device: Any, size: int = 512) -> str | None:
    """Multiply integers small enough for an exact result; says what is wrong, if anything."""
    import torch

    rows = torch.arange(size, dtype=torch.float32, device=device) % 7
    left, right = rows.repeat(size, 1), rows.repeat(size, 1).T
    expected = float((rows.cpu() ** 2).sum())
    found = left @ right
    low, high = found.min().item(), found.max().item()
    return None if low == high == expected else f"a matrix product is {low:g} to {high:g} where it must be {expected:g}"


def read_failures(index: int) -> list[str]:
    """What NVML reports of a GPU that forbids using it; nothing where NVML cannot tell."""
    import pynvml

    from lightning_gpuorch.health.devices import DeviceIdentity, DeviceNotFoundError, NVMLReader, nvml_session
    from lightning_gpuorch.health.verdict import Verdict, judge_reading

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
