"""The plugin's own log: readable lines on the console, JSON lines per rank in files."""

from __future__ import annotations

import json
import logging
import os
import sys
from pathlib import Path
from typing import Any

LOGGER = "lightning_gpuorch"
CONTEXT: dict[str, Any] = {}
"""Fields that are added to each JSON line: the step, the chunk, the trace. Whoever knows them keeps them current."""


class _ConsoleFormatter(logging.Formatter):
    def __init__(self, rank: int):
        super().__init__()
        self._rank = rank

    def format(self, record: logging.LogRecord) -> str:
        where = f"gpuorch[{self._rank}]" if self._rank else "gpuorch"
        level = "" if record.levelno == logging.INFO else f" {record.levelname.lower()}"
        text = f"{where}{level}: {record.getMessage()}"
        return f"{text}\n{self.formatException(record.exc_info)}" if record.exc_info else text


class _JsonFormatter(logging.Formatter):
    def __init__(self, fields: dict[str, Any]):
        super().__init__()
        self._fields = fields

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "ts": round(record.created, 6),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            **self._fields,
            **CONTEXT,
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


class _QuietFileHandler(logging.FileHandler):
    """A file that may fail without anybody's run noticing; failures are counted."""

    failures = 0

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging's name
        type(self).failures += 1


def configure_logging(
    level: str, *, rank: int, replica: int, directory: str | os.PathLike[str] | None = None, generation: int = 0
) -> None:
    """Set up the logger ``lightning_gpuorch``, and no other. A second call replaces the first.

    Args:
        level: Name of the lowest level to log.
        rank: Global rank; ranks other than 0 print warnings and worse only.
        replica: Data-parallel index.
        directory: Where JSON lines go, one file per rank and start; None writes none.
        generation: How often this rank was started before.
    """
    logger = logging.getLogger(LOGGER)
    for handler in list(logger.handlers):
        if getattr(handler, "_gpuorch", False):
            logger.removeHandler(handler)
            handler.close()
    logger.setLevel(level)
    logger.propagate = False
    console = logging.StreamHandler(sys.stderr)
    console.setFormatter(_ConsoleFormatter(rank))
    console.setLevel(level if rank == 0 else max(logging.WARNING, logging.getLevelName(level)))
    handlers: list[logging.Handler] = [console]
    if directory is not None:
        try:
            path = Path(directory)
            path.mkdir(parents=True, exist_ok=True)
            file = _QuietFileHandler(path / f"rank-{rank:05d}.attempt-{generation}.jsonl", encoding="utf-8", delay=True)
            file.setFormatter(_JsonFormatter({"rank": rank, "replica": replica, "generation": generation}))
            handlers.append(file)
        except OSError:
            _QuietFileHandler.failures += 1
    for handler in handlers:
        handler._gpuorch = True  # type: ignore[attr-defined]
        logger.addHandler(handler)
