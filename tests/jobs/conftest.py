"""Fixtures of GPUs behind the real pynvml."""

from tests.support.gpus import fake_library  # noqa: F401
