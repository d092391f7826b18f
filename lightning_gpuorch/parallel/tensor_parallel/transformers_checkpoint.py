"""Transformers names the tensors in its checkpoints through its own conversion mapping, tensor by tensor.

Most keys differ from module names by a renaming only and stay lazy slices. Where transformers merges tensors on loading
(the experts of a mixture, say), the merged tensor is built for one parameter at a time, of those slices of its sources
that the rank keeps. Which they are is found by converting positions in place of values.
"""

from __future__ import annotations

import copy
import threading
from typing import Any

import torch
from torch import nn

from lightning_gpuorch.parallel.tensor_parallel.checkpoint_base import Checkpoint
from lightning_gpuorch.parallel.tensor_parallel.intervals import Intervals, from_mask, take


def converted_checkpoint(checkpoint: Checkpoint, model: Any) -> Checkpoint:
    """See a checkpoint under a transformers model's names; unchanged if this transformers has no conversion mapping."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, dot_natural_key, rename_source_key
    except ImportError:
        return checkpoint
    transforms = get_model_conversion_mapping(model)
    converters = [item for item in transforms if isinstance(item, WeightConverter)]
    renamings: list[Any] = [item for item in transforms if not isinstance(item, WeightConverter)]
    by_pattern = {pattern: item for item in converters for pattern in item.source_patterns}
    known: dict[str, torch.Tensor] = dict(model.named_parameters(remove_duplicate=False))
    known.update(model.named_buffers(remove_duplicate=False))
    view = ConvertedCheckpoint(checkpoint, model)
    for key in sorted(checkpoint.keys(), key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, known)
        if name not in known and key in known:
            name, pattern = rename_source_key(key, [], [], model.base_model_prefix, known)
        if pattern is None:
            view.rename(name, key)
        else:
            view.merge(name, key, pattern, by_pattern[pattern], known)
    return view


class ConvertedCheckpoint(Checkpoint):
    """A checkpoint under other names, some of its tensors made of several.

    Args:
        inner: The checkpoint as it lies.
        model: The transformers model.
    """

    def __init__(self, inner: Checkpoint, model: nn.Module) -> None:
        self.location = inner.location
        self._inner, self._model = inner, model
        self._key_of: dict[str, str] = {}
        self._converters: dict[str, Any] = {}
        self._sources: dict[str, list[tuple[str, str]]] = {}
        self._made_by: dict[str, str] = {}
        self._lock = threading.Lock()
        self._waiting: dict[str, torch.Tensor] = {}

    def rename(self, name: str, key: str) -> None:
        """Note that a tensor has another name in the model."""
        self._key_of[name] = key

    def merge(self, name: str, key: str, pattern: str, converter: Any, known: dict[str, torch.Tensor]) -> None:
        """Note that a tensor is one of those a converter makes ``name`` of."""
        self._converters.setdefault(name, converter)
        self._sources.setdefault(name, []).append((key, pattern))
        for target in converter.target_patterns:
            for other in converter.target_patterns:
                made = name.replace(other, target) if other in name else name
                if made in known:
                    self._made_by.setdefault(made, name)

    def keys(self) -> list[str]:
        """List the model's names."""
        return [*self._key_of, *self._made_by]

    def shape(self, key: str) -> tuple[int, ...] | None:
        """Give a tensor's shape; of a merged one it is not known before it is made."""
        return self._inner.shape(self._key_of[key]) if key in self._key_of else None

    def dtype(self, key: str) -> torch.dtype | None:
        """Give the dtype a tensor, or the first that it is merged of, is stored in."""
        sources = self._sources.get(self._made_by.get(key, ""), ())
        inner = self._key_of.get(key) or (sources[0][0] if sources else None)
        return None if inner is None else self._inner.dtype(inner)

    def read(self, key: str, dim: int | None = None, intervals: Intervals = ()) -> tuple[torch.Tensor, int]:
        """Read a tensor or a slice of it."""
        if key in self._key_of:
            return self._inner.read(self._key_of[key], dim, intervals)
        with self._lock:
            slices = None if dim is None else self._slices(key, dim, intervals)
            if slices is not None:
                return self._make_of_slices(key, *slices)
            value, num_bytes = self._make(key)
        return (value if dim is None else take(value, dim, intervals).clone()), num_bytes

    def _make(self, key: str) -> tuple[torch.Tensor, int]:
        if key in self._waiting:  # made together with another tensor, whose bytes were counted there
            return self._waiting.pop(key), 0
        first = self._made_by[key]
        read = {source: self._inner.read(source) for source, _ in self._sources[first]}
        values = self._converted(first, {source: value for source, (value, _) in read.items()})
        own = values.pop(key)
        self._waiting.update(values)
        return own, sum(num_bytes for _, num_bytes in read.values())

    def _make_of_slices(self, key: str, dim: int, slices: dict[str, Intervals]) -> tuple[torch.Tensor, int]:
        read = {source: self._inner.read(source, dim, own) for source, own in slices.items()}
        values = self._converted(self._made_by[key], {source: value for source, (value, _) in read.items()})
        return values[key], sum(num_bytes for _, num_bytes in read.values())

    def _converted(self, first: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        converter = copy.deepcopy(self._converters[first])
        for source, pattern in self._sources[first]:
            converter.add_tensor(first, source, pattern, tensors[source])
        made = converter.convert(first, model=self._model, config=self._model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}

    def _slices(self, key: str, dim: int, intervals: Intervals) -> tuple[int, dict[str, Intervals]] | None:
        """Find the slices of the sources of which a slice of a merged tensor is made.

        Returns:
            The dimension of the sources and the intervals of each; None if slices of the sources do not convert to the
            slice of the whole.
        """
        first = self._made_by[key]
        shapes = {source: self._inner.shape(source) or () for source, _ in self._sources[first]}
        for source_dim in range(min(map(len, shapes.values()))):
            positions: dict[str, torch.Tensor] = {}
            count = 0
            for source, shape in shapes.items():
                size = shape[source_dim]
                lengths = [size if axis == source_dim else 1 for axis in range(len(shape))]
                positions[source] = torch.arange(count, count + size).view(lengths)
                count += size
            try:
                whole = self._converted(first, dict(positions))
                if set(whole) != {key}:
                    return None
                wanted = take(whole[key], dim, intervals)
                kept = torch.isin(torch.arange(count), wanted)
                slices = {source: from_mask(kept[own.flatten()]) for source, own in positions.items()}
                pieces = {source: take(own, source_dim, slices[source]) for source, own in positions.items()}
                is_same = all(slices.values()) and torch.equal(self._converted(first, pieces)[key], wanted)
            except Exception:  # noqa: BLE001 - unknown conversions may not take such tensors; then sources are read whole
                continue
            if is_same and not bool(kept.all()):
                return source_dim, slices
        return None
