"""The metrics of several ranks, dead ones included, as one Prometheus exposition.

Each start of a rank writes ``rank<R>.<generation>.prom``. Merged, counters and histograms are summed over the starts
of a rank, so that nothing is reset when a rank dies; gauges come from its newest start alone, and only while that is
alive: a value of a dead process says nothing about now.

The merge works on the text, whose form is known since it was written here; a full parser would take ten times as long,
in a process that has inference to do.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import Metric

from lightning_gpuorch.checked_files import NotRegularFileError, TooLargeFileError, read_file

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
RANK_UP = "distributed_inference_rank_up"

_FILE_NAME = re.compile(r"rank(\d+)\.(\d+)\.prom")
_HELP = re.compile(r"# HELP (\S+) ")
_ENDED = "# gpuorch: ended"


def write_text(registry: CollectorRegistry, *, ended: bool = False) -> bytes:
    """The exposition of one registry.

    Args:
        registry: A rank's metrics.
        ended: The rank has ended as it should: from now on only its counters count.
    """
    text = generate_latest(_WithoutCreated(registry))
    return text + f"{_ENDED}\n".encode() if ended else text


def snapshot_name(rank: int, generation: int) -> str:
    """File name of one start of a rank."""
    return f"rank{rank}.{generation}.prom"


def merge_directory(directory: Path, stale_after_seconds: float = 15.0) -> bytes:
    """Merge the files of a directory.

    Args:
        directory: Where ranks write; files of other names are left alone.
        stale_after_seconds: A rank whose file is older is down.

    Returns:
        The exposition, with ``distributed_inference_rank_up`` for each rank that has not ended as it should.

    Raises:
        OSError: A file cannot be read.
    """
    starts: dict[int, list[tuple[int, Path]]] = {}
    for path in directory.iterdir():
        match = _FILE_NAME.fullmatch(path.name)
        if match:
            starts.setdefault(int(match[1]), []).append((int(match[2]), path))
    families: dict[str, _Family] = {}
    up: dict[int, bool] = {}
    for rank in sorted(starts):
        newest = max(starts[rank])[1]
        for _, path in sorted(starts[rank]):
            try:
                text = read_file(path).decode("utf-8", "replace")
                fresh = time.time() - path.stat().st_mtime < stale_after_seconds
            except (
                FileNotFoundError,
                NotRegularFileError,
                TooLargeFileError,
            ):  # its rank has ended; or no rank has made it
                continue
            ended = text.rstrip().endswith(_ENDED)
            if path == newest and not ended:
                up[rank] = fresh
            _add(families, text, with_gauges=path == newest and fresh and not ended)
    lines = [line for family in families.values() if family.samples for line in family.lines()]
    if up:
        lines += [
            f"# HELP {RANK_UP} 1 while this rank's process writes its metrics, 0 after it died.",
            f"# TYPE {RANK_UP} gauge",
            *(f'{RANK_UP}{{rank="{rank}"}} {float(alive)}' for rank, alive in up.items()),
        ]
    return ("\n".join(lines) + "\n").encode() if lines else b""


@dataclass
class _Family:
    name: str
    help: str = ""
    type: str = "untyped"
    samples: dict[str, float] = field(default_factory=dict)

    def lines(self) -> Iterator[str]:
        yield self.help
        yield f"# TYPE {self.name} {self.type}"
        for series, value in self.samples.items():
            yield f"{series} {_number(value)}"


def _add(families: dict[str, _Family], text: str, *, with_gauges: bool) -> None:
    family: _Family | None = None
    for line in text.splitlines():
        if match := _HELP.match(line):
            name = match[1]
            family = families.setdefault(name, _Family(name))
            family.help = line
        elif line.startswith("# TYPE ") and family is not None:
            family.type = line.rsplit(" ", 1)[1]
        elif line and not line.startswith("#") and family is not None:
            series, _, text_of_value = line.rpartition(" ")
            try:
                value = float(text_of_value)
            except ValueError:
                continue  # no line that a rank has written
            if family.type != "gauge":
                family.samples[series] = family.samples.get(series, 0.0) + value
            elif with_gauges:
                family.samples[series] = value


def _number(value: float) -> str:
    return {float("inf"): "+Inf", float("-inf"): "-Inf"}.get(value, repr(value))


class _WithoutCreated:
    """A registry without the ``_created`` series, which are families of their own in this format."""

    def __init__(self, registry: CollectorRegistry):
        self._registry = registry

    def collect(self) -> Iterable[Metric]:
        for metric in self._registry.collect():
            metric.samples = [sample for sample in metric.samples if not sample.name.endswith("_created")]
            yield metric
