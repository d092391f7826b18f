"""What did the run do, what went wrong, and what was lost? One HTML file that says it at a glance.

The file holds no script and no link to anywhere, follows the reader's light or dark setting, and is made from events
alone, so that it can be made for a run that was killed, too.
"""

from __future__ import annotations

import html
import os
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from lightning_gpuorch._version import __version__
from lightning_gpuorch.paths import local_path
from lightning_gpuorch.telemetry.atomic_file import replace_file
from lightning_gpuorch.telemetry.events.log import read_events
from lightning_gpuorch.telemetry.report.charts import TimeAxis, axis_time, duration, line_chart
from lightning_gpuorch.telemetry.report.run_summary import Event, RankSummary, RunSummary, summarize
from lightning_gpuorch.telemetry.report.style import STYLE
from lightning_gpuorch.telemetry.report.timeline import describe, draw_lanes

_MAX_INCIDENTS = 400
_THROUGHPUT_BINS = 140


def write_report(run_directory: str | os.PathLike[str], target: str | os.PathLike[str]) -> Path:
    """Write the report of a run, also of one that is still going on or was killed.

    Args:
        run_directory: Of the run; its events are in ``events/``.
        target: The HTML file; replaced if it exists.

    Returns:
        The file.

    Raises:
        FileNotFoundError: The directory has no events.
        OSError: The events cannot be read, or the file cannot be written.
    """
    directory = local_path(run_directory, "run_directory") / "events"
    events, unreadable = read_events(directory)
    if not events:
        raise FileNotFoundError(f"{directory} holds no events: no run has been recorded there.")
    text = render(summarize(events), unreadable)
    target = local_path(target, "target")
    replace_file(target, text.encode("utf-8"))
    return target


def render(summary: RunSummary, unreadable_lines: int = 0) -> str:
    """The report as HTML.

    Args:
        summary: What the run did.
        unreadable_lines: Of the event files; said at the end.
    """
    axis = TimeAxis(summary.begin, summary.end)
    sections = [
        _header(summary),
        _tiles(summary),
        _lost(summary),
        _section("Throughput", "Samples per second of the whole job.", _throughput(summary, axis)),
        _section("What each rank did", "", draw_lanes(summary, axis)) if summary.ranks else "",
        _section("Incidents", "", _incidents(summary)),
        _section("Where the time went", "Of each rank's time from start to end of the run.", _time_split(summary)),
        _section("Device memory", "", _per_rank_chart(summary, axis, "memory")),
        _section("Device temperature", "", _per_rank_chart(summary, axis, "temperature")),
        _section("Ranks", "", _rank_table(summary)),
        _section("Slowest chunks", "From the first step to durable.", _chunks(summary)),
        _footer(summary, unreadable_lines),
    ]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1"><meta name="color-scheme" '
        f'content="light dark"><title>{html.escape(_title(summary))}</title><style>{STYLE}</style></head>'
        f"<body><main>{''.join(sections)}</main></body></html>\n"
    )


def _title(summary: RunSummary) -> str:
    command = str(summary.run.get("command", ""))
    return f"Inference run: {command}" if command else "Inference run"


def _header(summary: RunSummary) -> str:
    state, text = _outcome(summary)
    began = time.strftime("%Y-%m-%d %H:%M:%S %Z", time.localtime(summary.begin))
    facts = [began, duration(summary.seconds)]
    if summary.run.get("host"):
        facts.append(f"on {summary.run['host']}")
    if summary.run.get("tensor_parallel_size"):
        size = summary.run["tensor_parallel_size"]
        facts.append(f"{summary.run.get('world_size')} ranks, tensor-parallel size {size}")
    if summary.run.get("output_dir"):
        facts.append(f"results in {summary.run['output_dir']}")
    return (
        f"<header><h1>{html.escape(_title(summary))}</h1>"
        f'<p class="outcome {state}">{html.escape(text)}</p>'
        f'<p class="facts">{html.escape(", ".join(facts))}</p></header>'
    )


def _outcome(summary: RunSummary) -> tuple[str, str]:
    total = f"{summary.num_samples:,} " if summary.num_samples is not None else ""
    if summary.exit_code is None and summary.complete is not None:
        if summary.complete:
            return "good", f"Complete: all {total}samples have their prediction."
        return "bad", "Samples are missing; what was computed is durable."
    if summary.exit_code is None:
        return "warn", "No end was recorded: the run is still going on, or its supervisor was killed."
    if summary.exit_code == 0:
        return "good", f"Complete: all {total}samples have their prediction."
    if summary.exit_code == os.EX_TEMPFAIL:
        return "warn", "Stopped on request; the same command goes on where this run stopped."
    return "bad", f"Failed with exit code {summary.exit_code}." + (" Samples are missing." if summary.missing else "")


def _tiles(summary: RunSummary) -> str:
    replicas = {rank.replica for rank in summary.ranks.values()} - {None}
    tiles: list[tuple[str, str, str]] = [
        (f"{summary.samples:,}", "samples computed", ""),
        (f"{summary.samples / summary.seconds:,.1f}", "samples per second", ""),
        (str(len(summary.ranks)), f"ranks in {len(replicas)} replicas" if replicas else "ranks", ""),
        (str(summary.count("oom")), "out-of-memory recoveries", "warn"),
        (str(summary.count("retry")), "steps repeated after failed communication", "warn"),
        (str(summary.count("restart")), "restarts", "warn"),
        (str(summary.count("retire")), "replicas retired", "bad"),
        (f"{sum(stop - start for start, stop, _ in summary.lost):,}", "samples given up", "bad"),
    ]
    cells = "".join(
        f'<div class="tile{" " + look if look and value != "0" else ""}"><b>{value}</b><span>{name}</span></div>'
        for value, name, look in tiles
    )
    return f'<div class="tiles">{cells}</div>'


def _lost(summary: RunSummary) -> str:
    if not summary.lost and not summary.missing:
        return ""
    rows = [
        (str(start) if stop - start == 1 else f"{start} to {stop - 1}", f"{stop - start:,}", why)
        for start, stop, why in summary.lost
    ]
    table = _table(("samples", "number", "why"), rows, numeric=(1,)) if rows else ""
    missing = f"<p>Without a prediction: {html.escape(summary.missing)}</p>" if summary.missing else ""
    return _section("What was lost, and why", "", missing + table)


def _throughput(summary: RunSummary, axis: TimeAxis) -> str:
    if not summary.throughput:
        return _nothing("No steps were recorded.")
    width = (axis.end - axis.begin) / _THROUGHPUT_BINS
    # A bin is never shorter than the intervals that steps are recorded in, or the line would show their rhythm.
    longest = sorted(end - begin for begin, end, _ in summary.throughput)[len(summary.throughput) // 2]
    num_bins = max(1, min(_THROUGHPUT_BINS, int((axis.end - axis.begin) / max(longest, width))))
    width = (axis.end - axis.begin) / num_bins
    bins = [0.0] * num_bins
    for begin, end, samples in summary.throughput:
        first = min(num_bins - 1, max(0, int((begin - axis.begin) / width)))
        last = min(num_bins - 1, max(0, int((end - axis.begin) / width)))
        length = max(end - begin, 1e-9)
        for i in range(first, last + 1):
            low = axis.begin + i * width
            bins[i] += samples * max(0.0, min(end, low + width) - max(begin, low)) / length
    points = [(axis.begin + (i + 0.5) * width, count / width) for i, count in enumerate(bins)]
    return line_chart(
        axis, {"job": points}, lambda v: f"{v:,.0f}" if v >= 10 else f"{v:.2g}", "Samples per second over time"
    )


def _per_rank_chart(summary: RunSummary, axis: TimeAxis, what: str) -> str:
    series: dict[str, Sequence[tuple[float, float]]] = {
        f"rank {number}": getattr(rank, what) for number, rank in summary.ranks.items() if getattr(rank, what)
    }
    if not series:
        return _nothing("No readings: nobody watched the devices, or they do not report it.")
    if what == "memory":
        series = {name: [(at, used / 2**30) for at, used in points] for name, points in series.items()}
        return line_chart(axis, series, lambda v: f"{v:g} GiB", "Device memory in use over time")
    return line_chart(axis, series, lambda v: f"{v:.0f} °C", "Device temperature over time", from_zero=False)


def _incidents(summary: RunSummary) -> str:
    if not summary.incidents:
        return _nothing("None.")
    rows = [
        (axis_time(e["ts"] - summary.begin, summary.seconds), e["kind"], _who(e), describe(e))
        for e in summary.incidents[:_MAX_INCIDENTS]
    ]
    table = _table(("time", "what", "where", "details"), rows)
    hidden = len(summary.incidents) - _MAX_INCIDENTS
    return _fold(table, len(rows), "incidents") + (
        f"<p>{hidden} more are in the event files.</p>" if hidden > 0 else ""
    )


def _who(event: Event) -> str:
    if "rank" in event:
        return f"rank {event['rank']}"
    return f"replica {event['replica']}" if "replica" in event else str(event.get("source", ""))


def _time_split(summary: RunSummary) -> str:
    rows = []
    for rank in summary.ranks.values():
        if not rank.steps:
            continue
        parts = {
            "work": max(0.0, rank.busy_seconds - rank.communication_seconds),
            "transfer": rank.transfer_seconds,
            "wait": rank.waiting_seconds,
        }
        parts["lane"] = max(0.0, summary.seconds - sum(parts.values()))
        total = sum(parts.values())
        bars = "".join(
            f'<i class="{look}" style="width:{100 * seconds / total:.2f}%"></i>'
            for look, seconds in parts.items()
            if seconds
        )
        share = {look: 100 * seconds / total for look, seconds in parts.items()}
        rows.append(
            f'<div class="split"><span>rank {rank.rank}</span><div class="bar">{bars}</div>'
            f"<span>{' / '.join(f'{value:.0f}' for value in share.values())} %</span></div>"
        )
    if not rows:
        return _nothing("No steps were recorded.")
    legend = (
        '<p class="legend"><span><i class="key work"></i>computing</span><span><i class="key transfer"></i>transfer '
        'between ranks</span><span><i class="key wait"></i>waiting for other ranks</span>'
        '<span><i class="key lane"></i>outside steps (start, loading, recovery)</span></p>'
    )
    return legend + _straggler(summary) + _fold("".join(rows), len(rows), "ranks")


def _straggler(summary: RunSummary) -> str:
    """The rank that waits least is the one the others wait for."""
    found = []
    replicas: dict[int | None, list[RankSummary]] = {}
    for rank in summary.ranks.values():
        if rank.steps and rank.communication_seconds:
            replicas.setdefault(rank.replica, []).append(rank)
    for members in replicas.values():
        least = min(members, key=lambda r: r.communication_seconds)
        cost = max(r.waiting_seconds for r in members)
        if len(members) > 1 and cost > 0.1 * least.busy_seconds:
            found.append(f"rank {least.rank} (others wait up to {duration(cost)})")
    return f"<p>Stragglers: {html.escape(', '.join(found))}.</p>" if found else ""


def _rank_table(summary: RunSummary) -> str:
    head = (
        "rank", "replica", "steps", "samples", "mean step", "slowest step", "peak memory", "hottest", "OOMs", "starts",
        "device",
    )  # fmt: skip
    rows = [
        (
            str(r.rank),
            str(r.replica) if r.replica is not None else "",
            f"{r.steps:,}",
            f"{r.samples:,}",
            f"{1000 * r.busy_seconds / r.steps:.1f} ms" if r.steps else "",
            f"{1000 * r.slowest_seconds:.1f} ms" if r.slowest_seconds else "",
            f"{r.peak_memory_bytes / 2**30:.2f} GiB" if r.peak_memory_bytes is not None else "",
            f"{r.peak_temperature_celsius:.0f} °C" if r.peak_temperature_celsius is not None else "",
            str(r.ooms),
            str(r.starts),
            r.verdict or "",
        )
        for r in summary.ranks.values()
    ]
    return _fold(_table(head, rows, numeric=range(10)), len(rows), "ranks") if rows else _nothing("No rank reported.")


def _chunks(summary: RunSummary) -> str:
    if not summary.slowest_chunks:
        return _nothing("No chunks with a duration were recorded.")
    rows = [
        (
            str(e["chunk"]),
            str(e.get("loader", "")),
            _who(e),
            f"{e['samples']:,}" if "samples" in e else "",
            duration(e["seconds"]),
            axis_time(e["ts"] - summary.begin, summary.seconds),
        )
        for e in summary.slowest_chunks
    ]
    return _table(("chunk", "dataloader", "where", "samples", "took", "durable at"), rows, numeric=(0, 1, 3, 4))


def _footer(summary: RunSummary, unreadable_lines: int) -> str:
    lines = []
    if summary.observer_failures:
        text = ", ".join(f"{name} {count}" for name, count in sorted(summary.observer_failures.items()))
        lines.append(f"Failures of observers, which the run survived: {text}.")
    if unreadable_lines:
        lines.append(f"{unreadable_lines} lines of the event files could not be read (torn when a process died).")
    versions = summary.run.get("versions")
    if isinstance(versions, dict):
        lines.append("Run with " + ", ".join(f"{name} {version}" for name, version in versions.items()) + ".")
    lines.append(f"Written by lightning_gpuorch {__version__}. Times are from the clocks of the ranks' nodes.")
    return f"<footer>{''.join(f'<p>{html.escape(line)}</p>' for line in lines)}</footer>"


def _section(title: str, note: str, body: str) -> str:
    said = f' <span class="note">{html.escape(note)}</span>' if note else ""
    return f"<section><h2>{html.escape(title)}{said}</h2>{body}</section>"


def _nothing(text: str) -> str:
    return f'<p class="nothing">{html.escape(text)}</p>'


def _fold(body: str, num_rows: int, name: str) -> str:
    """Long lists open on demand, so that the page stays readable with many ranks."""
    return body if num_rows <= 16 else f"<details><summary>{num_rows} {name}</summary>{body}</details>"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], numeric: Iterable[int] = ()) -> str:
    right = set(numeric)

    def cells(tag: str, row: Sequence[str]) -> str:
        return "".join(
            f"<{tag}{' class=num' if i in right else ''}>{html.escape(cell)}</{tag}>" for i, cell in enumerate(row)
        )

    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{cells("th", head)}</tr></thead><tbody>{body}</tbody></table></div>'
