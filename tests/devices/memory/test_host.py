"""What keeping freed host memory does, in processes of their own."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

SCRIPT = """
import resource, sys
import numpy as np
from lightning_gpuorch.devices.memory import keep_freed_memory

print(keep_freed_memory() if sys.argv[1] == "keep" else None)

def step():
    return [np.ones(2_000_000) for _ in range(6)]  # 16 MB each

for _ in range(3):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(how: str, **environment: str) -> tuple[str, int]:
    command = [sys.executable, "-c", SCRIPT, how]
    ended = subprocess.run(
        command, env=os.environ | environment, capture_output=True, text=True, timeout=60, check=True
    )
    said, count = ended.stdout.split()
    return said, int(count)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_steps_fault_their_memory_in_once() -> None:
    pages_of_a_step = 6 * 16_000_000 // os.sysconf("SC_PAGE_SIZE")
    assert faults("keep") == ("True", pytest.approx(0, abs=pages_of_a_step // 10))
    assert faults("leave")[1] > pages_of_a_step, "what is measured is there without it"


def test_what_the_user_has_set_is_left_alone() -> None:
    assert faults("keep", MALLOC_TRIM_THRESHOLD_="1000000")[0] == "False"
