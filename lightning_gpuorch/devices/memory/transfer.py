"""Copies between the host and a CUDA device that the host does not wait for.

To the device, a batch goes through page-locked buffers on a stream of its own, while the step before it computes. To the
host, an output is copied on the stream that computed it, so that the next step cannot overwrite it, and is picked up
a step later. On other devices there is nothing to overlap, and nothing here is used.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection

from lightning_gpuorch.devices.memory.pool import BufferPool
from lightning_gpuorch.predictions.samples.tensors import LEAVES, own_copy


class _HasTo(type):
    def __instancecheck__(cls, instance: object) -> bool:
        return callable(getattr(instance, "to", None)) and not isinstance(instance, torch.Tensor)


class MovesItself(metaclass=_HasTo):
    """Any object with a ``to`` that is no tensor, in ``isinstance``: it knows what moving means for it."""


class HostCopy:
    """An output on its way to the host.

    Args:
        tree: The output, with a page-locked buffer in place of each tensor of the device.
        event: Happens when all buffers are filled; None if there are none.
        buffers: The buffers.
        release: Takes a buffer back.
    """

    def __init__(
        self,
        tree: Any,
        event: Any = None,
        buffers: Sequence[torch.Tensor] = (),
        release: Callable[[torch.Tensor], None] | None = None,
    ):
        self._tree, self._event, self._buffers, self._release = tree, event, buffers, release

    def result(self) -> Any:
        """Wait for the copy; returns the output in memory of its own. To be called once."""
        if self._event is None or self._release is None:
            return self._tree
        self._event.synchronize()
        ours = {id(buffer) for buffer in self._buffers}
        tree = apply_to_collection(
            self._tree, (torch.Tensor, *LEAVES), lambda value: value.clone() if id(value) in ours else value
        )
        for buffer in self._buffers:
            self._release(buffer)
        self._tree, self._buffers = None, ()
        return tree


class Transfers:
    """Moves batches to a CUDA device and outputs back.

    Args:
        device: The device.
        pinned_pool: Page-locked buffers.
    """

    def __init__(self, device: torch.device, pinned_pool: BufferPool):
        self._device, self._pool = device, pinned_pool
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def to_device(self, batch: Any) -> Any:
        """Start to copy a batch; what is computed from it on the current stream waits for the copy.

        Tensors on other devices and objects with a ``to`` of their own are returned as they are.
        """
        staged: list[torch.Tensor] = []
        moved: list[torch.Tensor] = []

        def copy(value: Any) -> Any:
            if isinstance(value, MovesItself) or value.device.type != "cpu":
                return value
            if type(value) is not torch.Tensor or value.layout is not torch.strided or not value.is_contiguous():
                return value.to(self._device)
            source = value
            if value.numel() and not value.is_pinned():
                source = self._pool.acquire(value.shape, value.dtype)
                source.copy_(value)
                staged.append(source)
            target = source.to(self._device, non_blocking=True)
            moved.append(target)
            return target

        with torch.cuda.stream(self._stream):
            result = apply_to_collection(batch, (torch.Tensor, MovesItself), copy)
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(self._stream)
        current = torch.cuda.current_stream(self._device)
        current.wait_event(event)
        for tensor in moved:
            tensor.record_stream(current)  # its memory belongs to the copying stream
        for buffer in staged:
            self._pool.release(buffer, event)
        return result

    def to_host(self, output: Any) -> HostCopy:
        """Start to copy an output; see :meth:`HostCopy.result`."""
        buffers: list[torch.Tensor] = []

        def copy(value: Any) -> Any:
            if not isinstance(value, torch.Tensor):
                return own_copy(value)
            value = value.detach()
            if value.device.type != "cuda":
                return value.clone()
            if type(value) is not torch.Tensor or value.layout is not torch.strided or not value.numel():
                return value.to("cpu")
            buffer = self._pool.acquire(value.shape, value.dtype)
            buffer.copy_(value, non_blocking=True)
            buffers.append(buffer)
            return buffer

        tree = apply_to_collection(output, (torch.Tensor, *LEAVES), copy)
        event = None
        if buffers:
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(torch.cuda.current_stream(self._device))
        return HostCopy(tree, event, buffers, self._pool.release)
