"""Sharded forms of Linear, Conv1D and Embedding: they compute with this rank's weights only.

Weights are plain local tensors and every layer issues at most one collective, so eager mode, ``torch.compile`` and
``inference_mode`` see nothing unusual. The forms are for inference: their parameters take no gradient.
"""

from __future__ import annotations

import functools
import sys
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from lightning_gpuorch.errors import TensorParallelError
from lightning_gpuorch.parallel.tensor_parallel.intervals import Intervals, length, take
from lightning_gpuorch.parallel.tensor_parallel.plan import LayerKind, LayerPlan

if TYPE_CHECKING:
    from lightning_gpuorch.parallel.tensor_parallel.communicator import Communicator


def conv1d_class() -> type[nn.Module] | None:
    """Give transformers' ``Conv1D`` (a Linear whose weight is stored ``(in, out)``), None while nobody imported it."""
    module = sys.modules.get("transformers.pytorch_utils")
    return getattr(module, "Conv1D", None)


def is_conv1d(module: nn.Module) -> bool:
    """Tell whether a module is transformers' ``Conv1D``."""
    cls = conv1d_class()
    return cls is not None and isinstance(module, cls)


def features(module: nn.Module) -> tuple[int, int]:
    """Give ``(input features, output features)`` of a whole Linear, Conv1D or Embedding (rows, width)."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if isinstance(module, nn.Embedding):
        return module.num_embeddings, module.embedding_dim
    return int(module.nx), int(module.nf)  # type: ignore[arg-type]


def weight_dims(module: nn.Module) -> tuple[int, int]:
    """Give the dimensions of ``weight`` that hold input and output features."""
    return (0, 1) if isinstance(module, nn.Embedding) or is_conv1d(module) else (1, 0)


def refuse_gradient(layer: nn.Module, value: torch.Tensor) -> None:
    """Refuse to take part in a gradient, of which a rank would only compute its part.

    Raises:
        TensorParallelError: ``value`` requires a gradient.
    """
    if value.requires_grad and torch.is_grad_enabled():
        raise TensorParallelError(
            f"a gradient is taken through a sharded layer ({type(layer).__name__}), and sharded models are for inference. "
            "Compute under torch.no_grad(), or use tensor_parallel_size=1."
        )


class Sharded(nn.Module):
    """What the sharded layers have in common.

    Attributes:
        layer_plan: The layer's role.
        communicator: The collectives of its group.
    """

    layer_plan: LayerPlan
    communicator: Communicator
    weight: Any
    bias: Any

    def bind(self, layer_plan: LayerPlan, communicator: Communicator) -> None:
        """Tell the layer its role and its group."""
        self.layer_plan = layer_plan
        self.communicator = communicator
        self.sizes = tuple(length(intervals) for intervals in layer_plan.intervals)

    def apply_to(self, input: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:  # noqa: A002
        """Compute the layer's output, with its bias or without."""
        raise NotImplementedError

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002
        """Compute the layer's output."""
        return self.apply_to(input, self.bias)

    @property
    def own_intervals(self) -> Intervals:
        """This rank's intervals."""
        return self.layer_plan.intervals[self.communicator.rank]

    def project(self, input: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:  # noqa: A002
        """Multiply by the local weight."""
        refuse_gradient(self, input)
        return F.linear(input, self.weight, bias)


class _TransposedProject(Sharded):
    def project(self, input: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:  # noqa: A002
        refuse_gradient(self, input)
        output = torch.matmul(input, self.weight)
        return output if bias is None else output + bias


class ColumnSharded(Sharded):
    """Output channels are this rank's; they stay local."""

    def apply_to(self, input: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:  # noqa: A002
        """Map ``(..., in)`` to ``(..., local out)``."""
        return self.project(input, bias)


class ColumnGather(Sharded):
    """Output channels are this rank's; the whole is gathered."""

    def apply_to(self, input: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:  # noqa: A002
        """Map ``(..., in)`` to ``(..., out)``."""
        return self.communicator.all_gather_last(self.project(input, bias), self.sizes)


class RowSharded(Sharded):
    """Input channels are this rank's; outputs are summed over the ranks, then the bias is added once."""

    def apply_to(self, input: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:  # noqa: A002
        """Map ``(..., local in)`` to ``(..., out)``."""
        output = self.communicator.all_reduce(self.project(input, None))
        return output if bias is None else output + bias


class RowSplit(RowSharded):
    """As :class:`RowSharded`, for an input that arrives whole."""

    def apply_to(self, input: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:  # noqa: A002
        """Map ``(..., in)`` to ``(..., out)``."""
        return super().apply_to(take(input, input.dim() - 1, self.own_intervals), bias)


class ColumnRows(Sharded):
    """Each row of an embedding holds this rank's channels."""

    bias = None

    def apply_to(self, input: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:  # noqa: A002
        """Map indices to ``(..., local channels)``."""
        return F.embedding(input, self.weight)


class Vocabulary(Sharded):
    """Rows of an embedding are this rank's; rows of others count as zero, then the ranks are summed."""

    max_norm: float | None
    norm_type: float
    bias = None

    def apply_to(self, input: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:  # noqa: A002
        """Map indices to ``(..., channels)``.

        Raises:
            IndexError: An index is outside of the whole vocabulary; on an accelerator a device-side assertion, as there.
        """
        ((start, stop),) = self.own_intervals
        num_rows = self.layer_plan.intervals[-1][-1][1]
        elsewhere = (input < start) | (input >= stop)
        # An index that no rank holds stays out of bounds here too, so that every rank fails in this lookup.
        unknown = (input < 0) | (input >= num_rows)
        local = (input - start).masked_fill(elsewhere, 0).masked_fill(unknown, stop - start)
        rows = F.embedding(local, self.weight, None, self.max_norm, self.norm_type)
        return self.communicator.all_reduce(rows.masked_fill(elsewhere.unsqueeze(-1), 0))


class ColumnEmbedding(ColumnRows, nn.Embedding):
    """Embedding with this rank's channels."""


class VocabularyEmbedding(Vocabulary, nn.Embedding):
    """Embedding with this rank's rows."""


class ColumnLinear(ColumnSharded, nn.Linear):
    """Column-wise Linear."""


class ColumnGatherLinear(ColumnGather, nn.Linear):
    """Column-wise Linear with gathered output."""


class RowLinear(RowSharded, nn.Linear):
    """Row-wise Linear."""


class RowSplitLinear(RowSplit, nn.Linear):
    """Row-wise Linear that slices its input."""


_LINEAR = {
    LayerKind.COLUMN: ColumnLinear,
    LayerKind.COLUMN_GATHER: ColumnGatherLinear,
    LayerKind.ROW: RowLinear,
    LayerKind.ROW_SPLIT: RowSplitLinear,
}
_EMBEDDING = {LayerKind.COLUMN: ColumnEmbedding, LayerKind.VOCABULARY: VocabularyEmbedding}
_LINEAR_ROLE = {
    LayerKind.COLUMN: ColumnSharded,
    LayerKind.COLUMN_GATHER: ColumnGather,
    LayerKind.ROW: RowSharded,
    LayerKind.ROW_SPLIT: RowSplit,
}
_EMBEDDING_ROLE = {LayerKind.COLUMN: ColumnRows, LayerKind.VOCABULARY: Vocabulary}


def behaviour_for(module: nn.Module, kind: LayerKind) -> type | None:
    """Give the sharded form of a layer: a class of the library's kind, or a bare role if the layer has its own forward.

    Returns:
        None if that layer has no such form.
    """
    own = has_own_forward(module)
    if isinstance(module, nn.Embedding):
        if kind is LayerKind.COLUMN and module.max_norm is not None:
            return None  # the norm of a row is that of all its channels
        return (_EMBEDDING_ROLE if own else _EMBEDDING).get(kind)
    if isinstance(module, nn.Linear):
        return (_LINEAR_ROLE if own else _LINEAR).get(kind)
    if is_conv1d(module):
        return _conv1d_behaviour(kind)
    return None


@functools.cache
def _conv1d_behaviour(kind: LayerKind) -> type | None:
    role = _LINEAR_ROLE.get(kind)
    base: Any = conv1d_class()
    return None if role is None else type(f"{role.__name__}Conv1D", (role, _TransposedProject, base), {})


def has_own_forward(module: nn.Module) -> bool:
    """Tell whether a layer's class computes something of its own around the library layer's operation."""
    return type(module).forward is not library_class(type(module)).forward


def library_class(cls: type[nn.Module]) -> type[nn.Module]:
    """Give the layer class of torch or transformers that ``cls`` derives from."""
    for base in (nn.Embedding, nn.Linear, conv1d_class()):
        if base is not None and issubclass(cls, base):
            return base
    raise TypeError(f"{cls.__name__} is not a Linear, Conv1D or Embedding.")
