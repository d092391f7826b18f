"""Fixtures of GPUs behind the real pynvml."""

from tests.support.gpus import fake_library, gpus, tally  # noqa: F401
