"""What runs with stubs record, compare and report."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from lightning_gpuorch.errors import TensorParallelError
from lightning_gpuorch.parallel.tensor_parallel.intervals import Intervals, pieces
from lightning_gpuorch.parallel.tensor_parallel.plan import (
    AttributePatch,
    LayerKind,
    LayerPlan,
    ParameterPlan,
    ShapeRule,
)
from lightning_gpuorch.parallel.tensor_parallel.random_draws import Draw

MAX_WHOLE_ELEMENTS = 1 << 14
"""Smaller tensors are kept whole."""
ROOM_ELEMENTS = 1 << 22
"""Of a piece of memory for copies."""
NUM_ROWS, NUM_CHANNELS = 4, 64
"""What is kept of larger ones where that is enough."""

REPLICATED = LayerPlan(LayerKind.REPLICATED)


class Deviation(TensorParallelError):  # noqa: N818 - an event of the search, not an error of the user
    """A rank's forward went another way than the whole model's.

    Attributes:
        layer: Name of the layer where it showed; empty if it showed at the model's output or as an exception.
    """

    def __init__(self, layer: str, message: str) -> None:
        super().__init__(f"{layer}: {message}" if layer else message)
        self.layer = layer


class Room:
    """Memory for small copies, in large pieces: between the tensors of a running model they would leave gaps."""

    def __init__(self) -> None:
        self._free = torch.empty(0)

    def take(self, value: torch.Tensor) -> torch.Tensor:
        """Copy a tensor into it."""
        count = value.numel()
        if value.dtype is not torch.float32 or count > ROOM_ELEMENTS:
            return value.detach().clone()
        if count > self._free.numel():
            self._free = torch.empty(ROOM_ELEMENTS)
        place, self._free = self._free[:count].view(value.shape), self._free[count:]
        return place.copy_(value.detach())


@dataclasses.dataclass(frozen=True)
class Received:
    """A tensor that a layer received: the whole of it, or some of its rows and some channels of all rows.

    Attributes:
        shape: Shape of the whole tensor.
        values: The tensor, copied.
        rows: Which rows of its last dimension were kept; None for all.
        channels: Which channels of all rows were kept besides, if not all rows were.
        of_channels: Those.
    """

    shape: torch.Size
    values: torch.Tensor
    rows: torch.Tensor | None = None
    channels: torch.Tensor | None = None
    of_channels: torch.Tensor | None = None

    @classmethod
    def copy(cls, value: torch.Tensor, room: Room, choice: random.Random | None = None) -> Received:
        """Copy a tensor; with ``choice``, parts of it that are chosen at random if it is large."""
        plain = value.layout is torch.strided and not value.is_quantized and value.dim() > 1
        if choice is None or not plain or value.numel() <= MAX_WHOLE_ELEMENTS:
            return cls(value.shape, value.detach().clone())
        rows = _some(value.shape[:-1].numel(), NUM_ROWS, choice)
        channels = _some(value.shape[-1], NUM_CHANNELS, choice)
        return cls(
            value.shape, room.take(picked(value, rows)), rows, channels, room.take(value.index_select(-1, channels))
        )

    def holds(self, value: torch.Tensor) -> bool:
        """Tell whether a tensor has these values, as far as they are kept."""
        if (self.shape, self.values.dtype) != (value.shape, value.dtype):
            return False
        if not torch.equal(self.values, picked(value, self.rows)):
            return False
        return (
            self.channels is None
            or self.of_channels is None
            or torch.equal(self.of_channels, value.index_select(-1, self.channels))
        )

    def channels_within(self, own: Intervals | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Where kept channels are among those that a rank has, and their values; empty if all rows were kept."""
        if self.channels is None or self.of_channels is None:
            return torch.zeros(0, dtype=torch.long), self.values[..., :0]
        if own is None:
            return self.channels, self.of_channels
        inside = [(self.channels >= start) & (self.channels < stop) for start, stop in own]
        places = [
            self.channels[mask] - start + position
            for mask, (start, _, position) in zip(inside, pieces(own), strict=True)
        ]
        kept = [self.of_channels[..., mask] for mask in inside]
        return torch.cat(places), torch.cat(kept, -1)


def _some(size: int, count: int, choice: random.Random) -> torch.Tensor:
    return torch.tensor(sorted(choice.sample(range(size), min(count, size))))


def picked(value: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
    """Give some rows of a tensor's last dimension, all of it for None."""
    return value if rows is None else value.reshape(-1, value.shape[-1]).index_select(0, rows)


@dataclasses.dataclass
class LayerCall:
    """One call of a stubbed layer in the reference run.

    Attributes:
        module: The layer.
        index: How many times it was called before.
        inputs: The tensors it received; the first is its input. For the first call of a kind of layer with the autograd
            graph that led to it, if there is one; then later calls of the kind have none.
        output: The graph leaf behind its output; None for layers with fixed roles and later calls of a kind.
    """

    module: nn.Module
    index: int
    inputs: tuple[torch.Tensor, ...]
    output: torch.Tensor | None


@dataclasses.dataclass
class Reference:
    """What the reference run recorded.

    Attributes:
        calls: Layer calls in order.
        inputs: Inputs of every layer call: of the first call of a kind of layer whole, of later ones some rows.
        num_draws: For every layer call, how many random draws came before it.
        draws: The random draws, in order.
        random_state: The state of torch's generator in the end.
        visible: Tensors with graph that leave torch or reach the caller, so that they have to be whole.
        outputs: What a caller sees, by path: tensors, arrays, numbers, text.
        unstable: Paths of outputs that differ from run to run of the whole model: times, identities.
        hidden_outputs: Tensors inside opaque output objects (caches), without graph.
        scope_calls: Arguments of the first call of a module, for modules that are the first of their kind.
        tensors: Parameters and buffers that are not a layer's, by graph leaf.
        layer_arguments: Arguments of the first call of attention and expert modules.
    """

    calls: list[LayerCall] = dataclasses.field(default_factory=list)
    inputs: dict[tuple[nn.Module, int], tuple[Received, ...]] = dataclasses.field(default_factory=dict)
    num_draws: dict[tuple[nn.Module, int], int] = dataclasses.field(default_factory=dict)
    draws: list[Draw] = dataclasses.field(default_factory=list)
    random_state: torch.Tensor = dataclasses.field(default_factory=torch.get_rng_state)
    visible: list[torch.Tensor] = dataclasses.field(default_factory=list)
    outputs: list[tuple[str, Any]] = dataclasses.field(default_factory=list)
    unstable: set[str] | None = None
    hidden_outputs: list[torch.Tensor] = dataclasses.field(default_factory=list)
    scope_calls: dict[nn.Module, tuple[tuple[Any, ...], dict[str, Any]]] = dataclasses.field(default_factory=dict)
    tensors: dict[str, torch.Tensor] = dataclasses.field(default_factory=dict)
    layer_arguments: dict[nn.Module, tuple[tuple[Any, ...], dict[str, Any]]] = dataclasses.field(default_factory=dict)

    @property
    def called(self) -> set[nn.Module]:
        """Layers that were called."""
        return {module for module, _ in self.inputs}


@dataclasses.dataclass
class LocalPlan:
    """What a local run needs of a plan, for any subset of the layers.

    Attributes:
        layers: Roles by layer; layers that are not listed are replicated.
        tensors: Cuts of parameters and buffers that are not a layer's, by name.
        attributes: Attribute patches.
        shape_rules: Rules by scope.
    """

    layers: dict[nn.Module, LayerPlan] = dataclasses.field(default_factory=dict)
    tensors: dict[str, ParameterPlan] = dataclasses.field(default_factory=dict)
    attributes: Sequence[AttributePatch] = ()
    shape_rules: Mapping[str, tuple[ShapeRule, ...]] = dataclasses.field(default_factory=dict)
