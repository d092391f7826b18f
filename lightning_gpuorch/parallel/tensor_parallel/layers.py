"""How does a layer compute with only this rank's weights? The sharded forms of Linear, Conv1D and Embedding.

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

    @property
    def own_intervals(self) -> Intervals:
        """This rank's intervals."""
        return self.layer_plan.intervals[self.communicator.rank]

    def project(self, input: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:  # noqa: A002
        """Multiply by the local weight."""
        return F.linear(input, self.weight, bias)


class _TransposedProject(Sharded):
    def project(self, input: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:  # noqa: A002
        output = torch.matmul(input, self.weight)
        return output if bias is None else output + bias


class Column(Sharded):
    """Output channels are this rank's; they stay local."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002
        """Map ``(..., in)`` to ``(..., local out)``."""
        return self.project(input, self.bias)


class ColumnGather(Sharded):
    """Output channels are this rank's; the whole is gathered."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002
        """Map ``(..., in)`` to ``(..., out)``."""
        return self.communicator.all_gather_last(self.project(input, self.bias), self.sizes)


class Row(Sharded):
    """Input channels are this rank's; outputs are summed over the ranks, then the bias is added once."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002
        """Map ``(..., local in)`` to ``(..., out)``."""
        output = self.communicator.all_reduce(self.project(input, None))
        return output if self.bias is None else output + self.bias


class RowSplit(Row):
    """As :class:`Row`, for an input that arrives whole."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002
        """Map ``(..., in)`` to ``(..., out)``."""
        return super().forward(take(input, input.dim() - 1, self.own_intervals))


class ColumnEmbedding(nn.Embedding, Sharded):
    """Each row holds this rank's channels."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002
        """Map indices to ``(..., local channels)``."""
        return F.embedding(input, self.weight)


class VocabularyEmbedding(nn.Embedding, Sharded):
    """Rows are this rank's; rows of others count as zero, then the ranks are summed."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002
        """Map indices to ``(..., channels)``."""
        ((start, stop),) = self.own_intervals
        outside = (input < start) | (input >= stop)
        local = (input - start).masked_fill(outside, 0)
        return self.communicator.all_reduce(F.embedding(local, self.weight).masked_fill(outside.unsqueeze(-1), 0))


class ColumnLinear(Column, nn.Linear):
    """Column-wise Linear."""


class ColumnGatherLinear(ColumnGather, nn.Linear):
    """Column-wise Linear with gathered output."""


class RowLinear(Row, nn.Linear):
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
_ROLE = {
    LayerKind.COLUMN: Column,
    LayerKind.COLUMN_GATHER: ColumnGather,
    LayerKind.ROW: Row,
    LayerKind.ROW_SPLIT: RowSplit,
}


def behaviour_for(module: nn.Module, kind: LayerKind) -> type | None:
    """Give the sharded form of a layer's class, None if that kind of layer has no such form."""
    if isinstance(module, nn.Embedding):
        return _EMBEDDING.get(kind)
    if isinstance(module, nn.Linear):
        return _LINEAR.get(kind)
    if is_conv1d(module):
        return _conv1d_behaviour(kind)
    return None


@functools.cache
def _conv1d_behaviour(kind: LayerKind) -> type | None:
    role = _ROLE.get(kind)
    base: Any = conv1d_class()
    return None if role is None else type(f"{role.__name__}Conv1D", (role, _TransposedProject, base), {})


@functools.cache
def _computes_linear(cls: Any) -> bool:
    generator = torch.Generator().manual_seed(1)
    module = cls.__new__(cls)
    nn.Module.__init__(module)
    module.in_features, module.out_features = 12, 20
    weight, bias = torch.randn(20, 12, generator=generator), torch.randn(20, generator=generator)
    module.weight, module.bias = nn.Parameter(weight), nn.Parameter(bias)
    value = torch.randn(3, 5, 12, generator=generator)
    try:
        with torch.no_grad():
            return torch.allclose(module.eval().forward(value), F.linear(value, weight, bias), atol=1e-5)
    except Exception:  # noqa: BLE001 - a forward of unknown code may raise anything; then it is not a plain Linear
        return False


def _same_as_linear(cls: type[nn.Module]) -> bool:
    hashable: Any = cls
    return _computes_linear(hashable)


def runs_inside(cls: type[nn.Module]) -> bool:
    """Tell where the sharded form of a subclass of a library layer belongs.

    Returns:
        False if the class's forward computes what the library layer computes, so that the sharded form may replace it.
        True if it does something else (scales an embedding, casts its input): the sharded form then stands in for the
        library layer's forward, which the class reaches through ``super().forward(...)``.
    """
    base = library_class(cls)
    return cls.forward is not base.forward and not (base is nn.Linear and _same_as_linear(cls))


def library_class(cls: type[nn.Module]) -> type[nn.Module]:
    """Give the layer class of torch or transformers that ``cls`` derives from."""
    for base in (nn.Embedding, nn.Linear, conv1d_class()):
        if base is not None and issubclass(cls, base):
            return base
    raise TypeError(f"{cls.__name__} is not a Linear, Conv1D or Embedding.")
