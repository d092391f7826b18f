"""What a run leaves behind for people: its root cause, and its events, logs, error records and report."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

from lightning_gpuorch.liveness import main_thread_of_dump
from lightning_gpuorch.telemetry.report import write_report
from lightning_gpuorch.workers import Worker

log = logging.getLogger(__name__)

KEPT = ("events", "logs", "errors", "profiles")
"""Folders of the run directory that are kept beside the predictions."""


def failure_record(worker: Worker, reason: str) -> dict[str, Any]:
    """What is known of a worker's end: why, its exception with traceback, or where a crash has left it."""
    record: dict[str, Any] = {"rank": worker.rank, "generation": worker.generation, "reason": reason}
    try:
        record.update(json.loads(worker.error_file.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:  # killed before it could write one
        log.debug("rank %d left no error record: %s", worker.rank, error)
        where = main_thread_of_dump(worker.dump_file)
        if where:
            record["traceback"] = where
    record.pop("pid", None)
    return record


def describe_failure(record: dict[str, Any]) -> str:
    """The root cause of a failed run, for the end of its log."""
    said = f": {record['type']}: {record['message']}" if "type" in record else ""
    where = f"\n{record['traceback'].rstrip()}" if record.get("traceback") else ""
    return f"first failure: rank {record['rank']}, generation {record['generation']}, {record['reason']}{said}{where}"


def keep_records(run_directory: Path, target: Path) -> None:
    """Copy a node's records beside the predictions. Never ends the run.

    Args:
        run_directory: Where this node has kept them.
        target: Where they go; other nodes write there, too.
    """
    try:
        for name in KEPT:
            if (run_directory / name).is_dir():
                shutil.copytree(run_directory / name, target / name, ignore=_empty_files, dirs_exist_ok=True)
    except Exception as error:  # noqa: BLE001 - records that cannot be kept cost nobody a prediction
        log.warning("the records of this run cannot be kept: %s: %s", type(error).__name__, error)


def _empty_files(folder: str, names: list[str]) -> list[str]:
    return [name for name in names if (path := Path(folder) / name).is_file() and not path.stat().st_size]


def report_run(target: Path) -> None:
    """Write the report of a run whose records are kept. Never ends the run."""
    try:
        write_report(target, target / "report.html")
        log.info("the report of this run is %s", target / "report.html")
    except Exception as error:  # noqa: BLE001 - a report that cannot be written costs nobody a prediction
        log.warning("no report of this run: %s: %s", type(error).__name__, error)
