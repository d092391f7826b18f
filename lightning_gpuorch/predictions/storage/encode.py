"""A prediction becomes JSON plus binary columns, and nothing of it is pickled.

Lightning lets ``predict_step`` return any Python object. :class:`TreeEncoder` walks it and writes a *node* (plain JSON)
for each object; what is large (tensors, arrays, long lists of strings or numbers) becomes a *column* that the
envelope stores as raw bytes. :mod:`lightning_gpuorch.predictions.storage.decode` is the inverse. Nothing that a file names
is ever imported or called: a class is used again only if the reading process has already loaded it.

What can be stored, and what each comes back as, is in ``docs/part-format.md``; how, in
:mod:`lightning_gpuorch.predictions.storage.values`. Everything else is refused with
:class:`~lightning_gpuorch.errors.UnsupportedPredictionError`, which names the place in the prediction, the type, and the
way out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from lightning_gpuorch.errors import UnsupportedPredictionError
from lightning_gpuorch.predictions.samples import NOT_KEPT
from lightning_gpuorch.predictions.storage.values import arrays, containers, scalars, tables
from lightning_gpuorch.predictions.storage.values.base import Column, Encode, Finder, Node, refuse

_MAX_DEPTH = 100

_MODULES = (scalars, arrays, tables, containers)
_ENCODERS: dict[type, Encode] = {kind: encode for module in _MODULES for kind, encode in module.ENCODERS.items()}
"""Exact types: a subclass may carry state that its base's encoder would drop without a word."""
_FINDERS: list[Finder] = [finder for module in _MODULES for finder in module.FINDERS]


class TreeEncoder:
    """Turns predictions into nodes, collecting their columns.

    Attributes:
        columns: The columns of all trees encoded so far; nodes refer to them by position.
    """

    def __init__(self) -> None:
        self.columns: list[Column] = []

    def encode(self, tree: Any, path: str = "output") -> Node:
        """Encode one prediction.

        Args:
            tree: The prediction.
            path: How error messages call it.

        Returns:
            The node. Its tensors are referenced, not copied: they must not change until their columns are read.

        Raises:
            UnsupportedPredictionError: It contains a type without a durable form; nothing was added.
        """
        if tree is NOT_KEPT:
            return ["not_kept"]
        num_columns = len(self.columns)
        try:
            return self.encode_part(tree, path, 0)
        except UnsupportedPredictionError:
            del self.columns[num_columns:]
            raise

    def add(self, dtype: str, shape: Sequence[int], source: torch.Tensor | np.ndarray[Any, Any] | bytes) -> int:
        """Add a column; returns its number."""
        self.columns.append(Column(dtype, tuple(shape), source))
        return len(self.columns) - 1

    def encode_part(self, value: Any, path: str, depth: int) -> Node:
        """Encode a part of a prediction."""
        if depth > _MAX_DEPTH:
            raise UnsupportedPredictionError(
                f"{path} is nested deeper than {_MAX_DEPTH} levels, or contains itself. Return a flatter prediction."
            )
        encode = _ENCODERS.get(type(value))
        if encode is None:
            encode = next((encode for matches, encode in _FINDERS if matches(value)), None)
        if encode is None:
            raise refuse(value, path, _remedy(value))
        return encode(self, value, path, depth)

    def encode_attributes(self, attributes: dict[str, Any], path: str, depth: int) -> dict[str, Node]:
        """Encode attributes; a private one that cannot be stored is None."""
        nodes: dict[str, Node] = {}
        for name, value in attributes.items():
            num_columns = len(self.columns)
            try:
                nodes[name] = self.encode_part(value, f"{path}.{name}", depth + 1)
            except UnsupportedPredictionError:
                if not name.startswith("_"):
                    raise
                del self.columns[num_columns:]
                nodes[name] = None
        return nodes


def check_storable(tree: Any, path: str = "output") -> None:
    """Check that a prediction can be stored, without copying it.

    Args:
        tree: The prediction.
        path: How the error message calls it.

    Raises:
        UnsupportedPredictionError: It contains a type without a durable form.
    """
    TreeEncoder().encode(tree, path)


def _remedy(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        if hasattr(value, "full_tensor"):
            return "Return its .full_tensor()."
        return "Return a plain tensor: .as_subclass(torch.Tensor) drops what the subclass adds."
    if isinstance(value, np.ndarray):
        return "Return a plain array, np.asarray(...) of it."
    for method in ("collect", "model_dump", "to_dict"):  # polars, pydantic, many others
        if not isinstance(value, type) and callable(getattr(type(value), method, None)):
            return f"Return its .{method}()."
    if hasattr(value, "__array_interface__"):
        return "Return np.asarray(...) of it."
    for base in (list, tuple, dict, set, frozenset, str, bytes, int, float, complex):
        if isinstance(value, base):
            return f"Return {base.__name__}(...) of it."
    if isinstance(value, BaseException):
        return "Return repr(...) of it."
    if hasattr(value, "__next__"):
        return "Return list(...) of it."
    return "Return tensors, numpy arrays, numbers, text, None, or dicts, lists, tuples and dataclasses of these."
