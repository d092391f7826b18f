"""Finds ranks that are stuck, from outside: their table in shared memory, who is stuck, and what they were computing."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from pathlib import Path

from lightning_gpuorch.config import OrchestratorConfig
from lightning_gpuorch.control.heartbeat import Judge, Limits, StuckRank, create_table, sweep_tables
from lightning_gpuorch.control.messages.base import LoaderKey, UnitRange
from lightning_gpuorch.supervisor.workers import Workers

JUDGE_SECONDS = 0.2


class HangDetector:
    """Watches the ranks of a node.

    Args:
        config: Has the limits.
        name: Of the table's file.
        directory: Where the table is, if there is no room in shared memory.
        num_ranks: Ranks of this node.
        local: Local rank of a global rank.
    """

    def __init__(
        self, config: OrchestratorConfig, name: str, directory: Path, num_ranks: int, local: Callable[[int], int]
    ):
        self._local = local
        sweep_tables()
        self._table = create_table(name, num_ranks, directory)
        limits = Limits(
            alive=config.heartbeat_timeout_sec,
            start=config.start_timeout_sec,
            step=config.step_timeout_sec,
            commit=config.commit_timeout_sec,
            exit=config.exit_timeout_sec,
        )
        self._judge = Judge(self._table, limits)
        self._next_judgement = 0.0

    @property
    def path(self) -> str:
        """The table, for the ranks to write to."""
        return self._table.path

    def forget(self, rank: int) -> None:
        """A rank is about to be started again."""
        self._table.clear(self._local(rank))
        self._judge.forget(self._local(rank))

    def find_stuck(self, workers: Workers) -> tuple[int, StuckRank] | None:
        """The rank that is stuck, with the verdict, if one is; looks five times a second."""
        if time.monotonic() < self._next_judgement:
            return None
        self._next_judgement = time.monotonic() + JUDGE_SECONDS
        ranks = {self._local(rank): rank for rank in workers}
        pids = {local: workers[rank].process.pid for local, rank in ranks.items()}
        started = {local: workers[rank].started_ns for local, rank in ranks.items()}
        verdict = self._judge.check(pids, started)
        return None if verdict is None else (ranks[verdict.rank], verdict)

    def have_worked(self, ranks: Iterable[int]) -> bool:
        """Whether any of these has completed a step in its present life."""
        return any(self._table.row(self._local(rank)).progress for rank in ranks)

    def in_work(self, culprit: int, group: Iterable[int]) -> tuple[dict[LoaderKey, int], dict[LoaderKey, UnitRange]]:
        """The chunk and the units that a rank was computing, else its group."""
        for rank in (culprit, *group):
            row = self._table.row(self._local(rank))
            if row.pid and row.chunk >= 0:
                return {(row.job, row.loader): row.chunk}, {(row.job, row.loader): (row.unit_start, row.unit_stop)}
        return {}, {}

    def close(self) -> None:
        """Remove the table."""
        self._table.close()
        Path(self._table.path).unlink(missing_ok=True)
