"""The two collectives of a sharded layer, over one tensor-parallel group."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812

# torch renamed the collective in 2.13.
_all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class Communicator:
    """The collectives of one tensor-parallel group, shared by all sharded layers of a model.

    All layers of a model hold the same object: assigning :attr:`process_group` moves the whole model to another group,
    which is how a replica goes on after its group was rebuilt. Copies of a module share it; a pickled one comes back
    on the default group.

    Args:
        process_group: The group; None for the default group.
        rank: This process's rank in the group; asked from the group if None.
        size: Number of ranks in the group; asked from the group if None.
    """

    def __init__(
        self, process_group: dist.ProcessGroup | None = None, rank: int | None = None, size: int | None = None
    ) -> None:
        self.process_group = process_group
        self.rank = dist.get_rank(process_group) if rank is None else rank
        self.size = dist.get_world_size(process_group) if size is None else size

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum a tensor over the ranks, in place when it is contiguous."""
        tensor = tensor.contiguous()
        dist.all_reduce(tensor, group=self.process_group)
        return tensor

    def all_gather_last(self, tensor: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
        """Join the ranks' pieces along the last dimension.

        Args:
            tensor: This rank's piece, ``(..., sizes[rank])``.
            sizes: Size of every rank's piece. Shorter pieces are padded on the way.

        Returns:
            The whole, ``(..., sum(sizes))``.
        """
        widest = max(sizes)
        if tensor.shape[-1] < widest:
            tensor = F.pad(tensor, (0, widest - tensor.shape[-1]))
        tensor = tensor.contiguous()
        flat = tensor.new_empty((self.size * tensor.numel(),))
        _all_gather(flat, tensor.view(-1), group=self.process_group)
        pieces = flat.view(self.size, *tensor.shape)
        if all(size == widest for size in sizes):
            return pieces.movedim(0, -2).flatten(-2)
        return torch.cat([piece[..., :size] for piece, size in zip(pieces, sizes, strict=True)], -1)

    def __deepcopy__(self, memo: dict[int, Any]) -> Communicator:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (None, self.rank, self.size)
