"""Memory of this machine and of this process, also in a container without ``/proc``."""

from __future__ import annotations

import os
import resource

import psutil


def host_memory_bytes() -> int:
    """Memory of this machine; told also where there is no ``/proc``."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def resident_bytes() -> int:
    """Memory that this process has; where there is no ``/proc``, the most it has had."""
    try:
        return int(psutil.Process().memory_info().rss)
    except (psutil.Error, OSError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
