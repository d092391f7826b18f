"""Series over time as SVG without scripts, readable with one rank and with 64."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise

WIDTH, LEFT, RIGHT = 1120, 74, 12
_MAX_LINES = 8
_MAX_POINTS = 280

Point = tuple[float, float]


class TimeAxis:
    """Maps Unix time to the horizontal position, and labels it with time since the beginning."""

    def __init__(self, begin: float, end: float):
        self.begin, self.end = begin, max(end, begin + 1e-3)

    def x(self, at: float) -> float:
        """Horizontal position of a time; what lies outside is moved to the edge."""
        share = (at - self.begin) / (self.end - self.begin)
        return LEFT + min(1.0, max(0.0, share)) * (WIDTH - LEFT - RIGHT)

    def draw(self, height: float) -> str:
        """Grid lines and labels below a chart of a height."""
        parts = []
        for seconds in nice_ticks(self.end - self.begin, 9, time=True):
            x = self.x(self.begin + seconds)
            parts.append(
                f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{height:.0f}"/>'
                f'<text class="label" x="{x:.1f}" y="{height + 15:.0f}" text-anchor="middle">'
                f"{axis_time(seconds, self.end - self.begin)}</text>"
            )
        return "".join(parts)


def nice_ticks(span: float, most: int, *, time: bool = False) -> list[float]:
    """Round numbers from 0 to a span, at most so many."""
    steps = [1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 21600, 43200, 86400] if time else []
    step = next((s for s in steps if span / s <= most), 0.0)
    if not step or (time and span < 2):
        raw = span / most
        magnitude = 10 ** math.floor(math.log10(raw)) if raw > 0 else 1.0
        step = next(m * magnitude for m in (1, 2, 2.5, 5, 10) if m * magnitude >= raw * (1 - 1e-9))
    return [step * i for i in range(int(span / step + 1e-9) + 1)]


def duration(seconds: float) -> str:
    """Seconds for a person: ``0.25 s``, ``12 s``, ``3 min``, ``1 h 5 min``."""
    if seconds < 10 and seconds != int(seconds):
        return f"{seconds:.2g} s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60, 1) if seconds < 600 else round(seconds / 60)
    if minutes < 120:
        return f"{minutes:g} min"
    hours, rest = divmod(round(seconds / 60), 60)
    return f"{hours} h {rest} min" if rest else f"{hours} h"


def axis_time(seconds: float, span: float) -> str:
    """A time since the beginning: ``12 s`` in a short run, ``2:05`` or ``1:02:05`` in a longer one."""
    if span < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}" if span >= 3600 else f"{minutes}:{rest:02d}"


def figure(body: str, height: float, label: str) -> str:
    """A drawing of the common width."""
    return (
        f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{html.escape(label, quote=True)}">{body}</svg>'
    )


def line_chart(
    axis: TimeAxis,
    series: Mapping[str, Sequence[Point]],
    unit: Callable[[float], str],
    label: str,
    *,
    height: float = 130,
    marks: str = "",
    from_zero: bool = True,
) -> str:
    """Lines over time, one per name; with many names their range and median instead, and the outermost by name.

    Args:
        axis: Time.
        series: Points by name, by time.
        unit: Writes a value.
        label: What it shows, for those who cannot see it.
        height: Of the plot.
        marks: Drawn on top.
        from_zero: Whether the vertical axis begins at 0.
    """
    series = {name: points for name, points in series.items() if points}
    values = [value for points in series.values() for _, value in points]
    low = 0.0 if from_zero else min(values) - 0.1 * (max(values) - min(values) or 1)
    ticks = nice_ticks(max(values) * 1.05 - low or 1.0, 4)
    low = math.floor(low / (ticks[1] if len(ticks) > 1 else 1)) * (ticks[1] if len(ticks) > 1 else 1)
    high = max(max(values), low + ticks[-1])

    def y(value: float) -> float:
        return height - (value - low) / (high - low or 1) * (height - 10)

    parts = [axis.draw(height)]
    for tick in ticks:
        if low + tick > high:
            continue
        at = y(low + tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text class="label" x="{LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{unit(low + tick)}</text>')
    if len(series) <= _MAX_LINES:
        for number, (name, points) in enumerate(series.items()):
            path = _path([(axis.x(t), y(v)) for t, v in thin(points)])
            parts.append(f'<path class="line s{number}" d="{path}"><title>{html.escape(name)}</title></path>')
    else:
        parts.append(_band(axis, series, y))
    legend = _legend(series)
    return figure("".join(parts) + marks, height + 22, label) + legend


def thin(points: Sequence[Point]) -> list[Point]:
    """As many points as can be told apart: of each stretch the lowest and the highest, so that no peak is lost."""
    if len(points) <= _MAX_POINTS:
        return list(points)
    stretch = math.ceil(len(points) / (_MAX_POINTS / 2))
    kept = []
    for i in range(0, len(points), stretch):
        part = points[i : i + stretch]
        kept += sorted({min(part, key=lambda p: p[1]), max(part, key=lambda p: p[1])})
    return kept


def _path(points: Sequence[Point]) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)


def _band(axis: TimeAxis, series: dict[str, Sequence[Point]], y: Callable[[float], float]) -> str:
    # A bin shorter than the time between two readings would hold other ranks than its neighbour, and show a comb.
    gaps = sorted(b[0] - a[0] for points in series.values() for a, b in pairwise(points))
    pause = gaps[int(0.9 * (len(gaps) - 1))] if gaps else 0.0
    num_bins = max(1, min(140, int((axis.end - axis.begin) / (1.5 * pause)) if pause > 0 else 140))
    bins: list[list[tuple[float, str]]] = [[] for _ in range(num_bins)]
    width = (axis.end - axis.begin) / num_bins
    for name, points in series.items():
        for at, value in points:
            bins[min(num_bins - 1, max(0, int((at - axis.begin) / width)))].append((value, name))
    lows, highs, medians = [], [], []
    for i, found in enumerate(bins):
        if found:
            found.sort()
            x = axis.x(axis.begin + (i + 0.5) * width)
            lows.append((x, y(found[0][0])))
            highs.append((x, y(found[-1][0])))
            medians.append((x, y(found[len(found) // 2][0])))
    return (
        f'<path class="band" d="{_path(highs + lows[::-1])}Z"><title>lowest to highest rank</title></path>'
        f'<path class="line s0" d="{_path(medians)}"><title>median rank</title></path>'
    )


def _legend(series: dict[str, Sequence[Point]]) -> str:
    if len(series) == 1:
        return ""
    if len(series) <= _MAX_LINES:
        items = "".join(f'<span><i class="key s{i}"></i>{html.escape(name)}</span>' for i, name in enumerate(series))
        return f'<p class="legend">{items}</p>'
    peaks = {name: max(value for _, value in points) for name, points in series.items()}
    lowest, highest = min(peaks, key=lambda n: peaks[n]), max(peaks, key=lambda n: peaks[n])
    return (
        '<p class="legend"><span><i class="key s0"></i>median of the ranks</span>'
        '<span><i class="key band"></i>lowest to highest rank</span>'
        f"<span>highest peak: {html.escape(highest)}; lowest: {html.escape(lowest)}</span></p>"
    )
