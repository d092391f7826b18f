"""One progress bar for the whole job, on rank 0."""

from __future__ import annotations

import logging
import threading
import time
from typing import Any

from lightning.pytorch.callbacks import ProgressBar
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from lightning_gpuorch.errors import ControlPlaneError

log = logging.getLogger(__name__)


class JobProgressBar(ProgressBar):
    """Shows the chunks of the whole job, not of one rank: done, rate, time left, restarts.

    In a terminal it is a bar; elsewhere a line of log now and then. With another Lightning strategy there is no job to
    ask, and it counts this rank's batches.

    Args:
        refresh_seconds: Time between two looks at the job.
        log_seconds: Time between two lines where there is no terminal.
    """

    def __init__(self, refresh_seconds: float = 0.5, log_seconds: float = 10.0):
        super().__init__()
        self._refresh_seconds, self._log_seconds = refresh_seconds, log_seconds
        self._thread: threading.Thread | None = None
        self._stop = threading.Event()
        self._batches = 0
        self._enabled = True

    def disable(self) -> None:
        """Show nothing from now on."""
        self._enabled = False

    def enable(self) -> None:
        """Show again."""
        self._enabled = True

    def on_predict_start(self, trainer: Any, pl_module: Any) -> None:
        """Start looking at the job."""
        if not self._enabled or not trainer.is_global_zero or self._thread is not None:
            return
        self._stop.clear()
        self._batches = 0
        runtime = getattr(trainer.strategy, "runtime", None)
        self._thread = threading.Thread(target=self._show, args=(runtime,), name="gpuorch-progress", daemon=True)
        self._thread.start()

    def on_predict_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Count this rank's batches, for strategies that have no job to ask."""
        self._batches += 1

    def on_predict_end(self, trainer: Any, pl_module: Any) -> None:
        """Stop."""
        self._finish()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Stop."""
        self._finish()

    def _finish(self) -> None:
        thread, self._thread = self._thread, None
        if thread is not None:
            self._stop.set()
            thread.join(5)

    def _look(self, runtime: Any) -> tuple[int, int | None, str]:
        """What is done, of how many, and what else is to be said."""
        job = getattr(runtime, "job", None)
        if job is None:
            return self._batches, None, "batches on rank 0"
        seen = job.progress()
        restarts = f", {seen['restarts']} restarts" if seen["restarts"] else ""
        return seen["chunks_computed"], seen["chunks"] or None, f"chunks{restarts}"

    def _show(self, runtime: Any) -> None:
        console = Console(stderr=True)
        try:
            if console.is_terminal:
                self._show_bar(runtime, console)
            else:
                self._show_lines(runtime)
        except ControlPlaneError as error:  # the coordinator is gone or busy: the job's own requests will tell
            log.debug("no progress to show: %s", error)

    def _show_bar(self, runtime: Any, console: Console) -> None:
        columns = (
            TextColumn("predicting"), BarColumn(), TextColumn("{task.completed:.0f}/{task.total} {task.description}"),
            TimeElapsedColumn(), TimeRemainingColumn(),
        )  # fmt: skip
        with Progress(*columns, console=console, transient=False) as bar:
            task = bar.add_task("", total=None)
            ended = False
            while not ended:
                ended = self._stop.wait(self._refresh_seconds)
                done, total, text = self._look(runtime)
                bar.update(task, completed=done, total=total, description=text)

    def _show_lines(self, runtime: Any) -> None:
        began = time.monotonic()
        first: tuple[int, float] | None = None
        while not self._stop.wait(self._log_seconds):
            done, total, text = self._look(runtime)
            elapsed = time.monotonic() - began
            # From the first look on: what an earlier run has done says nothing of the rate.
            first = first or (done, elapsed)
            rate = (done - first[0]) / (elapsed - first[1]) if elapsed > first[1] else 0.0
            left = f", about {(total - done) / rate:.0f} s left" if total and rate > 0 else ""
            log.info("%d of %s %s after %.0f s%s", done, total if total else "?", text, elapsed, left)
