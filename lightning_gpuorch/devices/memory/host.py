"""Host memory that a step frees is kept for the next one, as a GPU's allocator does."""

from __future__ import annotations

import ctypes
import logging
import os

log = logging.getLogger(__name__)

KEPT_BYTES = 2**30
"""Free memory at the end of the heap up to which none is given back to the system."""
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h
_LARGEST_MMAP_THRESHOLD_BYTES = 2**25  # glibc takes no more


def keep_freed_memory() -> bool:
    """Let glibc's malloc keep what is freed, so that a step on the CPU does not fault in all its pages again.

    Activations of some megabytes are otherwise given back to the system and asked for again in every step. Settings of
    the user's (``MALLOC_TRIM_THRESHOLD_``, ``MALLOC_MMAP_THRESHOLD_``, ``GLIBC_TUNABLES``) are left alone.

    Returns:
        Whether that was set; False where there is another malloc.
    """
    if any(name in os.environ for name in ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        log.debug("this system's malloc has no mallopt")
        return False
    settings = ((_M_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD_BYTES), (_M_TRIM_THRESHOLD, KEPT_BYTES))
    return all(mallopt(which, value) for which, value in settings)
