"""Writes events.md and verdicts.md from the tables in the code: ``python docs/monitoring/make_tables.py``."""

from __future__ import annotations

from pathlib import Path

from lightning_gpuorch.devices.verdict import CLOCK_EVENTS, RECOVERY_ACTIONS, XIDS
from lightning_gpuorch.telemetry.events.schema import EVENT_SCHEMA
from lightning_gpuorch.telemetry.events.schema import __doc__ as schema_text

READING_RULES = [
    ("the driver has lost the GPU, or asks for a reset; a row could not be remapped", "failed"),
    ("uncorrected memory errors rose during the run; an NVLink that was up went down", "drain"),
    ("a row or page waits for a reset; temperature at the slowdown threshold; another NVML error", "degraded"),
    ("no reading for 30 seconds, or no driver", "unknown"),
]


def events() -> str:
    """The event schema as a page."""
    lines = ["---", "orphan: true", "---", "", "# Events", "", schema_text.split("\n\n", 2)[2].strip(), ""]
    for name, kind in EVENT_SCHEMA.items():
        lines += [f"## `{name}`", "", kind.meaning + (" Written at once." if kind.urgent else ""), ""]
        rows = [(field, text, "always") for field, text in kind.fields.items()]
        rows += [(field, text, "if known") for field, text in kind.optional.items()]
        if rows:
            lines += ["| field | what it says | present |", "|---|---|---|"]
            lines += [f"| `{field}` | {text} | {present} |" for field, text, present in rows]
            lines.append("")
    return "\n".join(lines)


def verdicts() -> str:
    """The verdict table as a page."""
    lines = [
        "---", "orphan: true", "---", "", "# Verdicts on GPUs", "",
        "What is not supported, or not permitted, is not counted. Sources: NVIDIA's XID catalog, the health watches of "
        "DCGM, and the Kubernetes device plugin.", "", "## Readings", "", "| seen | verdict |", "|---|---|",
        *(f"| {seen} | {verdict} |" for seen, verdict in READING_RULES),
        *(f"| the driver asks to {text} (recovery action {n}) | {v} |" for n, (v, text) in RECOVERY_ACTIONS.items() if n),
        *(f"| {text} holds the clock down (`{bit:#x}`) | {verdict} |" for bit, (verdict, text) in CLOCK_EVENTS.items()),
        "", "## XID errors", "", "| XID | verdict | meaning |", "|---|---|---|",
        *(f"| {number} | {xid.verdict}{' (process hit)' if xid.process_fault else ''} | {xid.meaning} |"
          for number, xid in XIDS.items()),
        "", "An XID that hit a process leaves the GPU degraded; more than three of them are a failure. An XID that is not "
        "in the table is degraded.", "",
    ]  # fmt: skip
    return "\n".join(lines)


if __name__ == "__main__":
    Path(__file__).with_name("events.md").write_text(events(), encoding="utf-8")
    Path(__file__).with_name("verdicts.md").write_text(verdicts(), encoding="utf-8")
