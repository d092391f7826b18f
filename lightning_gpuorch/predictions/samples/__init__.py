"""The sample dimension of nested batches and outputs: cut, merge and walk them by sample.

A batch or an output is a tree. Cut by sample are

- tensors and arrays whose first dimension has one entry per sample,
- lists and tuples with one entry per sample;

kept as they are: text, numbers, ``None``, enums, dtypes, and arrays without the sample dimension; walked into: mappings
(also ``BatchEncoding`` and ``ModelOutput`` of transformers), dataclasses, named tuples, and lists and tuples that hold
such things.

Whether a list of length two is two samples or two columns cannot always be told. Nothing here guesses: what stays open
raises :class:`AmbiguousStructureError`, and an :class:`OutputLayout` that has seen other outputs of the same step often
closes it.
"""

from lightning_gpuorch.predictions.samples.cutting import batch_size_of, iter_samples, slice_samples, take_samples
from lightning_gpuorch.predictions.samples.kinds import (
    NOT_KEPT,
    AmbiguousStructureError,
    CannotMergeError,
    CannotSplitError,
    OutputLayout,
    map_arrays,
)
from lightning_gpuorch.predictions.samples.merging import merge_samples

__all__ = [
    "NOT_KEPT",
    "AmbiguousStructureError",
    "CannotMergeError",
    "CannotSplitError",
    "OutputLayout",
    "batch_size_of",
    "iter_samples",
    "map_arrays",
    "merge_samples",
    "slice_samples",
    "take_samples",
]
