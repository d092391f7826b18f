"""The plugin's own log records: readable lines to the console, JSON lines per rank to files.

Only the logger ``lightning_gpuorch`` is touched: an application's logging stays as it is. Standard output is not used,
since launchers put prefixes on it that break JSON.
"""

from __future__ import annotations

import logging
import os
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from lightning_gpuorch.errors import ConfigurationError
from lightning_gpuorch.telemetry.events.json_lines import LineFile, encode_line
from lightning_gpuorch.telemetry.failures import FailureTally, observer_failures

if TYPE_CHECKING:
    _StreamHandler = logging.StreamHandler[TextIO]
else:
    _StreamHandler = logging.StreamHandler  # takes no type arguments before Python 3.11

LOGGER = "lightning_gpuorch"

CONTEXT: dict[str, Any] = {}
"""What this process is doing, added to each JSON line: ``step``, ``chunk``, ``trace_id``. Each is set where it is known;
an assignment costs less than 0.1 us, so the loop may do it each step."""

_STANDARD_ATTRIBUTES = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


def configure_logging(
    level: str | int,
    *,
    rank: int | None,
    replica: int,
    directory: str | os.PathLike[str] | None = None,
    generation: int = 0,
    stream: TextIO | None = None,
    failures: FailureTally = observer_failures,
) -> None:
    """Set up the logger ``lightning_gpuorch``, and no other. A second call replaces the first.

    Args:
        level: Lowest level to log, by name (``"INFO"``) or number.
        rank: Global rank; None for the supervisor. Rank 0 and the supervisor print from ``level`` up; the others print
            warnings and worse. Files get everything.
        replica: Data-parallel index.
        directory: Where JSON lines go, as ``rank-<rank>.attempt-<generation>.jsonl``; None writes none.
        generation: How often this rank was started before.
        stream: Where console lines go; standard error by default.
        failures: Where failing handlers are counted.

    Raises:
        ConfigurationError: There is no such level. A directory that cannot be written raises nothing: it is counted.
    """
    number = logging.getLevelName(level.upper()) if isinstance(level, str) else level
    if not isinstance(number, int):
        raise ConfigurationError(f"log_level={level!r} is no level; use DEBUG, INFO, WARNING, ERROR or CRITICAL.")
    logger = logging.getLogger(LOGGER)
    reset_logging()
    logger.setLevel(number)
    logger.propagate = False
    console = _ConsoleHandler(stream if stream is not None else sys.stderr, failures)
    console.setFormatter(_ConsoleFormatter(rank))
    console.setLevel(max(logging.WARNING, number) if rank else number)
    logger.addHandler(console)
    if directory is not None and rank is not None:
        path = Path(directory) / f"rank-{rank:05d}.attempt-{generation}.jsonl"
        logger.addHandler(
            _JsonFileHandler(path, {"rank": rank, "replica": replica, "generation": generation}, failures)
        )


def reset_logging() -> None:
    """Take down what :func:`configure_logging` has set up."""
    logger = logging.getLogger(LOGGER)
    for handler in [h for h in logger.handlers if isinstance(h, (_ConsoleHandler, _JsonFileHandler))]:
        logger.removeHandler(handler)
        handler.close()
    logger.propagate = True
    logger.setLevel(logging.NOTSET)


def close_log_files() -> None:
    """Write no further JSON lines: what is logged from now on goes to the console alone."""
    logger = logging.getLogger(LOGGER)
    for handler in [h for h in logger.handlers if isinstance(h, _JsonFileHandler)]:
        logger.removeHandler(handler)
        handler.close()


def json_fields(record: logging.LogRecord, static: Mapping[str, Any] = CONTEXT) -> dict[str, Any]:
    """The fields of a record's JSON line, ``extra=`` included.

    Args:
        record: The record.
        static: Fields that are the same for all records of this process.
    """
    extra = {name: value for name, value in vars(record).items() if name not in _STANDARD_ATTRIBUTES}
    fields: dict[str, Any] = {
        **extra,
        **CONTEXT,
        **static,
        "ts": round(record.created, 6),
        "level": record.levelname,
        "logger": record.name,
        "message": record.getMessage(),
    }
    if record.exc_info and record.exc_info[0] is not None:
        fields["exception"] = "".join(traceback.format_exception(*record.exc_info))
    return fields


class _ConsoleFormatter(logging.Formatter):
    """``[rank 3] warning: what happened``; the level is left out where it is INFO, the rank where there is none."""

    def __init__(self, rank: int | None):
        super().__init__()
        self._rank = rank

    def format(self, record: logging.LogRecord) -> str:
        level = "" if record.levelno == logging.INFO else f" {record.levelname.lower()}:"
        who = "[gpuorch]" if self._rank is None else f"[rank {self._rank}]"
        text = f"{who}{level} {record.getMessage()}"
        if record.exc_info and record.exc_info[0] is not None:
            text += "\n" + "".join(traceback.format_exception(*record.exc_info)).rstrip("\n")
        return text


class _ConsoleHandler(_StreamHandler):
    """A console that may be closed or a broken pipe without anybody's run noticing."""

    def __init__(self, stream: TextIO, failures: FailureTally):
        super().__init__(stream)
        self._failures = failures

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging's name
        self._failures.add("logs", sys.exc_info()[1], silent=True)


class _JsonFileHandler(logging.Handler):
    """Appends each record with one write, so that ranks that die lose nothing and tear at most their last line."""

    def __init__(self, path: Path, static: dict[str, Any], failures: FailureTally):
        super().__init__()
        self._file, self._static, self._failures = LineFile(path), static, failures

    def emit(self, record: logging.LogRecord) -> None:
        # Never raises and never logs: a record about a failing log would come back here.
        try:
            self._file.append(encode_line(json_fields(record, self._static)))
        except Exception as error:  # noqa: BLE001 - an observer never ends the run
            self._failures.add("logs", error, silent=True)

    def close(self) -> None:
        try:
            self._file.close()
        except OSError as error:
            self._failures.add("logs", error, silent=True)
        super().close()
