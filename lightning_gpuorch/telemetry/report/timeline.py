"""What each rank did, drawn as one lane per rank, with what went wrong marked on it."""

from __future__ import annotations

import html
from collections.abc import Sequence

from lightning_gpuorch.telemetry.report.charts import LEFT, RIGHT, WIDTH, TimeAxis, figure
from lightning_gpuorch.telemetry.report.run_summary import Event, RankSummary, RunSummary

_MANY_RANKS = 16
_SYMBOLS = {
    "oom": ("oom", "M0 -5L5 4L-5 4Z"),
    "retry": ("restart", "M-5 -2H1V-5L6 0L1 5V2H-5Z"),
    "failure": ("bad", "M-4 -4L4 4M4 -4L-4 4"),
    "hang": ("bad", "M-4 -4L4 4M4 -4L-4 4"),
    "restart": ("restart", "M-4 -5L5 0L-4 5Z"),
    "retire": ("bad", "M-4 -4H4V4H-4Z"),
    "verdict": ("warn", "M0 -5L5 0L0 5L-5 0Z"),
    "quarantine": ("bad", "M0 -5L4 -2L4 3L0 6L-4 3L-4 -2Z"),
}
"""Class and outline of the mark of each kind: shapes differ, since colours alone do not tell everybody apart."""


def draw_lanes(summary: RunSummary, axis: TimeAxis) -> str:
    """One lane per rank: computing, waiting for others, nothing; and marks."""
    ranks = list(summary.ranks.values())
    many = len(ranks) > _MANY_RANKS
    pitch, thickness = (13, 9) if many else (30, 20)
    height = pitch * len(ranks) + 6
    parts = [axis.draw(height)]
    drawn: set[str] = set()
    for number, rank in enumerate(ranks):
        top = 4 + pitch * number
        if not many or rank.rank % 4 == 0:
            name = f"rank {rank.rank}" if not many else str(rank.rank)
            parts.append(
                f'<text class="label" x="{LEFT - 6}" y="{top + thickness / 2 + 4:.0f}" text-anchor="end">{name}</text>'
            )
        parts.append(
            f'<rect class="lane" x="{LEFT}" y="{top}" width="{WIDTH - LEFT - RIGHT}" height="{thickness}" rx="2"/>'
        )
        parts += _segments(rank, axis, top, thickness, 200 if many else 480)
        middle = top + thickness / 2
        for incident in summary.incidents:
            if _concerns(incident, rank):
                drawn.add(incident["kind"])
                # A failure is followed at once by what is done about it: side by side, both can be seen.
                x = axis.x(incident["ts"]) - (0 if incident["kind"] not in ("failure", "hang") else 6 if many else 11)
                parts.append(_mark(incident, x, middle, 0.75 if many else 1.1))
    return figure("".join(parts), height + 22, "What each rank did over time") + _legend(drawn)


def describe(incident: Event) -> str:
    """An incident in one line, for tooltips and the list."""
    get = incident.get
    kind = incident["kind"]
    if kind == "oom":
        smaller = f", tried again with {get('retry_batch_size')}" if get("retry_batch_size") else ""
        return f"out of memory with batch size {get('batch_size')}{smaller}"
    if kind == "verdict":
        evidence = get("evidence") or []
        return f"device {get('verdict')}" + (f": {'; '.join(map(str, evidence))}" if evidence else "")
    if kind == "quarantine":
        why = get("reason", get("why", ""))
        return f"samples {get('start')} to {int(get('stop', 0)) - 1} given up: {why}"
    words = {
        "retry": "step repeated in place",
        "restart": "restarted",
        "retire": "retired",
        "hang": "stuck",
        "failure": "failed",
        "drain": "asked to stop",
    }
    reason = get("reason") or get("message") or ""
    attempt = f" (attempt {get('attempt')})" if get("attempt") else ""
    return f"{words.get(kind, kind)}{attempt}" + (f": {reason}" if reason else "")


def _segments(rank: RankSummary, axis: TimeAxis, top: float, thickness: float, num_bins: int) -> list[str]:
    """Stretches of one look; short ones are joined into bins first, so that the drawing stays small."""
    width = (axis.end - axis.begin) / num_bins
    busy, communication, covered = [0.0] * num_bins, [0.0] * num_bins, [0.0] * num_bins
    for begin, end, busy_seconds, communication_seconds in rank.intervals:
        length = max(end - begin, 1e-6)
        first = min(num_bins - 1, max(0, int((begin - axis.begin) / width)))
        last = min(num_bins - 1, max(0, int((end - axis.begin) / width)))
        for i in range(first, last + 1):
            low = axis.begin + i * width
            share = max(0.0, min(end, low + width) - max(begin, low)) / length
            busy[i] += share * busy_seconds
            communication[i] += share * communication_seconds
            covered[i] += share * length
    waiting_share = rank.waiting_seconds / rank.communication_seconds if rank.communication_seconds else 0.0
    looks = []
    for i in range(num_bins):
        if covered[i] <= 0 or busy[i] < 0.02 * covered[i]:
            looks.append("")
        else:
            looks.append("wait" if communication[i] * waiting_share > 0.5 * busy[i] else "work")
    parts = []
    start = 0
    for i in range(1, num_bins + 1):
        if i < num_bins and looks[i] == looks[start]:
            continue
        if looks[start]:
            x0 = axis.x(axis.begin + start * width)
            x1 = axis.x(axis.begin + i * width)
            parts.append(
                f'<rect class="{looks[start]}" x="{x0:.1f}" y="{top}" width="{x1 - x0:.1f}" height="{thickness}"/>'
            )
        start = i
    return parts


def _concerns(incident: Event, rank: RankSummary) -> bool:
    if incident["kind"] not in _SYMBOLS:
        return False
    if "rank" in incident:
        return bool(incident["rank"] == rank.rank)
    ranks = incident.get("ranks")
    if isinstance(ranks, Sequence) and not isinstance(ranks, str):
        return rank.rank in ranks
    return "replica" in incident and incident["replica"] == rank.replica


def _mark(incident: Event, x: float, y: float, scale: float) -> str:
    look, outline = _SYMBOLS[incident["kind"]]
    title = html.escape(describe(incident))
    return (
        f'<g class="mark {look}" transform="translate({x:.1f} {y:.1f}) scale({scale})">'
        f'<path d="{outline}"/><title>{title}</title></g>'
    )


def _legend(kinds: set[str]) -> str:
    names = {"oom": "out of memory", "retry": "step repeated", "failure": "failure", "hang": "stuck", "restart": "restart",
             "retire": "retired", "verdict": "device verdict", "quarantine": "samples given up"}  # fmt: skip
    items = [
        '<span><i class="key work"></i>computing</span>',
        '<span><i class="key wait"></i>mostly waiting for other ranks</span>',
        '<span><i class="key lane"></i>nothing</span>',
    ]
    for kind, name in names.items():
        if kind in kinds:
            look, outline = _SYMBOLS[kind]
            items.append(
                f'<span><svg class="symbol" viewBox="-8 -8 16 16"><g class="mark {look}"><path d="{outline}"/></g>'
                f"</svg>{name}</span>"
            )
    return f'<p class="legend">{"".join(items)}</p>'
