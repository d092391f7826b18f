"""A list whose items are read when they are used.

It is a subclass of :class:`list`, since people ask ``isinstance(predictions, list)`` and much of what takes lists (json,
``[] + p``, ``sum(p, [])``, torch) refuses other sequences. Code in C may read the memory of a list without asking the
object. So that it never finds the list empty, there is an entry for each item, 8 bytes each: the same placeholder, which
nothing takes for a prediction. torch asks the placeholder what to do, and is given the items; whatever else comes upon it
raises an error that names its class.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, SupportsIndex

import torch
from torch.utils import _pytree


class UnreadPrediction:
    """Stands in the memory of a list for every item that has not been read; ``list(predictions)`` reads them."""

    def __repr__(self) -> str:
        return "<a prediction that is not read yet: list(predictions) reads them all>"

    @classmethod
    def __torch_function__(cls, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call the function again with the items of lazy lists."""
        found = False

        def read(value: Any) -> Any:
            nonlocal found
            if isinstance(value, LazyList):
                found = True
                return list(value)
            return type(value)(map(read, value)) if type(value) in (list, tuple) else value

        args, kwargs = tuple(map(read, args)), {name: read(value) for name, value in (kwargs or {}).items()}
        if not found:
            raise TypeError(f"{getattr(func, '__name__', func)} was given {cls()!r}.")
        return func(*args, **kwargs)


_UNREAD = UnreadPrediction()


def _in_memory(method: Callable[..., Any]) -> Any:
    """A method of list that needs, or changes, the list itself: it works on the items, read into memory."""

    @functools.wraps(method)
    def call(self: LazyList, *args: Any, **kwargs: Any) -> Any:
        self.read_all()
        self._is_as_stored = False
        return method(self, *args, **kwargs)

    return call


class LazyList(list[Any]):
    """A list that reads its items when they are used, as long as nobody changes it. Subclasses read and cut."""

    _is_lazy: bool
    """Whether all entries are placeholders."""
    _is_as_stored: bool
    """Whether positions are still those of the items that can be read."""

    def __new__(cls, items: Iterable[Any] = ()) -> Any:  # noqa: D102
        # Libraries make sequences like a given one by calling its class with items.
        return list(items)

    @classmethod
    def _of_length(cls, length: int) -> Any:
        self = list.__new__(cls)
        list.__init__(self, [_UNREAD] * length)
        self._is_lazy, self._is_as_stored = True, True
        return self

    def _read(self, position: int) -> Any:
        raise NotImplementedError

    def _part_of(self, positions: slice) -> Any:
        return list(self)[positions]

    def read_all(self) -> None:
        """Read every item into memory; from then on this is a list as any other."""
        if self._is_lazy:
            items = list(self)
            list.__setitem__(self, slice(None), items)
            self._is_lazy = False

    # Reading

    def __iter__(self) -> Iterator[Any]:
        return map(self._read, range(len(self))) if self._is_lazy else list.__iter__(self)

    def __reversed__(self) -> Iterator[Any]:
        return map(self._read, reversed(range(len(self)))) if self._is_lazy else list.__reversed__(self)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            if not self._is_as_stored:
                return list.__getitem__(self, index)
            part = self._part_of(index)
            if not self._is_lazy and isinstance(part, LazyList):
                list.__setitem__(part, slice(None), list.__getitem__(self, index))
                part._is_lazy = False
            return part
        return self._read(range(len(self))[index]) if self._is_lazy else list.__getitem__(self, index)

    def __contains__(self, value: object) -> bool:
        return any(item is value or item == value for item in self)

    def index(self, value: Any, start: SupportsIndex = 0, stop: SupportsIndex | None = None, /) -> int:
        """Return the first position of a value.

        Raises:
            ValueError: It is not in the list.
        """
        for position in range(len(self))[start:stop]:
            item = self[position]
            if item is value or item == value:
                return position
        raise ValueError(f"{value!r} is not in list")

    def count(self, value: Any) -> int:
        """Return how often a value occurs."""
        return sum(1 for item in self if item is value or item == value)

    def __repr__(self) -> str:
        if not self._is_lazy:
            return list.__repr__(self)
        shown = [repr(self._read(position)) for position in range(min(len(self), 3))]
        hidden = [f"... {len(self) - len(shown)} more"] if len(self) > len(shown) else []
        return f"[{', '.join(shown + hidden)}]"

    # As a list among others: the results are plain lists

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, list):
            return NotImplemented
        return other is self or list(self) == list(other)

    def __ne__(self, other: object) -> bool:
        return NotImplemented if not isinstance(other, list) else not self == other

    def __lt__(self, other: list[Any]) -> bool:
        return list(self) < list(other) if isinstance(other, list) else NotImplemented

    def __le__(self, other: list[Any]) -> bool:
        return list(self) <= list(other) if isinstance(other, list) else NotImplemented

    def __gt__(self, other: list[Any]) -> bool:
        return list(self) > list(other) if isinstance(other, list) else NotImplemented

    def __ge__(self, other: list[Any]) -> bool:
        return list(self) >= list(other) if isinstance(other, list) else NotImplemented

    __hash__ = None

    def __add__(self, other: list[Any]) -> list[Any]:
        return [*self, *other] if isinstance(other, list) else NotImplemented

    def __radd__(self, other: list[Any]) -> list[Any]:
        return [*other, *self] if isinstance(other, list) else NotImplemented

    def __mul__(self, count: SupportsIndex) -> list[Any]:
        return list(self) * count

    __rmul__ = __mul__

    def copy(self) -> Any:
        """Return another list of the same items, as lazy as this one."""
        return self[:]

    __copy__ = copy

    def __reduce_ex__(self, _protocol: SupportsIndex) -> Any:
        # By value, and as a plain list: what is saved must not depend on a directory, nor on this package.
        return list, (), None, iter(self)

    def __arrow_array__(self, type: Any = None) -> Any:  # noqa: A002 - pyarrow's name
        import pyarrow as pa

        return pa.array(list(self), type=type)

    # Changing

    append = _in_memory(list.append)
    extend = _in_memory(list.extend)
    insert = _in_memory(list.insert)
    pop = _in_memory(list.pop)
    remove = _in_memory(list.remove)
    clear = _in_memory(list.clear)
    sort = _in_memory(list.sort)
    reverse = _in_memory(list.reverse)
    __setitem__ = _in_memory(list.__setitem__)
    __delitem__ = _in_memory(list.__delitem__)
    __iadd__ = _in_memory(list.__iadd__)
    __imul__ = _in_memory(list.__imul__)

    def __init_subclass__(cls) -> None:
        # torch's trees know classes by their exact type.
        _pytree.register_pytree_node(cls, lambda items: (list(items), None), lambda items, _: list(items))


# What is saved with torch.save is a plain list (see __reduce_ex__), which torch.load(weights_only=True) makes only where it
# has been told that it may.
torch.serialization.add_safe_globals([list])
