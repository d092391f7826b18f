"""What a callback can know of its rank, under this plugin's strategy and others, with Trainer and Fabric.

Only what ``Trainer``, ``Fabric`` and ``MultiGPUOrchestrator`` share is used: ``global_rank``, ``world_size``,
``is_global_zero`` and ``strategy``; and ``strategy.runtime`` where the strategy is ours.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class RankInfo:
    """A rank as a callback sees it.

    Attributes:
        rank: Global rank.
        world_size: Ranks of the job.
        replica: Data-parallel index; the rank where the strategy has no replicas.
        generation: How often this rank was started before.
        is_leader: Whether this rank speaks for its tensor-parallel group.
        device: What it computes on.
        run_directory: Where logs, events and metrics of the run go, if the job has such a place.
        runtime: The strategy's runtime, if it is this plugin's.
    """

    rank: int
    world_size: int
    replica: int
    generation: int
    is_leader: bool
    device: torch.device
    run_directory: Path | None
    runtime: Any

    @classmethod
    def of(cls, trainer: Any) -> RankInfo:
        """Look at a ``Trainer``, ``Fabric`` or ``MultiGPUOrchestrator``."""
        strategy = trainer.strategy
        runtime = getattr(strategy, "runtime", None)
        directory = getattr(runtime, "run_directory", None)
        device = getattr(strategy, "root_device", None) or getattr(runtime, "device", None)
        restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        return cls(
            rank=trainer.global_rank,
            world_size=trainer.world_size,
            replica=getattr(runtime, "replica", trainer.global_rank),
            generation=getattr(runtime, "generation", int(restarts) if restarts.isdecimal() else 0),
            is_leader=getattr(runtime, "is_leader", True),
            device=device if isinstance(device, torch.device) else torch.device("cpu"),
            run_directory=Path(directory) if directory is not None else None,
            runtime=runtime,
        )

    def node_directory(self) -> Path:
        """A directory that the ranks of this job on this node share, when the job has no run directory.

        Its name is made of what a launcher gives all of them, and no other job: the rendezvous.
        """
        names = ("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "SLURM_JOB_ID")
        known = [f"{name}={os.environ[name]}" for name in names if name in os.environ]
        identity = "\n".join(known) if self.world_size > 1 and known else f"pid={os.getpid()}"
        digest = hashlib.sha256(identity.encode()).hexdigest()[:16]
        return Path(tempfile.gettempdir()) / f"gpuorch-{os.getuid()}-{digest}"


def batch_length(batch: Any) -> int:
    """Samples in a batch, where nobody else knows: the leading dimension of its first tensor, else its length.

    The count is for throughput figures only. With this plugin's strategy it is not used: the sampler's indices are.
    """
    if isinstance(batch, torch.Tensor):
        return int(batch.shape[0]) if batch.ndim else 1
    if isinstance(batch, Mapping):
        return next((batch_length(value) for value in batch.values()), 0)
    if isinstance(batch, (list, tuple)):
        tensors = [item for item in batch if isinstance(item, (torch.Tensor, Mapping))]
        return batch_length(tensors[0]) if tensors else len(batch)
    return 1
