"""The report of a run: what it did, what went wrong and what was lost, in one HTML file.

The file holds no script and no link to anywhere, follows the reader's light or dark setting, and is made from events
alone, so that it can be made for a run that was killed, too. Its form is in ``report.html.jinja``, its looks in
``report.css``; here is what they show.
"""

from __future__ import annotations

import os
import time
from importlib.resources import files
from pathlib import Path

from lightning_gpuorch._version import __version__
from lightning_gpuorch.errors import UnreadableRecordsError
from lightning_gpuorch.paths import local_path
from lightning_gpuorch.telemetry.atomic_file import replace_file
from lightning_gpuorch.telemetry.events.log import read_events
from lightning_gpuorch.telemetry.report.charts import TimeAxis, axis_time, duration, line_chart
from lightning_gpuorch.telemetry.report.run_summary import Event, RankSummary, RunSummary, summarize
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
        UnreadableRecordsError: They are not those of a run.
        OSError: The events cannot be read, or the file cannot be written.
    """
    directory = local_path(run_directory, "run_directory") / "events"
    events, unreadable = read_events(directory)
    if not events:
        raise FileNotFoundError(f"{directory} holds no events: no run has been recorded there.")
    try:
        text = render(summarize(events), unreadable)
    except (ValueError, TypeError, KeyError, ArithmeticError, AttributeError) as error:
        raise UnreadableRecordsError(f"the events in {directory} are not those of a run: {error!r}.") from error
    target = local_path(target, "target")
    replace_file(target, text.encode("utf-8"))
    return target


def render(summary: RunSummary, unreadable_lines: int = 0) -> str:
    """The report as HTML.

    Args:
        summary: What the run did.
        unreadable_lines: Of the event files; said at the end.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    axis = TimeAxis(summary.begin, summary.end)
    state, outcome = _outcome(summary)
    templates = Environment(
        loader=PackageLoader(__package__, ""), autoescape=True, undefined=StrictUndefined, keep_trailing_newline=True
    )
    return templates.get_template("report.html.jinja").render(
        title=_title(summary),
        style=files(__package__).joinpath("report.css").read_text(encoding="utf-8"),
        state=state,
        outcome=outcome,
        facts=_facts(summary),
        tiles=_tiles(summary),
        lost=_lost(summary),
        missing=summary.missing,
        throughput=_throughput(summary, axis),
        lanes=draw_lanes(summary, axis) if summary.ranks else "",
        incidents=_incidents(summary),
        hidden_incidents=len(summary.incidents) - _MAX_INCIDENTS,
        split=_time_split(summary),
        stragglers=_stragglers(summary),
        memory=_memory(summary, axis),
        temperature=_temperature(summary, axis),
        rank_columns=_RANK_COLUMNS,
        ranks=_rank_rows(summary),
        chunks=_chunks(summary),
        footer=_footer(summary, unreadable_lines),
    )


def _title(summary: RunSummary) -> str:
    command = str(summary.run.get("command", ""))
    return f"Inference run: {command}" if command else "Inference run"


def _facts(summary: RunSummary) -> list[str]:
    began = time.strftime("%Y-%m-%d %H:%M:%S %Z", time.localtime(summary.begin))
    facts = [began, duration(summary.seconds)]
    if summary.run.get("host"):
        facts.append(f"on {summary.run['host']}")
    if summary.run.get("tensor_parallel_size"):
        size = summary.run["tensor_parallel_size"]
        facts.append(f"{summary.run.get('world_size')} ranks, tensor-parallel size {size}")
    if summary.run.get("output_dir"):
        facts.append(f"results in {summary.run['output_dir']}")
    return facts


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


def _tiles(summary: RunSummary) -> list[tuple[str, str, str]]:
    """Value, name, and the look of a value that is not 0."""
    replicas = {rank.replica for rank in summary.ranks.values()} - {None}
    return [
        (f"{summary.samples:,}", "samples computed", ""),
        (f"{summary.samples / summary.seconds:,.1f}", "samples per second", ""),
        (str(len(summary.ranks)), f"ranks in {len(replicas)} replicas" if replicas else "ranks", ""),
        (str(summary.count("oom")), "out-of-memory recoveries", "warn"),
        (str(summary.count("retry")), "steps repeated after failed communication", "warn"),
        (str(summary.count("restart")), "restarts", "warn"),
        (str(summary.count("retire")), "replicas retired", "bad"),
        (f"{sum(stop - start for start, stop, _ in summary.lost):,}", "samples given up", "bad"),
    ]


def _lost(summary: RunSummary) -> list[tuple[str, str, str]]:
    return [
        (str(start) if stop - start == 1 else f"{start} to {stop - 1}", f"{stop - start:,}", why)
        for start, stop, why in summary.lost
    ]


def _throughput(summary: RunSummary, axis: TimeAxis) -> str:
    if not summary.throughput:
        return ""
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


def _memory(summary: RunSummary, axis: TimeAxis) -> str:
    series = {
        f"rank {r.rank}": [(at, used / 2**30) for at, used in r.memory] for r in summary.ranks.values() if r.memory
    }
    return line_chart(axis, series, lambda v: f"{v:g} GiB", "Device memory in use over time") if series else ""


def _temperature(summary: RunSummary, axis: TimeAxis) -> str:
    series = {f"rank {r.rank}": r.temperature for r in summary.ranks.values() if r.temperature}
    if not series:
        return ""
    return line_chart(axis, series, lambda v: f"{v:.0f} °C", "Device temperature over time", from_zero=False)


def _incidents(summary: RunSummary) -> list[tuple[str, ...]]:
    return [
        (axis_time(e["ts"] - summary.begin, summary.seconds), e["kind"], _who(e), describe(e))
        for e in summary.incidents[:_MAX_INCIDENTS]
    ]


def _who(event: Event) -> str:
    if "rank" in event:
        return f"rank {event['rank']}"
    return f"replica {event['replica']}" if "replica" in event else str(event.get("source", ""))


def _time_split(summary: RunSummary) -> list[tuple[int, dict[str, float]]]:
    """Of each rank, percent of the run by look."""
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
        rows.append((rank.rank, {look: 100 * seconds / total for look, seconds in parts.items()}))
    return rows


def _stragglers(summary: RunSummary) -> list[str]:
    """The rank of a replica that waits least is the one the others wait for."""
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
    return found


_RANK_COLUMNS = (
    "rank", "replica", "steps", "samples", "mean step", "slowest step", "peak memory", "hottest", "OOMs", "starts",
    "device",
)  # fmt: skip


def _rank_rows(summary: RunSummary) -> list[tuple[str, ...]]:
    return [
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


def _chunks(summary: RunSummary) -> list[tuple[str, ...]]:
    return [
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


def _footer(summary: RunSummary, unreadable_lines: int) -> list[str]:
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
    return lines
