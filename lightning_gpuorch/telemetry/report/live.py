"""What a running job does right now: a view for the terminal, made from the event files as they grow."""

from __future__ import annotations

import collections
import contextlib
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from lightning_gpuorch.checked_files import MAX_LINE_BYTES, parse_object, read_lines, regular_files
from lightning_gpuorch.telemetry.events.schema import well_typed
from lightning_gpuorch.telemetry.report.charts import axis_time, duration
from lightning_gpuorch.telemetry.report.run_summary import INCIDENT_KINDS, Event, JobTotals
from lightning_gpuorch.telemetry.report.timeline import describe

_RATE_WINDOW_SECONDS = 15.0
_SILENT_SECONDS = 10.0
_MAX_INCIDENTS = 8
_MAX_ROWS = 512
"""Ranks that are shown where there is room for any number."""
_STRAGGLER_SHARE = 0.1
"""Nobody is called a straggler while the others wait for less than this share of their time."""
_VERDICT_STYLE = {"healthy": "green", "degraded": "yellow", "drain": "dark_orange", "failed": "red", "unknown": "dim"}


class EventTail:
    """Reads what was added to a directory of event files since the last look.

    Args:
        directory: The event directory; it may not exist yet.
    """

    def __init__(self, directory: str | os.PathLike[str]):
        self._directory = Path(directory)
        self._offsets: dict[Path, int] = {}

    def poll(self) -> list[Event]:
        """New events of all files, by time; a line that is being written is left for the next look.

        Raises:
            OSError: A file cannot be read.
        """
        events = []
        for path in regular_files(self._directory, "*.jsonl"):
            try:
                for line in read_lines(path, self._offsets.get(path, 0)):
                    if not line.endswith(b"\n") and len(line) < MAX_LINE_BYTES:
                        break  # it is being written
                    self._offsets[path] = self._offsets.get(path, 0) + len(line)
                    with contextlib.suppress(ValueError):
                        event = well_typed(parse_object(line))
                        if "ts" in event and "kind" in event:
                            events.append(event)
            except FileNotFoundError:  # the run has just ended, and its records were taken away
                continue
        return sorted(events, key=lambda event: event["ts"])


@dataclass(frozen=True)
class _Interval:
    """What a rank did between two of its ``steps`` events; Unix time in seconds."""

    begin: float
    end: float
    samples: int
    communication_seconds: float


@dataclass
class _Rank:
    rank: int
    replica: int | None = None
    generation: int = 0
    last_seen: float = 0.0
    ended: bool = False
    retired: bool = False
    steps: int = 0
    samples: int = 0
    batch_size: int | None = None
    communication_seconds: float = 0.0
    verdict: str = ""
    device: Event = field(default_factory=dict)
    recent: collections.deque[_Interval] = field(default_factory=collections.deque)

    def rate(self, now: float) -> float:
        """Samples per second over the last moments."""
        return sum(interval.samples for interval in self._lately(now)) / self._span(now)

    def communication_share(self, now: float) -> float:
        """Share of the last moments that was spent in collectives, waiting included."""
        return sum(interval.communication_seconds for interval in self._lately(now)) / self._span(now)

    def needs_attention(self, now: float) -> bool:
        """Whether this rank is one that a person wants to see first."""
        silent = now - self.last_seen > _SILENT_SECONDS and not self.ended
        return self.retired or silent or bool(self.generation) or self.verdict not in ("", "healthy")

    def _lately(self, now: float) -> Iterable[_Interval]:
        while self.recent and self.recent[0].end < now - _RATE_WINDOW_SECONDS:
            self.recent.popleft()
        return () if self.ended or self.retired else self.recent

    def _span(self, now: float) -> float:
        return max(now - self.recent[0].begin, 1.0) if self.recent else 1.0


class LiveView:
    """The state of a job, kept current from its events."""

    def __init__(self) -> None:
        self._ranks: dict[int, _Rank] = {}
        self._incidents: collections.deque[Event] = collections.deque(maxlen=_MAX_INCIDENTS)
        self._counts: collections.Counter[str] = collections.Counter()
        self._began: float | None = None
        self._title = ""
        self._totals = JobTotals()
        self._complete: bool | None = None
        self.exit_code: int | None = None
        """Of the run, once it has ended, if that is known."""
        self.is_over = False
        """Whether the run has ended."""

    def add(self, events: Iterable[Event]) -> None:
        """Take events, in their order."""
        for event in events:
            self._began = self._began if self._began is not None else event["ts"]
            if event["kind"] in ("run", "job"):
                self._title = str(event.get("command", self._title))
                self._totals.add(event)
                if event["kind"] == "run":
                    self.exit_code, self.is_over = None, False
            if event["kind"] in INCIDENT_KINDS:
                self._incidents.append(event)
                self._counts[event["kind"]] += 1
            if event["kind"] == "retire":
                for rank in self._ranks.values():
                    rank.retired |= rank.rank in (event.get("ranks") or ()) or rank.replica == event.get("replica")
            if event["kind"] == "end" and event.get("source") == "supervisor":
                self.exit_code, self.is_over = event.get("exit_code"), True
                self._complete = event["complete"] if isinstance(event.get("complete"), bool) else None
            if isinstance(event.get("rank"), int) and event.get("source") != "supervisor":
                self._add_to_rank(self._ranks.setdefault(event["rank"], _Rank(event["rank"])), event)

    def _add_to_rank(self, rank: _Rank, event: Event) -> None:
        rank.last_seen = max(rank.last_seen, event["ts"])
        rank.replica = event.get("replica", rank.replica)
        kind = event["kind"]
        if kind == "start":
            rank.generation, rank.ended = event.get("generation", 0), False
        elif kind == "steps":
            rank.steps += event.get("steps", 0)
            rank.samples += event.get("samples", 0)
            rank.batch_size = event.get("batch_size", rank.batch_size)
            begin = float(event["begin"]) if "begin" in event else event["ts"]
            communication = event.get("comm_seconds", 0.0)
            rank.communication_seconds += communication
            rank.recent.append(_Interval(begin, event["ts"], event.get("samples", 0), communication))
        elif kind == "device":
            rank.device = event
        elif kind == "verdict":
            rank.verdict = str(event.get("verdict", ""))
        elif kind == "end":
            rank.ended = True

    def render(self, now: float | None = None, height: int | None = None) -> RenderableType:
        """The view, for rich.

        Args:
            now: Unix time.
            height: Lines there are. If they are too few for all ranks, those that need attention are shown first.
        """
        now = time.time() if now is None else now
        ranks = [self._ranks[number] for number in sorted(self._ranks)]
        if not ranks:
            return Text("waiting for the first rank to report")
        incidents = self._recent_incidents()
        shown = ranks
        room = _MAX_ROWS if height is None else max(4, height - 7 - (len(incidents) + 1 if incidents else 0))
        if len(ranks) > room:
            by_need = sorted(ranks, key=lambda rank: (not rank.needs_attention(now), rank.rank))
            shown = sorted(by_need[: room - 1], key=lambda rank: rank.rank)
        hidden = len(ranks) - len(shown)
        more = [Text(f"... and {hidden} more ranks, none of which needs attention", style="dim")] if hidden else []
        if hidden and any(rank.needs_attention(now) for rank in ranks if rank not in shown):
            more = [Text(f"... and {hidden} more ranks", style="dim")]
        return Group(self._headline(ranks, now), Text(), self._table(shown, now), *more, *incidents)

    def _headline(self, ranks: list[_Rank], now: float) -> Text:
        done, rate = sum(rank.samples for rank in ranks), sum(rank.rate(now) for rank in ranks)
        text = Text(f"{self._title}\n" if self._title else "", style="bold")
        there, num_samples = self._totals.resumed_samples, self._totals.num_samples
        total = f" of {num_samples:,}" if num_samples else ""
        text.append(f"{done + there:,}{total} samples, {rate:,.0f}/s", style="not bold")
        if there:
            text.append(f", about {there:,} of them from an earlier run", style="not bold")
        left = (num_samples or 0) - there - done
        if left > 0 and rate > 0 and not self.is_over:
            text.append(f", about {duration(left / rate)} left", style="not bold")
        working = sum(not rank.ended and not rank.retired for rank in ranks)
        text.append(f"; {working} of {len(ranks)} ranks at work", style="not bold")
        for kind, name in (
            ("oom", "out of memory"),
            ("retry", "steps repeated"),
            ("restart", "restarts"),
            ("retire", "retired"),
        ):
            if self._counts[kind]:
                text.append(", ", style="not bold").append(f"{self._counts[kind]} {name}", style="yellow not bold")
        if self.exit_code is not None:
            text.append(f"\nended with exit code {self.exit_code}", style="green" if self.exit_code == 0 else "red")
        elif self.is_over:
            outcome = {True: "ended, complete", False: "ended, samples are missing"}.get(self._complete, "ended")  # type: ignore[arg-type]
            text.append(f"\n{outcome}", style="red" if self._complete is False else "green")
        return text

    def _table(self, ranks: list[_Rank], now: float) -> Table:
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        communicates = any(rank.communication_seconds for rank in self._ranks.values())
        columns = ["rank", "replica", "samples", "per s", "batch", "memory", "°C", "busy"]
        for name in columns + ["in collectives"] * communicates:
            table.add_column(name, justify="right")
        table.add_column("state")
        stragglers = self._stragglers(now) if communicates else set()
        for rank in ranks:
            device = rank.device
            used, total = device.get("memory_used_bytes"), device.get("memory_total_bytes")
            follows = rank.steps > 0 and rank.samples == 0  # its leader counts
            heat, busy = device.get("temperature_celsius"), device.get("utilization_ratio")
            table.add_row(
                str(rank.rank),
                "" if rank.replica is None else str(rank.replica),
                "" if follows else f"{rank.samples:,}",
                "" if follows else f"{rank.rate(now):,.0f}",
                "" if rank.batch_size is None else str(rank.batch_size),
                "" if used is None else f"{used / 2**30:.1f}" + (f"/{total / 2**30:.0f} GiB" if total else " GiB"),
                "" if heat is None else f"{heat:.0f}",
                "" if busy is None else f"{100 * busy:.0f}%",
                *([f"{100 * rank.communication_share(now):.0f}%"] if communicates else []),
                self._state(rank, now, rank.rank in stragglers),
            )
        return table

    def _stragglers(self, now: float) -> set[int]:
        """Ranks that the others of their replica wait for: those that are in collectives least, by far."""
        found = set()
        replicas: dict[int | None, list[_Rank]] = {}
        for rank in self._ranks.values():
            if not rank.ended and not rank.retired and rank.recent:
                replicas.setdefault(rank.replica, []).append(rank)
        for members in replicas.values():
            shares = {rank.rank: rank.communication_share(now) for rank in members}
            least, most = min(shares, key=shares.__getitem__), max(shares.values())
            if len(members) > 1 and most > _STRAGGLER_SHARE and shares[least] < 0.5 * most:
                found.add(least)
        return found

    def _state(self, rank: _Rank, now: float, straggles: bool) -> Text:
        if rank.retired:
            return Text("retired", style="red")
        if rank.ended:
            return Text("done", style="green")
        silent = now - rank.last_seen
        state = (
            Text(f"silent for {duration(round(silent))}", style="red") if silent > _SILENT_SECONDS else Text("at work")
        )
        if rank.generation:
            state.append(f", restarted {rank.generation}x", style="yellow")
        if rank.verdict and rank.verdict != "healthy":
            state.append(f", device {rank.verdict}", style=_VERDICT_STYLE.get(rank.verdict, ""))
        if straggles:
            state.append(", the others wait for it", style="yellow")
        return state

    def _recent_incidents(self) -> list[Text]:
        lines = []
        began = self._began or 0.0
        span = max((event["ts"] for event in self._incidents), default=began) - began
        for event in self._incidents:
            who = (
                f"rank {event['rank']}"
                if "rank" in event
                else f"replica {event['replica']}"
                if "replica" in event
                else ""
            )
            lines.append(Text(f"{axis_time(event['ts'] - began, max(span, 60)):>8}  {who:<10} {describe(event)}"))
        return [Text("\nlately", style="bold"), *lines] if lines else []


def watch(
    run_directory: str | os.PathLike[str],
    console: Console | None = None,
    *,
    refresh_seconds: float = 1.0,
    is_over: Callable[[], bool] = lambda: False,
) -> int | None:
    """Show a job until it ends.

    Args:
        run_directory: Of the run; its events are in ``events/``.
        console: Where to; a new one on standard output by default.
        refresh_seconds: Time between two looks.
        is_over: Asked after each look; True ends the view as well.

    Returns:
        The exit code of the run, or None if it was not seen to end.
    """
    tail, view = EventTail(Path(run_directory) / "events"), LiveView()
    console = console if console is not None else Console()
    with Live(view.render(), console=console, auto_refresh=False) as live:
        while True:
            view.add(tail.poll())
            live.update(view.render(height=console.height), refresh=True)
            if view.is_over or is_over():
                return view.exit_code
            time.sleep(refresh_seconds)


def snapshot(events: Iterable[dict[str, Any]], now: float, height: int | None = None) -> RenderableType:
    """The view at one moment, for tests and pictures.

    Args:
        events: By time; those after ``now`` are left out.
        now: Unix time.
        height: Lines there are; None shows all ranks.
    """
    view = LiveView()
    view.add(event for event in events if event["ts"] <= now)
    return view.render(now, height)
