"""The text generation example runs as its docstring says."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")
ROOT = Path(__file__).parents[2]


def test_generate_text() -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(ROOT / "examples/generate_text.py"), "--max-new-tokens", "4", "--sample"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=150, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Tensor-parallel plan for 2 ranks" in done.stdout
    prompts = [list(range(5, 13)), list(range(13, 21))]
    lines = [line for line in done.stdout.splitlines() if line.startswith("[")]
    assert len(lines) == 2
    for line, prompt in zip(lines, prompts, strict=True):
        assert line.startswith(str(prompt)[:-1])
