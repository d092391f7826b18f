"""Liveness for jobs that no gpuorch supervisor watches: a stuck rank is shown and ended."""

from __future__ import annotations

import faulthandler
import logging
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import IO, Any

from lightning.pytorch.callbacks import Callback

from lightning_gpuorch.control.bootstrap import DUMP_SIGNAL
from lightning_gpuorch.control.environment import WorkerEnvironment
from lightning_gpuorch.control.heartbeat import Heartbeat, Limits, Phase, create_table
from lightning_gpuorch.worker.watchdog import start_watchdog

log = logging.getLogger(__name__)


class HeartbeatMonitor(Callback):
    """Finds out when a rank hangs, is stopped or cannot run Python any more, and ends it with its stack shown.

    For Lightning's own strategies: a process beside each rank looks at its heartbeat from outside. The rank is killed, so
    the job ends with an error instead of hanging for ever. Under ``strategy="gpuorch"`` with several devices the
    supervisor does this, and restarts; the callback then steps aside.

    Args:
        heartbeat_timeout_sec: Oldest sign of life while it runs.
        step_timeout_sec: Longest step, or ten times the slowest recent one if that is longer.
        start_timeout_sec: Longest first step.
    """

    def __init__(
        self, heartbeat_timeout_sec: float = 30.0, step_timeout_sec: float = 300.0, start_timeout_sec: float = 1800.0
    ):
        self._limits = Limits(alive=heartbeat_timeout_sec, step=step_timeout_sec, start=start_timeout_sec)
        self._heartbeat: Heartbeat | None = None
        self._watchdog: subprocess.Popen[bytes] | None = None
        self._dump: IO[str] | None = None
        self._directory: str | None = None

    def on_predict_start(self, trainer: Any, pl_module: Any) -> None:
        """Begin to watch."""
        if WorkerEnvironment.read() is not None:
            log.debug("HeartbeatMonitor: the supervisor watches this rank; stepping aside")
            return
        self._directory = tempfile.mkdtemp(prefix="gpuorch-heartbeat-")
        self._table = create_table(os.path.basename(self._directory), 1, Path(self._directory))
        self._heartbeat = Heartbeat(self._table, 0, 0)
        self._dump = open(os.path.join(self._directory, "stacks"), "w")  # noqa: SIM115 - faulthandler keeps it
        faulthandler.register(DUMP_SIGNAL, file=self._dump, all_threads=True, chain=False)
        self._watchdog = start_watchdog(self._table.path, self._dump.name, trainer.global_rank, self._limits)

    def on_predict_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """A step begins."""
        if self._heartbeat is not None:
            self._heartbeat.begin_step(0, dataloader_idx, batch_idx, batch_idx, batch_idx + 1)

    def on_predict_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """A step is complete."""
        if self._heartbeat is not None:
            self._heartbeat.end_step()

    def on_predict_end(self, trainer: Any, pl_module: Any) -> None:
        """Stop watching."""
        self._stop()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Stop watching."""
        self._stop()

    def _stop(self) -> None:
        heartbeat, self._heartbeat = self._heartbeat, None
        if heartbeat is None:
            return
        heartbeat.enter(Phase.OUTSIDE)
        heartbeat.stop()
        assert self._watchdog is not None
        assert self._dump is not None
        assert self._directory is not None
        self._watchdog.kill()
        self._watchdog.wait(10)
        faulthandler.unregister(DUMP_SIGNAL)
        self._dump.close()
        Path(self._table.path).unlink(missing_ok=True)
        shutil.rmtree(self._directory, ignore_errors=True)
