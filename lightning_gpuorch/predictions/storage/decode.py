"""The inverse of :mod:`lightning_gpuorch.predictions.storage.encode`: nodes and columns become a prediction again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

from lightning_gpuorch.errors import CorruptPartError
from lightning_gpuorch.predictions.samples import NOT_KEPT
from lightning_gpuorch.predictions.storage.values import arrays, containers, scalars, tables
from lightning_gpuorch.predictions.storage.values.base import Decode, Node

_DECODERS: dict[str, Decode] = {
    tag: decode for module in (scalars, arrays, tables, containers) for tag, decode in module.DECODERS.items()
}


class ColumnReader(Protocol):
    """Where :func:`decode_tree` finds the columns of a tree."""

    def dtype(self, column: int) -> str:
        """Return the safetensors dtype of a column."""
        ...

    def shape(self, column: int) -> tuple[int, ...]:
        """Return the shape of a column."""
        ...

    def buffer(self, column: int) -> memoryview:
        """Return the bytes of a column, valid while the reader lives; the decoder copies them."""
        ...


@runtime_checkable
class RowSource(Protocol):
    """Where the tree of a Parquet part finds the rows of its batch."""

    def rows(self, name: str, container: str, *how: Any) -> Any:
        """The rows of a column, as what they were."""
        ...

    def each(self, decode: Callable[[Node], Any], container: str, parts: list[Any]) -> Any:
        """The dicts of a list with one per sample."""
        ...


def decode_tree(node: Node, columns: ColumnReader) -> Any:
    """Rebuild a prediction.

    Args:
        node: What :meth:`TreeEncoder.encode` returned.
        columns: The columns that were collected with it.

    Returns:
        The prediction, or ``NOT_KEPT`` where a marker stands in its place. It owns its memory: tensors and arrays are
        writable and independent of ``columns``.

    Raises:
        CorruptPartError: The node is not one of this format, or does not fit the columns.
    """
    if node == ["not_kept"]:
        return NOT_KEPT
    try:
        return _TreeDecoder(columns).decode(node)
    except CorruptPartError:
        raise
    except Exception as error:
        raise CorruptPartError(f"a prediction cannot be rebuilt: {type(error).__name__}: {error}") from error


def _shown(node: Node) -> str:
    """A node's tag: the whole may be too deep to be written."""
    return repr(node[0])[:80] if isinstance(node, list) and node and isinstance(node[0], str) else "without a tag"


class _TreeDecoder:
    def __init__(self, columns: ColumnReader):
        self._columns = columns
        self.dtype, self.shape = columns.dtype, columns.shape
        self._taken: set[int] = set()

    def buffer(self, column: int) -> memoryview:
        # What is written has one column for each use. More uses would make more of a file than its bytes.
        if column in self._taken:
            raise CorruptPartError(f"column {column} is used twice")
        buffer = self._columns.buffer(column)
        self._taken.add(column)
        return buffer

    def decode(self, node: Node) -> Any:
        if not isinstance(node, list):
            return node
        if node and node[0] in ("rows", "each"):
            return self._decode_rows(*node)
        try:
            decode = _DECODERS[node[0]]
        except (KeyError, IndexError, TypeError):
            raise CorruptPartError(f"unknown node {_shown(node)}; was it written by a newer version?") from None
        return decode(self, *node[1:])

    def _decode_rows(self, tag: str, *how: Any) -> Any:
        """What Parquet parts have in their rows."""
        if not isinstance(self._columns, RowSource):
            raise CorruptPartError(f"unknown node {tag!r}; was it written by a newer version?")
        return self._columns.rows(*how) if tag == "rows" else self._columns.each(self.decode, *how)
