"""Random state that code in between must not move: what is seeded gives then what it gives on a single device."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator

import numpy as np
import torch


@contextlib.contextmanager
def keep_random_state() -> Iterator[None]:
    """Put the global random states of Python, NumPy and torch (on the CPU) back at the end."""
    python, numpy, torchs = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(torchs)
