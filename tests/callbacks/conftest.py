"""Fixtures of GPUs behind the real pynvml."""

from tests.support.gpus import _clean_process, fake_library, gpus, tally  # noqa: F401
