"""The columns of a Parquet part: predictions of many batches, one row per sample, and the way back.

:class:`RowsEncoder` walks a prediction as :class:`~lightning_gpuorch.predictions.storage.encode.TreeEncoder` does. What has
an entry for each sample (tensors, arrays, lists) becomes rows of a column that is named by its place: ``{"boxes": (a, b)}``
gives ``boxes.0`` and ``boxes.1``, a tensor alone ``prediction``. The node says which column and what it was before, so that
the prediction is read back as it was. What is the same for the whole batch stays in the node.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from lightning_gpuorch.errors import CorruptPartError, UnsupportedPredictionError
from lightning_gpuorch.predictions.samples.kinds import Entries, Node, entries_of, node_of
from lightning_gpuorch.predictions.storage.encode import TreeEncoder
from lightning_gpuorch.predictions.storage.values.base import Node as JsonNode
from lightning_gpuorch.predictions.storage.values.base import type_name

RESERVED = ("index", "row", "batch", "error_type", "error_message")
"""Columns that every part has, or may have."""
_STEPS = re.compile(r"\[((?:'(?:[^'\\]|\\.)*')|(?:\"(?:[^\"\\]|\\.)*\")|[^\]]*)\]|\.(\w+)")
_HALF = {torch.float16, torch.bfloat16}
_PLAIN = (str, bytes, bool, int, float)
_NUMPY_KINDS = "biufU"


class RowsEncoder(TreeEncoder):
    """Turns predictions into nodes and rows of columns.

    Args:
        pa: The module ``pyarrow``.
    """

    def __init__(self, pa: Any):
        super().__init__()
        self._pa = pa
        self._pieces: dict[str, list[Any]] = {}
        self._of_batch: dict[str, Any] = {}
        self._size = self.num_rows = 0

    def add_batch(self, output: Any, size: int, carried: Mapping[str, Sequence[Any]]) -> JsonNode:
        """Append the rows of a batch.

        Args:
            output: Its prediction.
            size: Samples in it.
            carried: More columns, with a value for each sample.

        Returns:
            The node of the prediction.

        Raises:
            UnsupportedPredictionError: It has no form as rows.
        """
        self._size, self._of_batch = size, {}
        for name, values in carried.items():
            self._put(name, self._values(list(values), name)[1])
        node = self.encode(output)
        if self.columns:
            raise UnsupportedPredictionError(
                "the prediction holds an array or a list that has no entry for each sample, or objects that are no rows. "
                "Return one entry per sample, or set output_format='gpq'."
            )
        for name in [name for name in self._of_batch if name not in self._pieces]:
            self._pieces[name] = [self._pa.nulls(self.num_rows)] if self.num_rows else []
        for name, pieces in self._pieces.items():
            piece = self._of_batch.get(name)
            pieces.append(self._pa.nulls(size) if piece is None else piece)
        self.num_rows += size
        return node

    def add_error(self) -> None:
        """Append the row of a sample that has no prediction."""
        for pieces in self._pieces.values():
            pieces.append(self._pa.nulls(1))
        self.num_rows += 1

    def table(self) -> dict[str, Any]:
        """The columns.

        Raises:
            UnsupportedPredictionError: Batches differ in the type of a column.
        """
        return {name: self._joined(name, pieces) for name, pieces in self._pieces.items()}

    def encode_part(self, value: Any, path: str, depth: int) -> JsonNode:
        """Encode a part of a prediction; see the module."""
        kind = node_of(value)
        if ": the key " not in path:
            if kind is Node.ARRAY and type(value) in (torch.Tensor, np.ndarray):
                return self._array(value, path)
            if type(value) in (list, tuple) and len(value) == self._size and self._are_rows(value):
                inner, rows = self._values(list(value), path)
                if rows is None:
                    return ["each", type(value).__name__, inner]
                return ["rows", self._put(_name_of(path), rows), type(value).__name__, *inner]
        return super().encode_part(value, path, depth)

    def _are_rows(self, value: Any) -> bool:
        alike = {tuple(entry) if isinstance(entry, dict) else None for entry in value}
        if len(alike) == 1 and None not in alike:  # a dict per sample; it is read back the same however it is taken
            return True
        return entries_of(value, self._size) in (Entries.SAMPLES, Entries.RAGGED)

    def _put(self, name: str, rows: Any) -> str:
        if name in RESERVED:
            name = f"prediction.{name}"
        if name in self._of_batch:
            raise UnsupportedPredictionError(f"two parts of a prediction would both be column {name!r}. Rename one.")
        self._of_batch[name] = rows
        return name

    def _array(self, value: Any, path: str) -> JsonNode:
        if value.ndim == 0:
            array, dtype = _to_numpy(value, path)
            rows = self._pa.array(np.repeat(array.reshape(1), self._size, axis=0).reshape(-1))
            if np.iscomplexobj(value) or (isinstance(value, torch.Tensor) and value.is_complex()):
                raise UnsupportedPredictionError(
                    f"{path} is a complex number without a sample dimension. Return a list."
                )
            return ["rows", self._put(_name_of(path), rows), "scalar", _family(value), dtype]
        if value.shape[0] != self._size:
            raise UnsupportedPredictionError(
                f"{path} has {value.shape[0]} entries for {self._size} samples, so its rows are not those of samples. Return "
                "one entry per sample, or set output_format='gpq'."
            )
        array, dtype = _to_numpy(value, path)
        shape = list(value.shape[1:])
        rows = _lists(self._pa, array, self._size)
        return ["rows", self._put(_name_of(path), rows), "array", _family(value), dtype, shape]

    def _values(self, values: list[Any], path: str) -> tuple[Any, Any]:
        """What a list with one entry per sample was, and its rows; no rows, where the node has those of its parts."""
        kinds = {type(value) for value in values if value is not None}
        pa = self._pa
        if not kinds:
            return ["plain"], pa.nulls(len(values))
        if len(kinds) == 1:
            (kind,) = kinds
            if kind in _PLAIN:
                return ["plain"], _plain_array(pa, values, path)
            if kind is dict and None not in values and len({tuple(value) for value in values}) == 1:
                keys = list(values[0])
                if keys and all(isinstance(key, str) for key in keys):
                    return [[key, self._part(values, key, path)] for key in keys], None
            if kind is list:
                leaves = {type(item) for value in values if value is not None for item in value}
                if len(leaves) <= 1 and leaves <= set(_PLAIN):
                    return ["plain"], _plain_array(pa, values, path)
            if kind in (torch.Tensor, np.ndarray) and None not in values:
                return self._ragged(values, path)
        names = ", ".join(sorted(type_name(kind) for kind in kinds))
        raise UnsupportedPredictionError(
            f"{path} has entries that make no column ({names}). Return numbers, text, tensors of one type, or dicts of "
            "these; or set output_format='gpq'."
        )

    def _part(self, values: list[Any], key: str, path: str) -> JsonNode:
        inner, rows = self._values([value[key] for value in values], f"{path}[{key!r}]")
        if rows is None:
            return ["each", "list", inner]
        return ["rows", self._put(_name_of(f"{path}[{key!r}]"), rows), "list", *inner]

    def _ragged(self, values: list[Any], path: str) -> tuple[Any, Any]:
        found = [_to_numpy(value, path) for value in values]
        if len({(array.ndim, dtype) for array, dtype in found}) != 1:
            raise UnsupportedPredictionError(
                f"{path} has tensors of different element types or dimensions. Return tensors of one type."
            )
        shapes = [list(value.shape) for value in values]
        if all(shape == shapes[0] for shape in shapes):
            rows = _lists(self._pa, np.stack([array for array, _ in found]), len(values))
            return ["tensors", _family(values[0]), found[0][1], shapes], rows
        flat = np.concatenate([array.reshape(-1) for array, _ in found])
        offsets = np.concatenate(([0], np.cumsum([array.size for array, _ in found]))).astype(np.int64)
        rows = self._pa.LargeListArray.from_arrays(offsets, self._pa.array(flat))
        return ["tensors", _family(values[0]), found[0][1], shapes], rows

    def _joined(self, name: str, pieces: list[Any]) -> Any:
        pa = self._pa
        types = {piece.type for piece in pieces if not pa.types.is_null(piece.type)}
        if len(types) > 1 and all(pa.types.is_fixed_size_list(kind) or pa.types.is_large_list(kind) for kind in types):
            types = {pa.large_list(_innermost(pa, kind)) for kind in types}  # of different lengths: one level of lists
        if len(types) > 1:
            raise UnsupportedPredictionError(
                f"column {name!r} has values of different types in one part: {', '.join(sorted(map(str, types)))}. Return "
                "the same type for every batch, or set output_format='gpq'."
            )
        kind = types.pop() if types else pa.null()
        return pa.chunked_array([_cast(pa, piece, kind) for piece in pieces], kind)


class RowsReader:
    """Gives the parts of a prediction from the rows of its batch.

    Args:
        table: All columns of the part.
    """

    def __init__(self, table: Any):
        self._table = table
        self._start = self._size = 0

    def go_to(self, start: int, size: int) -> None:
        """The batch that is decoded next has these rows."""
        self._start, self._size = start, size

    def dtype(self, column: int) -> str:
        """There are no other columns."""
        raise CorruptPartError(f"there is no column {column!r:.40}")

    def shape(self, column: int) -> tuple[int, ...]:
        """There are no other columns."""
        raise CorruptPartError(f"there is no column {column!r:.40}")

    def buffer(self, column: int) -> memoryview:
        """There are no other columns."""
        raise CorruptPartError(f"there is no column {column!r:.40}")

    def rows(self, name: str, container: str, *how: Any) -> Any:
        """The rows of a column, as what they were."""
        column = self._table.column(name).slice(self._start, self._size).combine_chunks()
        if container == "scalar":
            family, dtype = how
            return _from_numpy(column.slice(0, 1).to_numpy(zero_copy_only=False).reshape(()), family, dtype)
        if container == "array":
            family, dtype, shape = how
            return _from_numpy(_flat(column), family, dtype, (self._size, *shape))
        if how[0] == "plain":
            values = column.to_pylist()
        else:
            _, family, dtype, shapes = how
            sizes = [int(np.prod(shape)) for shape in shapes]
            flat = _from_numpy(_flat(column), family, dtype, (sum(sizes),))
            ends = np.cumsum(sizes)
            values = [
                flat[end - size : end].reshape(shape).clone()
                if family == "tensor"
                else flat[end - size : end].reshape(shape).copy()
                for size, end, shape in zip(sizes, ends.tolist(), shapes, strict=True)
            ]
        return tuple(values) if container == "tuple" else values

    def each(self, decode: Callable[[JsonNode], Any], container: str, parts: list[Any]) -> Any:
        """The dicts of a list with one per sample."""
        columns = [(key, decode(node)) for key, node in parts]
        values = [
            dict(zip([key for key, _ in columns], row, strict=True))
            for row in zip(*(c for _, c in columns), strict=True)
        ]
        return tuple(values) if container == "tuple" else values


def _name_of(path: str) -> str:
    """The column of a part of a prediction: ``output['boxes'][0]`` is ``boxes.0``."""
    steps = [quoted or name for quoted, name in _STEPS.findall(path)]
    return ".".join(str(ast.literal_eval(step)) if step[:1] in "'\"" else step for step in steps) or "prediction"


def _family(value: Any) -> str:
    return "tensor" if isinstance(value, torch.Tensor) else "numpy"


def _to_numpy(value: Any, path: str) -> tuple[np.ndarray[Any, Any], str]:
    """Numbers as a column can hold them, flat behind the first dimension where they are complex, and what they were."""
    if isinstance(value, torch.Tensor):
        dtype = str(value.dtype).removeprefix("torch.")
        tensor = value.detach().resolve_conj().resolve_neg().cpu()
        if tensor.is_complex():
            tensor = torch.view_as_real(tensor)
        elif tensor.dtype in _HALF or (tensor.dtype.is_floating_point and tensor.element_size() == 1):
            tensor = tensor.float()  # which holds each of their values
        try:
            return tensor.numpy(), dtype
        except TypeError:
            raise UnsupportedPredictionError(
                f"{path} is a tensor of {value.dtype}, which Parquet does not have."
            ) from None
    dtype = value.dtype.str
    if value.dtype.kind == "c" and value.dtype.itemsize <= 16:
        return np.stack((value.real, value.imag), axis=-1), dtype
    if value.dtype == np.float16:
        return value.astype(np.float32), dtype
    if value.dtype.kind not in _NUMPY_KINDS or (value.dtype.itemsize > 8 and value.dtype.kind != "U"):
        raise UnsupportedPredictionError(f"{path} is an array of {value.dtype}, which has no form in a Parquet part.")
    return value.astype(value.dtype.newbyteorder("=")), dtype


def _from_numpy(flat: np.ndarray[Any, Any], family: str, dtype: str, shape: tuple[int, ...] = ()) -> Any:
    if family == "tensor":
        kind = getattr(torch, dtype, None)
        if not isinstance(kind, torch.dtype):
            raise CorruptPartError(f"{dtype!r:.40} is no element type of tensors")
        tensor = torch.from_numpy(np.array(flat))
        if kind.is_complex:
            return torch.view_as_complex(tensor.reshape(*shape, 2)).to(kind)
        return tensor.to(kind).reshape(shape)
    if np.dtype(dtype).kind == "c":
        pairs = np.array(flat).reshape(*shape, 2)
        return (pairs[..., 0] + 1j * pairs[..., 1]).astype(dtype)
    return np.array(flat).astype(dtype).reshape(shape)


def _lists(pa: Any, array: np.ndarray[Any, Any], size: int) -> Any:
    """Rows of an array: numbers, or (nested) lists of fixed size."""
    inner = array.shape[1:]
    column = pa.array(np.ascontiguousarray(array).reshape(-1))
    if 0 in inner:
        return pa.LargeListArray.from_arrays(np.zeros(size + 1, np.int64), column)
    for length in reversed(inner):
        column = pa.FixedSizeListArray.from_arrays(column, length)
    return column


def _flat(column: Any) -> np.ndarray[Any, Any]:
    while hasattr(column, "flatten") and not isinstance(column.type, str) and _is_list(column):
        column = column.flatten()
    return column.to_numpy(zero_copy_only=False)  # type: ignore[no-any-return]


def _is_list(column: Any) -> bool:
    return "list" in str(column.type).split("<")[0]


def _innermost(pa: Any, kind: Any) -> Any:
    while pa.types.is_fixed_size_list(kind) or pa.types.is_large_list(kind):
        kind = kind.value_type
    return kind


def _cast(pa: Any, piece: Any, kind: Any) -> Any:
    if piece.type == kind:
        return piece
    if pa.types.is_null(piece.type):
        return pa.nulls(len(piece), kind)
    flat, count = piece, 1
    while pa.types.is_fixed_size_list(flat.type):
        count *= flat.type.list_size
        flat = flat.flatten()
    offsets = np.arange(len(piece) + 1, dtype=np.int64) * count
    return pa.LargeListArray.from_arrays(offsets, flat) if flat is not piece else piece.cast(kind)


def _plain_array(pa: Any, values: list[Any], path: str) -> Any:
    try:
        return pa.array(values)
    except (pa.ArrowException, OverflowError, UnicodeEncodeError) as error:
        raise UnsupportedPredictionError(f"{path} makes no column: {error}. Or set output_format='gpq'.") from error
