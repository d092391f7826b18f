"""Checks of devices before a generation starts: each in a process of its own, because a sick driver may never answer.

The process is :mod:`lightning_gpuorch.devices.device_check`; no answer in time is an answer as well. The supervisor waits for
it and itself touches neither CUDA nor NVML.
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

from lightning_gpuorch.control.bootstrap import PARENT

COMMAND = (sys.executable, "-m", "lightning_gpuorch.devices.device_check")
"""What is run, with the device's index as its last argument."""


@dataclass(frozen=True)
class PreflightResult:
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

    def poll(self) -> PreflightResult | None:
        """What was found; None while it is not known."""
        if self._process.poll() is None:
            if time.monotonic() < self._deadline:
                return None
            self.cancel()
            return PreflightResult(False, f"it did not answer within {self._timeout_seconds:g} s")
        output, errors = (text.decode(errors="replace").strip() for text in self._process.communicate())
        try:
            answer = json.loads(output.splitlines()[-1])
            return PreflightResult(bool(answer["ok"]), str(answer.get("evidence", "")), answer.get("uuid"))
        except (IndexError, ValueError, KeyError, TypeError):
            last = errors.splitlines()[-1] if errors else "it said nothing"
            return PreflightResult(False, f"the check ended with exit code {self._process.returncode}: {last}")

    def cancel(self) -> None:
        """End the check. A process that the driver does not release is left behind."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            try:
                self._process.wait(2)
            except subprocess.TimeoutExpired:
                return
        for stream in (self._process.stdout, self._process.stderr):
            if stream is not None:
                stream.close()
