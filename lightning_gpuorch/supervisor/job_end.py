"""How a job has ended, by its output directory alone: for a node that can ask no coordinator any more."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from lightning_gpuorch.control.jobs import missing_units
from lightning_gpuorch.errors import GPUOrchError
from lightning_gpuorch.paths import Location, location
from lightning_gpuorch.predictions.storage.journal import PartJournal, loader_directory
from lightning_gpuorch.predictions.storage.layout import LoaderLayout
from lightning_gpuorch.predictions.storage.manifest import load
from lightning_gpuorch.predictions.storage.stores import store_of
from lightning_gpuorch.predictions.storage.working_copy import working_copy
from lightning_gpuorch.telemetry.events.log import read_events, select

log = logging.getLogger(__name__)

SOURCE_OF_NODE_0 = "supervisor"
"""Of the events of the supervisor that knows how a job ends."""
_LATER_CALLS = "predict-"
"""How the folders of further predict calls begin that share an output directory."""


def recorded_exit_code(directory: str, run_id: str, storage_options: Mapping[str, str] | None) -> int | None:
    """Read the exit code that node 0 has recorded at the end of a run.

    Args:
        directory: The job's output directory, or the URL of one.
        run_id: The run.
        storage_options: Of the object store.

    Returns:
        The exit code, or None if the run has not ended, as far as its records tell.
    """
    try:
        with working_copy(location(directory, "records", storage_options) / "runs" / run_id) as records:
            events, _ = read_events(records / "events")
    except (GPUOrchError, OSError) as error:
        log.warning("the records of the run cannot be read: %s", error)
        return None
    ends = [event for event in select(events, "end") if event.get("source") == SOURCE_OF_NODE_0]
    code = ends[-1].get("exit_code") if ends else None
    return code if type(code) is int else None


def what_is_lacking(directory: str, storage_options: Mapping[str, str] | None) -> str | None:
    """Look through the parts of all predict calls that a job keeps.

    Args:
        directory: Its output directory, or the URL of one.
        storage_options: Of the object store.

    Returns:
        What is missing, in words, or None if nothing is.
    """
    try:
        root = location(directory, "late_node_output_dir", storage_options)
        later = store_of(root).folders(root, _LATER_CALLS)
        for call in (root, *(root / name for name in sorted(later))):
            lacking = _lacking_in(call)
            if lacking is not None:
                return lacking
    except (GPUOrchError, OSError) as error:
        return f"{directory} does not tell whether the job is complete: {error}"
    return None


def _lacking_in(directory: Location) -> str | None:
    manifest = load(directory)
    if manifest is None:
        return f"{directory} holds no job"
    for loader, layout in enumerate(manifest.loaders):
        journal = PartJournal(loader_directory(directory, loader))
        num_missing = _num_missing(journal, layout)
        if num_missing is None:
            return f"the end of the stream in {journal.directory} was not seen"
        if num_missing:
            return f"{journal.directory} lacks {num_missing} of {layout.num_units} units of work"
    return None


def _num_missing(journal: PartJournal, layout: LoaderLayout) -> int | None:
    if layout.num_units is None:
        return None
    done = journal.done()
    partial = [chunk for chunk in done if chunk < layout.num_chunks and not journal.header(chunk).covers(layout, chunk)]
    return len(missing_units(layout, done - set(partial)))
