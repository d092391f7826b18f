"""Verdicts on a device, from readings and from what the driver reported.

The table is data: :data:`XIDS`, :data:`RECOVERY_ACTIONS`, :data:`CLOCK_EVENTS` and :data:`RULES`. Its sources are
NVIDIA's XID catalog, the health watches of DCGM, and what the Kubernetes device plugin does with an event.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import IntEnum

from lightning_gpuorch.devices.reading import DeviceReading


class Verdict(IntEnum):
    """What to do with a device. The larger of two is the worse."""

    UNKNOWN = -1
    """No fresh reading. Never treated as healthy, and by itself never as failed."""
    HEALTHY = 0
    DEGRADED = 1
    """Go on, and tell someone."""
    DRAIN = 2
    """Hand back the work in hand, then stop using it."""
    FAILED = 3
    """Stop now: no results will come, or none that can be trusted. Stays for the life of the process."""

    def __str__(self) -> str:
        return self.name.lower()


@dataclass(frozen=True)
class Finding:
    """One reason for a verdict.

    Attributes:
        rule: Name of the row of the table.
        verdict: What follows from it.
        evidence: What was seen, for a person.
    """

    rule: str
    verdict: Verdict
    evidence: str

    def __str__(self) -> str:
        return f"{self.rule}: {self.evidence}"


@dataclass(frozen=True)
class Xid:
    """An error the driver reports by number.

    Attributes:
        verdict: What follows from it.
        meaning: NVIDIA's description.
        process_fault: The process was hit and the GPU may be fine: restart on the same GPU, failed when it repeats.
    """

    verdict: Verdict
    meaning: str
    process_fault: bool = False


_F, _DR, _DE, _H = Verdict.FAILED, Verdict.DRAIN, Verdict.DEGRADED, Verdict.HEALTHY

XIDS: Mapping[int, Xid] = {
    13: Xid(_DE, "graphics engine exception", process_fault=True),
    31: Xid(_DE, "GPU memory page fault", process_fault=True),
    43: Xid(_DE, "GPU stopped processing", process_fault=True),
    45: Xid(_H, "preemptive cleanup after an earlier error or a killed process"),
    46: Xid(_F, "GPU stopped processing and did not recover"),
    48: Xid(_F, "double-bit ECC error"),
    62: Xid(_F, "internal micro-controller halt"),
    63: Xid(_DE, "row remapping or page retirement was recorded"),
    64: Xid(_F, "row remapping or page retirement failed"),
    68: Xid(_DE, "video processor exception", process_fault=True),
    74: Xid(_F, "NVLink error"),
    79: Xid(_F, "GPU has fallen off the bus"),
    92: Xid(_DE, "high rate of single-bit ECC errors"),
    93: Xid(_DE, "InfoROM wear limit reached"),
    94: Xid(_DE, "contained memory error", process_fault=True),
    95: Xid(_F, "uncontained memory error"),
    109: Xid(_F, "context switch timeout"),
    110: Xid(_F, "security fault"),
    119: Xid(_F, "GSP RPC timeout"),
    120: Xid(_F, "GSP error"),
    140: Xid(_F, "unrecovered ECC error"),
    143: Xid(_F, "GPU initialisation failure"),
    144: Xid(_DR, "NVLink SAW error"),
    145: Xid(_DR, "NVLink RLW error"),
    146: Xid(_DR, "NVLink TLW error"),
    147: Xid(_DR, "NVLink TREX error"),
    148: Xid(_DR, "NVLink NVLPW_CTRL error"),
    149: Xid(_DR, "NVLink NETIR error"),
    150: Xid(_DR, "NVLink MSE error"),
    154: Xid(_H, "the recovery action changed; it is read by itself"),
    155: Xid(_F, "NVLink error defined by software"),
    156: Xid(_F, "resource retirement"),
    158: Xid(_F, "GPU fatal timeout"),
}
UNKNOWN_XID = Xid(_DE, "not in the table")

RECOVERY_ACTIONS: Mapping[int, tuple[Verdict, str]] = {
    0: (_H, "none"),
    1: (_F, "reset the GPU"),
    2: (_F, "reboot the node"),
    3: (_DR, "drain peer-to-peer traffic"),
    4: (_DR, "drain, then reset"),
    5: (_DR, "recover the IMEX domain"),
    6: (_F, "reset the bus"),
    7: (_F, "reboot the system"),
}
_UNKNOWN_ACTION = (_DR, "an action this version does not know")

CLOCK_EVENTS: Mapping[int, tuple[Verdict, str]] = {
    0x4: (_H, "software power cap"),
    0x8: (_DE, "hardware slowdown"),
    0x20: (_DE, "software thermal slowdown"),
    0x40: (_DE, "hardware thermal slowdown"),
    0x80: (_DE, "power brake"),
}

_RESET_REQUIRED = 16


@dataclass(frozen=True)
class ReadingRule:
    """A row of the table that is about a reading.

    Attributes:
        name: Its name.
        verdict: What follows if it applies.
        evidence: From the reading and the first reading of the run: what was seen, or None if it does not apply.
    """

    name: str
    verdict: Verdict
    evidence: Callable[[DeviceReading, DeviceReading], str | None]


def _links_down(now: DeviceReading, first: DeviceReading) -> str | None:
    # Relative to the beginning: a card without bridges has links that were never up.
    if now.nvlinks_up is None or first.nvlinks_up is None:
        return None
    down = first.nvlinks_up & ~now.nvlinks_up
    links = [str(link) for link in range(down.bit_length()) if down >> link & 1]
    return f"links {', '.join(links)} went down" if links else None


def _ecc_rose(now: DeviceReading, first: DeviceReading) -> str | None:
    if now.ecc_uncorrected is None or first.ecc_uncorrected is None or now.ecc_uncorrected <= first.ecc_uncorrected:
        return None
    return f"uncorrected memory errors rose from {first.ecc_uncorrected} to {now.ecc_uncorrected} during the run"


def _too_hot(now: DeviceReading, first: DeviceReading) -> str | None:
    hot, limit = now.temperature_celsius, now.temperature_slowdown_celsius
    return (
        f"{hot} degrees Celsius, slowdown at {limit}"
        if hot is not None and limit is not None and hot >= limit
        else None
    )


def _other_error(now: DeviceReading, first: DeviceReading) -> str | None:
    return f"NVML error {now.nvml_error}" if now.nvml_error not in (None, _RESET_REQUIRED) else None


RULES: tuple[ReadingRule, ...] = (
    ReadingRule("gpu_lost", _F, lambda now, first: "the driver has lost the GPU" if now.lost else None),
    ReadingRule(
        "reset_required", _F, lambda now, first: "NVML asks for a reset" if now.nvml_error == _RESET_REQUIRED else None
    ),
    ReadingRule(
        "row_remap_failure", _F, lambda now, first: "a row could not be remapped" if now.row_remap_failure else None
    ),
    ReadingRule("ecc_uncorrected", _DR, _ecc_rose),
    ReadingRule("nvlink_down", _DR, _links_down),
    ReadingRule(
        "row_remap_pending", _DE, lambda now, first: "a row waits to be remapped" if now.row_remap_pending else None
    ),
    ReadingRule(
        "page_retirement_pending",
        _DE,
        lambda now, first: "a page waits to be retired" if now.page_retirement_pending else None,
    ),
    ReadingRule("temperature", _DE, _too_hot),
    ReadingRule("nvml_error", _DE, _other_error),
)


def judge_reading(now: DeviceReading, first: DeviceReading) -> list[Finding]:
    """Apply the table to a reading.

    Args:
        now: The reading.
        first: The first one of the run, for what counts only if it changes.

    Returns:
        What was found, worst first; empty if the device is healthy.
    """
    found = []
    for rule in RULES:
        evidence = rule.evidence(now, first)
        if evidence is not None:
            found.append(Finding(rule.name, rule.verdict, evidence))
    if now.recovery_action is not None:
        verdict, action = RECOVERY_ACTIONS.get(now.recovery_action, _UNKNOWN_ACTION)
        found.append(Finding("recovery_action", verdict, f"the driver asks to {action} ({now.recovery_action})"))
    for bit, (verdict, reason) in CLOCK_EVENTS.items():
        if (now.clock_event_reasons or 0) & bit:
            found.append(Finding("clock_event", verdict, f"{reason} holds the clock down ({bit:#x})"))
    return sorted((f for f in found if f.verdict > _H), key=lambda f: -f.verdict)


def judge_xids(xids: Iterable[int], max_process_faults: int) -> list[Finding]:
    """Apply the table to the XID errors of a run.

    Args:
        xids: In the order they came.
        max_process_faults: A GPU that hits processes more often than this has failed.

    Returns:
        One finding per number, worst first.
    """
    counts: dict[int, int] = {}
    for xid in xids:
        counts[xid] = counts.get(xid, 0) + 1
    found = []
    process_faults = 0
    for number, count in counts.items():
        entry = XIDS.get(number, UNKNOWN_XID)
        process_faults += count * entry.process_fault
        times = f" ({count} times)" if count > 1 else ""
        found.append(Finding(f"xid_{number}", entry.verdict, entry.meaning + times))
    if process_faults > max_process_faults:
        text = (
            f"the GPU hit its processes {process_faults} times, more than the {max_process_faults} that are tolerated"
        )
        found.append(Finding("process_faults", _F, text))
    return sorted((f for f in found if f.verdict > _H), key=lambda f: -f.verdict)
