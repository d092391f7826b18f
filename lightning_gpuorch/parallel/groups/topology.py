"""Where a process stands in its job: ranks, replicas and the tensor-parallel group."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_gpuorch.errors import ConfigurationError


@dataclass(frozen=True)
class Topology:
    """A job of ``world_size`` ranks, cut into replicas of ``tensor_parallel_size`` consecutive ranks.

    Attributes:
        rank: Global rank of this process.
        world_size: Ranks in the job.
        local_rank: Rank within the node.
        tensor_parallel_size: Ranks that share a model.
        ranks_per_replica: Ranks by which replicas are numbered. More than ``tensor_parallel_size`` where a replica goes
            on with fewer devices than it began with; 0 takes ``tensor_parallel_size``.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    tensor_parallel_size: int = 1
    ranks_per_replica: int = 0

    def __post_init__(self) -> None:
        """Check that the ranks can be cut into replicas.

        Raises:
            ConfigurationError: ``world_size`` is not a multiple of ``tensor_parallel_size``.
        """
        if not self.ranks_per_replica:
            object.__setattr__(self, "ranks_per_replica", self.tensor_parallel_size)
        if self.world_size % self.ranks_per_replica:
            raise ConfigurationError(
                f"{self.world_size} devices cannot be cut into replicas of tensor_parallel_size="
                f"{self.ranks_per_replica}; choose a multiple of {self.ranks_per_replica} devices."
            )

    @property
    def replica(self) -> int:
        """Data-parallel index: which replica this rank belongs to."""
        return self.rank // self.ranks_per_replica

    @property
    def num_replicas(self) -> int:
        """Replicas in the job."""
        return self.world_size // self.ranks_per_replica

    @property
    def tensor_parallel_rank(self) -> int:
        """Rank within the replica."""
        return self.rank % self.ranks_per_replica

    @property
    def shrunk(self) -> bool:
        """Whether this replica goes on with fewer devices than it began with."""
        return self.tensor_parallel_size < self.ranks_per_replica

    @property
    def is_leader(self) -> bool:
        """Whether this rank writes its replica's results."""
        return self.tensor_parallel_rank == 0
