"""Checks of a machine that is to run jobs, each with what should be changed.

Each check stands alone and says what it saw, whether that is good enough, and what to do if not. Nothing is changed and
nothing is contacted.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import itertools
import os
import platform
import resource
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from lightning_gpuorch.devices.nvml import DeviceIdentity, DeviceNotFoundError, NVMLReader, nvml_session
from lightning_gpuorch.devices.verdict import Verdict, judge_reading
from lightning_gpuorch.errors import GPUOrchError
from lightning_gpuorch.paths import Location, ObjectPath, location
from lightning_gpuorch.predictions.storage.stores import check_writable

_GIB = 2**30
_MIN_SHARED_MEMORY_BYTES = _GIB
_MIN_FILE_DESCRIPTORS = 4096
_MIN_FREE_DISK_BYTES = 5 * _GIB
_WITHDRAWN_LIGHTNING = frozenset({"2.6.2", "2.6.3"})


class CheckStatus(Enum):
    """How a check ended."""

    GOOD = "good"
    WARNING = "warning"
    BAD = "bad"


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Attributes:
        name: What.
        outcome: How it is.
        seen: What was seen.
        advice: What to do about it, if anything.
    """

    name: str
    outcome: CheckStatus
    seen: str
    advice: str = ""


def examine(output_dir: str | os.PathLike[str] | ObjectPath = ".") -> list[Check]:
    """Look at everything.

    Args:
        output_dir: Where results would go.

    Returns:
        The checks. One that itself fails is a warning that says so.
    """
    checks: list[Check] = []
    parts: tuple[tuple[str, Callable[[], Sequence[Check]]], ...] = (
        ("versions", check_versions),
        ("GPUs", check_gpus),
        ("peer access", check_peer_access),
        ("shared memory", lambda: [check_shared_memory()]),
        ("file descriptors", lambda: [check_file_descriptors()]),
        ("disk", lambda: [check_results(location(output_dir, "output_dir"))]),
        ("clock", lambda: [check_clock()]),
    )
    for name, part in parts:
        try:
            checks += part()
        except Exception as error:  # noqa: BLE001 - the other checks are still worth having
            checks.append(Check(name, CheckStatus.WARNING, f"could not be checked: {type(error).__name__}: {error}"))
    return checks


def exit_code(checks: Sequence[Check]) -> int:
    """0 if nothing is bad, else the code for configuration errors."""
    return os.EX_CONFIG if any(check.outcome is CheckStatus.BAD for check in checks) else 0


def describe(checks: Sequence[Check]) -> str:
    """The checks as text, one line each, with advice below."""
    width = max((len(check.name) for check in checks), default=0)
    lines = []
    for check in checks:
        mark = {CheckStatus.GOOD: "ok  ", CheckStatus.WARNING: "warn", CheckStatus.BAD: "BAD "}[check.outcome]
        lines.append(f"{mark}  {check.name:<{width}}  {check.seen}")
        if check.advice:
            lines.append(f"      {'':<{width}}  -> {check.advice}")
    return "\n".join(lines)


def check_versions() -> list[Check]:
    """Python, torch, Lightning and the rest; withdrawn releases are bad."""
    checks = [Check("python", CheckStatus.GOOD, f"{platform.python_version()} on {platform.platform()}")]
    for name in ("torch", "lightning", "nvidia-ml-py", "prometheus-client", "safetensors"):
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            checks.append(Check(name, CheckStatus.BAD, "not installed", f"pip install {name}"))
            continue
        if name == "lightning" and version in _WITHDRAWN_LIGHTNING:
            advice = "install another release: this one was withdrawn after a supply-chain compromise"
            checks.append(Check(name, CheckStatus.BAD, version, advice))
        else:
            checks.append(Check(name, CheckStatus.GOOD, version))
    return checks


def check_gpus() -> list[Check]:
    """Every GPU the driver knows, and its verdict."""
    import pynvml

    checks = []
    try:
        with nvml_session():
            checks.append(Check("driver", CheckStatus.GOOD, str(pynvml.nvmlSystemGetDriverVersion())))
            for index in range(pynvml.nvmlDeviceGetCount()):
                checks.append(_check_gpu(index))
            checks += _check_topology()
    except DeviceNotFoundError as error:
        return [Check("GPUs", CheckStatus.WARNING, str(error), "without NVIDIA's driver, jobs run on the CPU")]
    return checks


def _check_gpu(index: int) -> Check:
    import pynvml

    name = f"GPU {index}"
    try:
        handle = pynvml.nvmlDeviceGetHandleByIndex(index)
        reading = NVMLReader(DeviceIdentity(uuid=str(pynvml.nvmlDeviceGetUUID(handle)))).read()
        model = str(pynvml.nvmlDeviceGetName(handle))
    except pynvml.NVMLError as error:
        return Check(name, CheckStatus.BAD, f"cannot be read: {error}", "reset the GPU or reboot the node")
    found = judge_reading(reading, reading)
    verdict = found[0].verdict if found else Verdict.HEALTHY
    used, total = reading.memory_used_bytes, reading.memory_total_bytes
    memory = f", {(total - used) / _GIB:.1f} of {total / _GIB:.1f} GiB free" if used is not None and total else ""
    seen = f"{model}{memory}, {verdict}"
    if verdict is Verdict.HEALTHY:
        return Check(name, CheckStatus.GOOD, seen)
    advice = "; ".join(str(finding) for finding in found)
    return Check(name, CheckStatus.BAD if verdict >= Verdict.DRAIN else CheckStatus.WARNING, seen, advice)


_LEVELS = {
    0: "on one board", 10: "behind one PCIe switch", 20: "behind several PCIe switches", 30: "behind one host bridge",
    40: "on one CPU socket", 50: "across CPU sockets",
}  # fmt: skip
"""NVML's ``nvmlGpuTopologyLevel``: the nearest thing that two GPUs share."""


_P2P_READ = 0
"""``NVML_P2P_CAPS_INDEX_READ``; a stray comma makes pynvml's own constant a tuple."""


def _check_topology() -> list[Check]:
    """How the GPUs hang together, and which pairs the driver lets read each other's memory."""
    import pynvml

    handles = {}
    for index in range(pynvml.nvmlDeviceGetCount()):
        try:
            handles[index] = pynvml.nvmlDeviceGetHandleByIndex(index)
        except pynvml.NVMLError:  # its own line has said so
            continue
    levels: dict[str, list[str]] = {}
    without = []
    for a, b in itertools.combinations(handles, 2):
        try:
            level = pynvml.nvmlDeviceGetTopologyCommonAncestor(handles[a], handles[b])
            status = pynvml.nvmlDeviceGetP2PStatus(handles[a], handles[b], _P2P_READ)
        except pynvml.NVMLError as error:
            return [Check("topology", CheckStatus.WARNING, f"the driver does not tell: {error}")]
        levels.setdefault(_LEVELS.get(level, f"level {level}"), []).append(f"{a}-{b}")
        if status != pynvml.NVML_P2P_STATUS_OK:
            without.append(f"{a}-{b}")
    if not levels:
        return []
    seen = "; ".join(f"{', '.join(pairs[:8])}{', ...' if len(pairs) > 8 else ''} {at}" for at, pairs in levels.items())
    if not without:
        return [Check("topology", CheckStatus.GOOD, f"{seen}; all pairs can read each other's memory")]
    advice = "tensor parallelism over these goes through host memory; keep a group on GPUs that are connected"
    return [Check("topology", CheckStatus.WARNING, f"{seen}; no peer access: {', '.join(without[:8])}", advice)]


def check_peer_access() -> list[Check]:
    """Whether GPUs reach each other's memory, and which NCCL there is."""
    import torch

    if not torch.cuda.is_available():
        built = torch.version.cuda
        seen = f"built for CUDA {built}, but sees no GPU" if built else "this torch is a build without CUDA"
        return [Check("NCCL", CheckStatus.GOOD if built is None else CheckStatus.WARNING, seen)]
    checks = [Check("NCCL", CheckStatus.GOOD, ".".join(map(str, torch.cuda.nccl.version())))]  # type: ignore[no-untyped-call]
    count = torch.cuda.device_count()
    pairs = [(a, b) for a in range(count) for b in range(a + 1, count)]
    without = [pair for pair in pairs if not torch.cuda.can_device_access_peer(*pair)]
    if not pairs:
        return checks
    if not without:
        return [*checks, Check("peer access", CheckStatus.GOOD, f"all {len(pairs)} pairs of GPUs")]
    some = ", ".join(f"{a}-{b}" for a, b in without[:8])
    advice = "tensor parallelism over these goes through host memory; keep a group on GPUs that are connected"
    return [
        *checks,
        Check("peer access", CheckStatus.WARNING, f"{len(without)} of {len(pairs)} pairs lack it: {some}", advice),
    ]


def check_shared_memory(path: Path = Path("/dev/shm")) -> Check:
    """DataLoader workers and NCCL exchange data in shared memory."""
    usage = shutil.disk_usage(path)
    seen = f"{usage.free / _GIB:.2f} of {usage.total / _GIB:.2f} GiB free in {path}"
    if usage.free >= _MIN_SHARED_MEMORY_BYTES:
        return Check("shared memory", CheckStatus.GOOD, seen)
    return Check("shared memory", CheckStatus.WARNING, seen, "give containers more: docker run --shm-size=8g")


def check_file_descriptors() -> Check:
    """Ranks, loaders' workers and part files each take some."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    seen = f"{soft} (at most {hard if hard != resource.RLIM_INFINITY else 'unlimited'})"
    if soft == resource.RLIM_INFINITY or soft >= _MIN_FILE_DESCRIPTORS:
        return Check("file descriptors", CheckStatus.GOOD, seen)
    return Check("file descriptors", CheckStatus.WARNING, seen, f"raise the limit: ulimit -n {_MIN_FILE_DESCRIPTORS}")


def check_results(directory: Location) -> Check:
    """Results must fit, and whatever keeps them must take them; an object store is tried."""
    if isinstance(directory, Path):
        return check_disk(directory)
    try:
        check_writable(directory)
    except GPUOrchError as error:
        return Check("object store", CheckStatus.BAD, str(error), "choose another output directory")
    return Check("object store", CheckStatus.GOOD, f"{directory} can be written, and creates an object once only")


def check_disk(directory: Path) -> Check:
    """Results must fit, and the directory must be writable."""
    existing = next(p for p in (directory.absolute(), *directory.absolute().parents) if p.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        return Check("disk", CheckStatus.BAD, f"{existing} is not writable", "choose another output directory")
    free = shutil.disk_usage(existing).free
    seen = f"{free / _GIB:.1f} GiB free in {existing}"
    if free >= _MIN_FREE_DISK_BYTES:
        return Check("disk", CheckStatus.GOOD, seen)
    return Check("disk", CheckStatus.WARNING, seen, "a full disk stops the job; it resumes once there is space")


def check_clock() -> Check:
    """Events of several nodes are put in order by their clocks."""
    synchronised = _clock_is_synchronised()
    if synchronised is None:
        return Check("clock", CheckStatus.WARNING, "the kernel does not say whether it is synchronised")
    if synchronised:
        return Check("clock", CheckStatus.GOOD, "synchronised")
    return Check("clock", CheckStatus.WARNING, "not synchronised", "run an NTP client if the job spans nodes")


class _Timex(ctypes.Structure):
    """``struct timex`` of adjtimex(2), as far as it is read; the rest is room for what the kernel writes."""

    _fields_ = (
        ("modes", ctypes.c_uint), ("offset", ctypes.c_long), ("freq", ctypes.c_long), ("maxerror", ctypes.c_long),
        ("esterror", ctypes.c_long), ("status", ctypes.c_int), ("rest", ctypes.c_byte * 256),
    )  # fmt: skip


def _clock_is_synchronised() -> bool | None:
    adjtimex = getattr(ctypes.CDLL(None), "adjtimex", None)
    if adjtimex is None:
        return None
    state = _Timex(modes=0)  # 0: only read
    code = adjtimex(ctypes.byref(state))
    unsynchronised = 0x40
    return None if code < 0 else not state.status & unsynchronised
