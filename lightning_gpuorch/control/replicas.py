"""How the ranks of a run are cut into replicas, and which replicas are still served."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from lightning_gpuorch.control.messages.base import Sender
from lightning_gpuorch.errors import ConfigurationError


@dataclass
class Replicas:
    """The replicas of a run.

    Attributes:
        world_size: Ranks of the run.
        tensor_parallel_size: Ranks per replica, once it is known.
        generations: Newest generation by replica.
        retired: Replicas that were given up.
    """

    world_size: int
    tensor_parallel_size: int | None = None
    generations: dict[int, int] = field(default_factory=dict)
    retired: set[int] = field(default_factory=set)

    @property
    def num_replicas(self) -> int:
        """Replicas of the run."""
        return max(1, self.world_size // (self.tensor_parallel_size or 1))

    def ranks_of(self, replica: int) -> range:
        """Global ranks of a replica."""
        size = self.tensor_parallel_size or 1
        return range(replica * size, (replica + 1) * size)

    def register(self, sender: Sender, size: int, check: Callable[[int], None]) -> None:
        """Take what a rank says of the tensor-parallel size; the first one decides.

        Args:
            sender: The rank.
            size: What it says.
            check: Refuses a size.

        Raises:
            ConfigurationError: The ranks cannot be cut so, or others said something else.
        """
        if self.tensor_parallel_size is None:
            if self.world_size % size:
                raise ConfigurationError(
                    f"{self.world_size} devices cannot be cut into replicas of tensor_parallel_size={size}."
                )
            check(size)
            self.tensor_parallel_size = size
        elif size != self.tensor_parallel_size:
            raise ConfigurationError(
                f"rank {sender.rank} uses tensor_parallel_size={size}, the others use {self.tensor_parallel_size}; all ranks "
                "must run the same script with the same options."
            )
        replica = sender.rank // size
        self.generations[replica] = max(sender.generation, self.generations.get(replica, 0))
