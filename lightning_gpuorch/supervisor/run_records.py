"""What is known of the ends of workers: for the run's records, and for the user, who sees each traceback once."""

from __future__ import annotations

import logging
from collections import Counter
from typing import Any

from lightning_gpuorch.control.heartbeat import main_thread_of_dump
from lightning_gpuorch.supervisor.workers import Worker

log = logging.getLogger(__name__)


def failure_record(worker: Worker, reason: str) -> dict[str, Any]:
    """What is known of a worker's end: why, its exception with traceback, or where a crash has left it."""
    record: dict[str, Any] = {"rank": worker.rank, "generation": worker.generation, "reason": reason}
    left = worker.error_record()
    if left is not None:
        return {**record, "type": left.type, "message": left.message, "traceback": left.traceback}
    where = main_thread_of_dump(worker.dump_file)  # killed before it could write one
    return {**record, "traceback": where} if where else record


class FailureLog:
    """Shows failures: the cause in the first line, an equal traceback once, the others counted.

    Attributes:
        first: The record of the first failure, which is the root cause of a failed run.
    """

    def __init__(self) -> None:
        self.first: dict[str, Any] | None = None
        self._shown: Counter[str] = Counter()

    def show(self, record: dict[str, Any], level: int, text: str) -> None:
        """Log a failure.

        Args:
            record: Its record.
            level: Of the log.
            text: The failure and what is done about it, in one line.
        """
        self.first = self.first or record
        trace = str(record.get("traceback", "")).rstrip()
        key = trace.rsplit("\n", 1)[0] if "type" in record else trace  # the message may tell another sample
        self._shown[key] += bool(trace)
        count = self._shown[key]
        if not trace:
            log.log(level, "%s", text)
        elif count == 1:
            log.log(level, "%s\n%s", text, trace)
        else:
            log.log(level, "%s (the same traceback as above, for the %s time)", text, _ordinal(count))

    def summary(self) -> str:
        """The root cause of a failed run, for the end of its log."""
        record = self.first
        assert record is not None
        said = f"{record['type']}: {record['message']}" if "type" in record else record["reason"]
        times = max(self._shown.values(), default=1)
        return f"first failure: rank {record['rank']}, generation {record['generation']}: {said}" + (
            f"; {times} failures with the same traceback" if times > 1 else ""
        )


def _ordinal(count: int) -> str:
    return {2: "second", 3: "third"}.get(count, f"{count}th")
