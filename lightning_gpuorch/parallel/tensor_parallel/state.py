"""A run of a model for planning leaves the model as it was, whatever its code keeps where.

Forwards keep things on their modules: masks, counters, caches, running means, random generators. Before a run, every
tensor and array that a module reaches through plain attributes is exchanged for a copy, and the content of every
container and object on the way is remembered; afterwards all of it is put back.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import random
import sys
from collections.abc import Callable, Iterable, Iterator, MutableMapping
from typing import Any

import torch
from torch import nn

from lightning_gpuorch.errors import TensorParallelError

MAX_COPIED_BYTES = 1 << 26
"""Larger tensors and arrays of plain attributes are not copied; a run that writes into one is refused."""
MAX_LOOKED_INTO = 10_000
"""Containers with more items are remembered, what they hold is not looked into: vocabularies and data sets."""

_FOREIGN = frozenset({"lightning", "pytorch_lightning", "lightning_fabric", "lightning_gpuorch"})
_REGISTRIES = frozenset({"_parameters", "_buffers", "_modules"})


@dataclasses.dataclass
class _Slot:
    """A place that holds a tensor or array.

    Attributes:
        holder: The container or attribute dictionary.
        key: Where in it.
        value: What it holds: a tensor, an array, or a tuple of them.
    """

    holder: Any
    key: Any
    value: Any


class _Nowhere(dict[Any, Any]):
    """A place whose tensors are exchanged without anyone seeing it: class attributes hold theirs by another way."""


class ModelState:
    """What modules hold besides their parameters, found once, protected during any number of runs.

    Args:
        modules: The modules.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._restores: list[Callable[[], None]] = []
        self._containers: list[Any] = []
        self._contents: list[tuple[Any, list[Any]]] = []
        self._empty: list[Any] = []
        self._slots: list[_Slot] = []
        self._generators: list[tuple[Callable[[], Any], Callable[[Any], Any]]] = []
        self._seen: set[int] = set()
        self._seen_classes: set[type] = set()
        self._keep_ids_unique: list[Any] = []
        for module in modules:
            own = {key: value for key, value in module.__dict__.items() if key not in _REGISTRIES}
            for key in _REGISTRIES:
                self._remember(module.__dict__[key])
            self._remember(module.__dict__)
            for key, value in own.items():
                self._look(module.__dict__, key, value)
            for cls in type(module).__mro__:
                if (
                    cls.__module__.partition(".")[0] not in _FOREIGN | {"torch", "builtins"}
                    and cls not in self._seen_classes
                ):
                    self._seen_classes.add(cls)
                    self._remember_class(cls)

    @contextlib.contextmanager
    def protected(self) -> Iterator[None]:
        """Exchange tensors for copies, and put everything back afterwards.

        Raises:
            TensorParallelError: The run wrote into a tensor that is too large to be copied.
        """
        states = [(read(), write) for read, write in self._generators]
        versions = []
        copies = _Copies()
        for slot in self._slots:
            copy = copies.of(slot.value)
            if copy is None:
                versions.append((slot.value, slot.value._version))
            else:
                slot.holder[slot.key] = copy
        try:
            yield
        finally:
            for container in self._empty:  # most are: a module alone has a dozen, for its hooks
                if len(container):
                    container.clear()
            for container, content in self._contents:
                _refill(container, content)
            for restore in self._restores:
                restore()
            for state, write in states:
                write(state)
        for value, version in versions:
            if value._version != version:
                raise TensorParallelError(
                    f"the model wrote into a tensor of shape {tuple(value.shape)} that it keeps as a plain attribute, which "
                    "is too large to be copied for planning. Make it a buffer, or build the model again and pass "
                    "tensor_parallel_plan."
                )

    def fingerprint(self) -> list[Any]:
        """Describe what the modules hold, by identity and by how often it was written into; equal if nothing changed."""
        described: list[Any] = []
        for container in self._containers:
            items = container.items() if isinstance(container, MutableMapping) else enumerate(container)
            for key, value in items:
                described.append((key, id(value)))
                if type(value) in (torch.Tensor, nn.Parameter) and not value.is_inference():
                    described.append(value._version)
                elif _is_array(value) and value.dtype != object and value.nbytes <= MAX_COPIED_BYTES:
                    described.append(hash(value.tobytes()))
        return described

    # -- looking around -----------------------------------------------------------------------------------------------

    def _look(self, holder: Any, key: Any, value: Any) -> None:
        if not isinstance(holder, tuple) and (
            _is_copied(value) or (isinstance(value, tuple) and any(map(_is_copied, value)))
        ):
            self._slots.append(_Slot(holder, key, value))
        if _is_copied(value):
            return
        if id(value) in self._seen or _is_plain(value):
            return
        self._seen.add(id(value))
        self._keep_ids_unique.append(value)
        if _look_at_generator(value, self._generators):
            return
        if isinstance(value, dict):
            self._remember(value)
            self._look_all(value, list(value.items()))
        elif isinstance(value, (list, collections.deque)):
            self._remember(value)
            self._look_all(value, list(enumerate(value)))
        elif isinstance(value, set):
            self._remember(value)
        elif isinstance(value, tuple):
            self._look_all(value, list(enumerate(value)))
        if isinstance(getattr(value, "__dict__", None), dict):
            self._remember(value.__dict__)
            self._look_all(value.__dict__, list(value.__dict__.items()))

    def _remember_class(self, cls: type) -> None:
        """Undo changes of a class's own data: counters and caches that its instances share."""
        data = {
            key: value
            for key, value in vars(cls).items()
            if not key.startswith("__") and not callable(value) and not hasattr(value, "__get__")
        }
        for value in data.values():
            self._look(_Nowhere(), None, value)

        def restore() -> None:
            for key, value in data.items():
                if vars(cls).get(key) is not value:
                    setattr(cls, key, value)

        self._restores.append(restore)

    def _look_all(self, holder: Any, items: list[tuple[Any, Any]]) -> None:
        if len(items) <= MAX_LOOKED_INTO:
            for key, value in items:
                self._look(holder, key, value)

    def _remember(self, container: Any) -> None:
        """Undo what is added to a container or taken from it."""
        self._containers.append(container)
        if not len(container):
            self._empty.append(container)
        else:
            content = container.items() if isinstance(container, MutableMapping) else container
            self._contents.append((container, list(content)))


def _refill(container: Any, content: list[Any]) -> None:
    if isinstance(container, list):
        container[:] = content
    else:
        container.clear()
        fill = container.extend if isinstance(container, collections.deque) else container.update
        fill(content)


class _Copies:
    """Copies of tensors and arrays, in which what shared memory shares memory."""

    def __init__(self) -> None:
        self._storages: dict[int, torch.UntypedStorage] = {}
        self._made: dict[int, Any] = {}

    def of(self, value: Any) -> Any:
        """Copy a value; None for a tensor that is too large, the value itself if it needs no copy."""
        if id(value) not in self._made:
            self._made[id(value)] = self._copy(value)
        return self._made[id(value)]

    def _copy(self, value: Any) -> Any:
        if isinstance(value, tuple):
            copies = [self.of(item) if _is_copied(item) else None for item in value]
            items = [item if copy is None else copy for item, copy in zip(value, copies, strict=True)]
            return value._make(items) if hasattr(value, "_make") else tuple(items)
        if _is_array(value):
            return value.copy() if value.nbytes <= MAX_COPIED_BYTES else value
        if value.is_meta or isinstance(value, nn.Parameter):
            return value
        if type(value) is not torch.Tensor or value.layout is not torch.strided or value.is_quantized:
            return value.detach().clone()
        storage = value.untyped_storage()
        if storage.nbytes() > MAX_COPIED_BYTES:
            return None
        if storage.data_ptr() not in self._storages:
            self._storages[storage.data_ptr()] = storage.clone()  # type: ignore[no-untyped-call]
        clone = value.detach().new_empty(0)
        return clone.set_(
            self._storages[storage.data_ptr()], value.storage_offset(), tuple(value.shape), tuple(value.stride())
        )


def _is_copied(value: Any) -> bool:
    return isinstance(value, torch.Tensor) or _is_array(value)


def _is_array(value: Any) -> bool:
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(value, numpy.ndarray)


def _is_plain(value: Any) -> bool:
    """Tell whether a value is nothing a run could change, or belongs to someone else."""
    if value is None or isinstance(value, (int, float, complex, str, bytes, type, nn.Module)):
        return True
    if callable(value) and not hasattr(value, "update"):
        return True
    root = type(value).__module__.partition(".")[0]
    return root in _FOREIGN or (root == "torch" and not isinstance(value, (torch.Generator, dict, list, tuple)))


def _look_at_generator(value: Any, found: list[tuple[Callable[[], Any], Callable[[Any], Any]]]) -> bool:
    numpy = sys.modules.get("numpy")
    if isinstance(value, torch.Generator):
        found.append((value.get_state, value.set_state))
    elif isinstance(value, random.Random):
        found.append((value.getstate, value.setstate))
    elif numpy is not None and isinstance(value, numpy.random.RandomState):
        found.append((value.get_state, value.set_state))
    elif numpy is not None and isinstance(value, numpy.random.Generator):
        bits = value.bit_generator
        found.append((lambda: bits.state, lambda state: setattr(bits, "state", state)))
    else:
        return False
    return True


@dataclasses.dataclass
class RandomState:
    """The state of torch's, Python's and NumPy's global generators."""

    torch_cpu: torch.Tensor
    torch_cuda: torch.Tensor | None
    python: Any
    numpy: Any

    @classmethod
    def now(cls) -> RandomState:
        """Read the states."""
        numpy = sys.modules.get("numpy")
        on_cuda = torch.cuda.is_available() and torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
        return cls(
            torch.get_rng_state(),
            torch.cuda.get_rng_state() if on_cuda else None,
            random.getstate(),
            None if numpy is None else numpy.random.get_state(),
        )

    def restore(self) -> None:
        """Put the states back."""
        torch.set_rng_state(self.torch_cpu)
        if self.torch_cuda is not None:
            torch.cuda.set_rng_state(self.torch_cuda)
        random.setstate(self.python)
        if self.numpy is not None:
            sys.modules["numpy"].random.set_state(self.numpy)


@contextlib.contextmanager
def random_state_kept() -> Iterator[None]:
    """Put the state of the global generators back afterwards."""
    state = RandomState.now()
    try:
        yield
    finally:
        state.restore()


def seed_everything(seed: int) -> None:
    """Seed torch's, Python's and NumPy's global generators."""
    torch.manual_seed(seed)
    random.seed(seed)
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        numpy.random.seed(seed)
