"""Layers that form pairs, and which of their channels belong together, are read off the sparsity of a Jacobian.

In the reference run every layer's output is a graph leaf, so the gradient of one input channel of a layer shows exactly
which output channels of the layers before it that channel depends on. A layer whose input falls into blocks of channels
that depend on separate channels of its producers can be row-wise with those producers column-wise; the index sets per
rank are the non-zero positions. Packed projections in any order, grouped key/value heads and gated MLPs are all the
same case, and so are small tensors in between (bias tables, temperatures, depthwise convolutions).
"""

from __future__ import annotations

import dataclasses
import itertools
from collections import defaultdict
from typing import Any

import torch
from torch import nn

from lightning_gpuorch.parallel.tensor_parallel.intervals import (
    Intervals,
    RankIntervals,
    from_mask,
    length,
    shift,
    split_aligned,
    split_evenly,
)
from lightning_gpuorch.parallel.tensor_parallel.records import LayerCall, Reference
from lightning_gpuorch.parallel.tensor_parallel.stubs import StubbedModel

SAME_BLOCK = 0.5
"""Two channels belong to one block if they share at least this part of what they depend on (Jaccard index)."""

Signature = tuple[Any, ...]


@dataclasses.dataclass
class Partition:
    """One way to deal out a consumer's input channels.

    Attributes:
        channels: Input channels of the consumer, by rank.
        producers: Output channels of each producer that can be cut along, by rank.
        broadcast: Producers of which every rank needs everything.
        tensors: Parameters and buffers that are cut along: dimension, and indices by rank.
    """

    channels: RankIntervals
    producers: dict[Signature, RankIntervals]
    broadcast: set[Signature]
    tensors: dict[str, tuple[int, RankIntervals]]


@dataclasses.dataclass
class Pair:
    """A consumer that can be row-wise, with its producers.

    Attributes:
        signature: The consumer's signature.
        consumer: Its first instance.
        num_channels: Its input channels.
        unit: Channels in a block (a head's width; 1 in an MLP).
        partitions: Ways to deal out the blocks, better ones first.
    """

    signature: Signature
    consumer: nn.Module
    num_channels: int
    unit: int
    partitions: list[Partition]

    @property
    def num_units(self) -> int:
        """Number of blocks."""
        return self.num_channels // self.unit


@dataclasses.dataclass
class Dependencies:
    """What the analysis found.

    Attributes:
        pairs: The pairs, in the order of the consumers' first calls.
        consumers_of: For each layer signature, the layers its output reaches.
        visible: Layers whose output reaches the model's output.
        notes: Why layers that might be expected to pair do not.
    """

    pairs: list[Pair]
    consumers_of: dict[Signature, set[Signature]]
    visible: set[Signature]
    notes: list[str]


def analyze(stubbed: StubbedModel, reference: Reference, num_ranks: int) -> Dependencies:
    """Find the pairs of a recorded model."""
    anatomy = stubbed.anatomy
    found = Dependencies([], defaultdict(set), set(), [])
    leaves = [call for call in reference.calls if call.output is not None]
    if reference.visible and leaves:
        generator = torch.Generator().manual_seed(11)
        weights = [torch.randn(tensor.shape, generator=generator) for tensor in reference.visible]
        try:
            gradients = torch.autograd.grad(
                reference.visible,
                [_leaf(call) for call in leaves],
                weights,
                retain_graph=True,
                allow_unused=True,
            )
        except RuntimeError as error:
            found.notes.append(f"the outputs cannot be differentiated ({error})")
        else:
            reaching = (call for call, gradient in zip(leaves, gradients, strict=True) if gradient is not None)
            found.visible.update(anatomy.signature(call.module) for call in reaching)
    seen: set[Signature] = set()
    for position, call in enumerate(reference.calls):
        signature = anatomy.signature(call.module)
        if signature in seen:
            continue
        seen.add(signature)
        value = call.inputs[0]
        if isinstance(call.module, nn.Embedding) or not value.requires_grad:
            continue
        before = [earlier for earlier in reference.calls[:position] if earlier.output is not None]
        try:
            probe = _Consumer(stubbed, call, before, reference.tensors)
            pair, note = probe.pair(num_ranks) if call.output is not None else (None, "")
        except RuntimeError as error:  # code that changes tensors in place, say: no analysis, so no cut along blocks
            found.notes.append(f"{signature[0]}: its input cannot be differentiated ({error})")
            continue
        for producer in probe.reached():
            found.consumers_of[producer].add(signature)
        if call.output is not None:
            if pair is not None:
                found.pairs.append(pair)
            if note:
                found.notes.append(f"{signature[0]}: {note}")
    return found


def _leaf(call: LayerCall) -> torch.Tensor:
    assert call.output is not None
    return call.output


class _Consumer:
    """Asks what the input channels of one layer call depend on."""

    def __init__(
        self, stubbed: StubbedModel, call: LayerCall, before: list[LayerCall], tensors: dict[str, torch.Tensor]
    ) -> None:
        self.anatomy = stubbed.anatomy
        self.call = call
        self.value = call.inputs[0]
        self.num_channels = self.value.shape[-1]
        self.leaves = [_leaf(earlier) for earlier in before] + list(tensors.values())
        self.labels: list[Signature | str] = [self.anatomy.signature(earlier.module) for earlier in before]
        self.labels += list(tensors)
        self.num_layers = len(before)
        self.active = list(range(len(self.leaves)))
        gradients = self._gradients(range(self.num_channels), seed=0)
        self.active = [index for index, gradient in zip(self.active, gradients, strict=True) if gradient is not None]
        self._patterns: dict[int, list[torch.Tensor]] = {}
        self._shared: list[int] = []
        self._common: torch.Tensor | None = None

    def reached(self) -> set[Signature]:
        """Signatures of the layers the input depends on."""
        return {self.labels[index] for index in self.active if index < self.num_layers}  # type: ignore[misc]

    def _gradients(self, channels: range | list[int], seed: int) -> tuple[torch.Tensor | None, ...]:
        if not self.active:
            return ()
        generator = torch.Generator().manual_seed(seed + 17)
        weights = torch.zeros_like(self.value)
        index = torch.as_tensor(list(channels))
        weights[..., index] = torch.randn((*self.value.shape[:-1], len(index)), generator=generator)
        leaves = [self.leaves[index] for index in self.active]
        result: tuple[torch.Tensor | None, ...] = torch.autograd.grad(
            self.value, leaves, weights, retain_graph=True, allow_unused=True
        )
        return result

    def _dependence(self, channels: range | list[int], seed: int) -> list[tuple[torch.Tensor, ...]]:
        """For each active leaf, per dimension that may be cut, which indices the channels depend on."""
        masks = []
        for index, gradient in zip(self.active, self._gradients(channels, seed), strict=True):
            leaf = self.leaves[index]
            nonzero = torch.zeros(leaf.shape, dtype=torch.bool) if gradient is None else gradient != 0
            dims = [leaf.dim() - 1] if index < self.num_layers else range(leaf.dim())
            masks.append(tuple(_any_except(nonzero, dim) for dim in dims))
        return masks

    def _layer_masks(self, channel: int) -> list[torch.Tensor]:
        # A number without dimensions (a learned scale) has nothing to be cut along.
        nothing = torch.zeros(0, dtype=torch.bool)
        return [masks[0] if masks else nothing for masks in self._dependence([channel], 0)]

    def _pattern(self, channel: int) -> torch.Tensor:
        """Channels of the shardable producers that one input channel depends on, joined in one mask."""
        if channel not in self._patterns:
            self._patterns[channel] = self._layer_masks(channel)
        masks = self._patterns[channel]
        pattern = torch.cat([masks[index] for index in self._shared])
        return pattern if self._common is None else pattern & ~self._common

    def _similar(self, first: int, second: int) -> bool:
        one, other = self._pattern(first), self._pattern(second)
        return bool((one & other).sum() >= SAME_BLOCK * (one | other).sum().clamp(min=1))

    def pair(self, num_ranks: int) -> tuple[Pair | None, str]:
        """Find the consumer's blocks and deal them out; a note says why it cannot be done."""
        masks = self._layer_masks(0)
        self._shared = [
            position
            for position, (index, mask) in enumerate(zip(self.active, masks, strict=True))
            if index < self.num_layers and mask.any() and not mask.all()
        ]
        if not self._shared:
            return None, ""  # dense: every channel depends on everything
        # What every channel depends on (shared key/value heads, a state space's B and C) says nothing about blocks.
        last = self.num_channels - 1
        spread = [self._pattern(channel) for channel in {0, last // 3, last // 2, last}]
        self._common = torch.stack(spread).all(0)
        if not self._pattern(0).any():
            return None, ""
        unit = self._unit()
        if unit is None:
            return None, "its input channels fall into irregular blocks"
        if unit == self.num_channels:
            return None, ""
        num_units = self.num_channels // unit
        if num_units < num_ranks:
            return None, f"{num_units} heads or blocks for {num_ranks} ranks"
        channels = (
            split_aligned(self.num_channels, num_ranks)
            if unit == 1
            else split_evenly(self.num_channels, num_ranks, unit)
        )
        partitions = [self._partition(channels)]
        if _overlapping(partitions[0]):
            group = self._overlapping_run(unit)
            if group > unit and self.num_channels % group == 0:
                dealt = _deal_groups(self.num_channels // group, group, num_ranks, unit)
                if dealt is not None and dealt != partitions[0].channels:
                    partitions.insert(0, self._partition(dealt))
        signature = self.anatomy.signature(self.call.module)
        return Pair(signature, self.call.module, self.num_channels, unit, partitions), ""

    def _unit(self) -> int | None:
        """Length of the run of channels that belong together; None if the blocks are not all alike."""
        low, high = 0, 1
        while high < self.num_channels and self._similar(0, high):
            low, high = high, high * 2
        if high >= self.num_channels:
            if self._similar(0, self.num_channels - 1):
                return self.num_channels
            high = self.num_channels - 1
        while high - low > 1:
            middle = (low + high) // 2
            if self._similar(0, middle):
                low = middle
            else:
                high = middle
        unit = high
        if self.num_channels % unit:
            return None
        for block in {1, self.num_channels // unit // 2, self.num_channels // unit - 1}:
            start = block * unit
            if not self._similar(start, start + unit - 1) or (block and self._similar(start, start - 1)):
                return None
        return unit

    def _overlapping_run(self, unit: int) -> int:
        """Length of the run of blocks that share producer channels (a group of query heads with one key/value head)."""
        run = unit
        while run < self.num_channels and bool((self._pattern(0) & self._pattern(run)).any()):
            run += unit
        return run

    def _partition(self, channels: RankIntervals) -> Partition:
        by_rank = []
        for own in channels:
            listed = [index for start, stop in own for index in range(start, stop)]
            # Two draws: a product of gradients that happens to cancel does not do so twice.
            first, second = self._dependence(listed, 1), self._dependence(listed, 2)
            by_rank.append(
                [
                    tuple(a | b for a, b in zip(one, other, strict=True))
                    for one, other in zip(first, second, strict=True)
                ]
            )
        partition = Partition(channels, {}, set(), {})
        for position, index in enumerate(self.active):
            label = self.labels[index]
            masks = [rank_masks[position] for rank_masks in by_rank]
            if isinstance(label, str):
                for dim in range(len(masks[0])):
                    cuts = tuple(from_mask(mask[dim]) for mask in masks)
                    if all(cuts) and not _overlap(cuts):
                        partition.tensors[label] = (dim, cuts)
                        break
                continue
            cuts = tuple(from_mask(mask[0]) for mask in masks)
            same = all(torch.equal(mask[0], masks[0][0]) for mask in masks)
            if same or label in partition.broadcast or partition.producers.get(label, cuts) != cuts:
                partition.broadcast.add(label)
                partition.producers.pop(label, None)
            else:
                partition.producers[label] = cuts
        return partition


def _deal_groups(num_groups: int, group: int, num_ranks: int, unit: int) -> RankIntervals | None:
    """Deal out channels so that no rank holds parts of two groups, whole groups if there are enough.

    Args:
        num_groups: Groups of blocks that share producer channels (key/value heads).
        group: Channels of a group.
        num_ranks: Number of ranks.
        unit: Channels of a block.

    Returns:
        The channels by rank, None if a group has fewer blocks than ranks that share it.
    """
    if num_groups >= num_ranks:
        return split_evenly(num_groups * group, num_ranks, group)
    dealt: list[Intervals] = []
    for index, ranks in enumerate(split_evenly(num_ranks, num_groups)):
        sharing = length(ranks)
        if group // unit < sharing:
            return None
        dealt += [shift(own, index * group) for own in split_evenly(group, sharing, unit)]
    return tuple(dealt)


def _any_except(nonzero: torch.Tensor, dim: int) -> torch.Tensor:
    return nonzero.movedim(dim, 0).reshape(nonzero.shape[dim], -1).any(1)


def _overlap(cuts: tuple[Intervals, ...]) -> bool:
    starts = sorted(interval for own in cuts for interval in own)
    return any(second[0] < first[1] for first, second in itertools.pairwise(starts))


def _overlapping(partition: Partition) -> bool:
    return any(_overlap(cuts) for cuts in partition.producers.values()) or bool(
        any(length(cut) == 0 for cuts in partition.producers.values() for cut in cuts)
    )
