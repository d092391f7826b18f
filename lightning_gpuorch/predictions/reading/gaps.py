"""What has no prediction in a job, named, with the reasons that are known."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence

from lightning_gpuorch.errors import MissingPredictionsError, format_indices
from lightning_gpuorch.paths import Location
from lightning_gpuorch.predictions.reading.part_index import Locator
from lightning_gpuorch.predictions.storage.layout import LoaderLayout
from lightning_gpuorch.predictions.storage.manifest import Quarantined
from lightning_gpuorch.predictions.storage.unit_ranges import UnitRanges

_REASONS_SHOWN = 100


def refuse_gaps(
    root: Location, layouts: Sequence[LoaderLayout], located: Sequence[Locator], quarantined: Sequence[Quarantined]
) -> None:
    """Raise if anything is missing, naming it, and why where that is known.

    Args:
        root: The job's directory.
        layouts: Of its dataloaders.
        located: What is there of each.
        quarantined: What was given up, and why.

    Raises:
        MissingPredictionsError: Something is missing.
    """
    lines, missing = [], []
    for loader, (layout, locator) in enumerate(zip(layouts, located, strict=True)):
        gaps = locator.gaps
        prefix = f"dataloader {loader}: " if len(located) > 1 else ""
        noun = "batches" if layout.unit == "batch" else "samples"
        unread = [shard for shard in range(layout.num_shards or 0) if shard not in layout.ends]
        if unread:
            lines.append(f"{prefix}not read to their end: shards {format_indices(unread)}")
        elif layout.num_units is None and layout.unit != "scattered":
            lines.append(f"{prefix}the end of the stream was not reached")
        if gaps:
            missing.append(locator.missing)
            total = "" if layout.num_units is None else f" of {layout.num_units}"
            lines.append(f"{prefix}{len(gaps)}{total} {noun}: {layout.named(gaps.ranges)}")
            of_loader = [q for q in quarantined if q.loader == loader]
            lines.extend(f"  {text}" for text in _reasons(layout, gaps, of_loader))
    if lines:
        raise MissingPredictionsError(
            f"predictions are missing in {root}:\n  " + "\n  ".join(lines) + "\nRun the same command again to compute "
            "them, or read what there is with allow_missing=True.",
            UnitRanges(units for gaps in missing for units in gaps.ranges),
        )


def _reasons(layout: LoaderLayout, gaps: UnitRanges, quarantined: Sequence[Quarantined]) -> Iterator[str]:
    """Tell why units are missing. A note about units that a later run computed after all is passed over."""
    by_reason: dict[str, list[range]] = {}
    for entry in quarantined:
        by_reason.setdefault(entry.reason, []).append(range(entry.start, entry.stop))
    for reason, ranges in itertools.islice(by_reason.items(), _REASONS_SHOWN):
        lost = UnitRanges(_in_both(gaps.ranges, UnitRanges(_joined(ranges)).ranges))
        if lost:
            yield f"given up: {layout.named(lost.ranges)} ({reason})"
    if len(by_reason) > _REASONS_SHOWN:
        yield f"and {len(by_reason) - _REASONS_SHOWN} more reasons"


def _in_both(first: Sequence[range], second: Sequence[range]) -> Iterator[range]:
    """What is in ranges of both; each ascend and are disjoint."""
    at = other = 0
    while at < len(first) and other < len(second):
        one, two = first[at], second[other]
        common = range(max(one.start, two.start), min(one.stop, two.stop))
        if common:
            yield common
        at, other = (at + 1, other) if one.stop <= two.stop else (at, other + 1)


def _joined(ranges: Iterable[range]) -> Iterator[range]:
    """Ascending ranges of what is in any of these."""
    reached = 0
    for units in sorted(ranges, key=lambda units: units.start):
        yield range(max(units.start, reached), max(units.stop, reached))
        reached = max(reached, units.stop)
