"""Why did a run fail, as far as its workers have left word?"""

from __future__ import annotations

from typing import Any

from lightning_gpuorch.control.heartbeat import main_thread_of_dump
from lightning_gpuorch.supervisor.workers import Worker


def failure_record(worker: Worker, reason: str) -> dict[str, Any]:
    """What is known of a worker's end: why, its exception with traceback, or where a crash has left it."""
    record: dict[str, Any] = {"rank": worker.rank, "generation": worker.generation, "reason": reason}
    left = worker.error_record()
    left.pop("pid", None)
    if not left:  # killed before it could write one
        where = main_thread_of_dump(worker.dump_file)
        if where:
            record["traceback"] = where
    return {**record, **left}


def describe_failure(record: dict[str, Any]) -> str:
    """The root cause of a failed run, for the end of its log."""
    said = f": {record['type']}: {record['message']}" if "type" in record else ""
    where = f"\n{record['traceback'].rstrip()}" if record.get("traceback") else ""
    return f"first failure: rank {record['rank']}, generation {record['generation']}, {record['reason']}{said}{where}"
