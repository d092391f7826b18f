"""Recognizes out-of-memory errors, and frees what a retry needs."""

from __future__ import annotations

import gc
import sys
import traceback
from collections.abc import Iterator

import torch

_CUDA_ERROR_MEMORY_ALLOCATION = 2
_MESSAGES = (
    "CUDA out of memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
)
"""How libraries below torch, and torch's CPU allocator, say it in a plain RuntimeError."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error, or one that caused it, says that memory ran out.

    The chain of causes counts: DTensor, for one, raises ``RuntimeError from OutOfMemoryError``. ``MemoryError`` counts,
    and with it :class:`~lightning_gpuorch.errors.MemoryBudgetError`. Other errors of the device do not, even when they
    come with memory in their text: after most of them the process cannot use the device any more.
    """
    return any(_says_out_of_memory(one) for one in _chain(error))


def _says_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    if isinstance(error, torch.AcceleratorError):
        return getattr(error, "error_code", None) == _CUDA_ERROR_MEMORY_ALLOCATION
    return isinstance(error, RuntimeError) and any(message in str(error) for message in _MESSAGES)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """The error and what caused it, each once."""
    seen: set[int] = set()
    waiting = [error]
    while waiting:
        one = waiting.pop()
        if one is None or id(one) in seen:
            continue
        seen.add(id(one))
        yield one
        waiting.append(one.__cause__)
        if not one.__suppress_context__:
            waiting.append(one.__context__)
        waiting.extend(getattr(one, "exceptions", ()))  # an exception group


def release(error: BaseException) -> None:
    """Release everything an error keeps alive: the local variables of the frames it passed, and its causes.

    Those are the failed step's activations. Call it before the ``except`` block ends; the memory is free once the block
    has been left.

    Args:
        error: The caught error; it keeps its type and message, and loses its traceback and causes.
    """
    for one in release_frames(error):
        one.__traceback__ = one.__cause__ = one.__context__ = None


def release_frames(error: BaseException) -> list[BaseException]:
    """Release the local variables of the frames that an error and its causes have passed; tracebacks still name the lines.

    Args:
        error: The caught error.

    Returns:
        The error and its causes.
    """
    chain = list(_chain(error))
    for one in chain:
        if one.__traceback__ is not None:
            traceback.clear_frames(one.__traceback__)
    return chain


def free_memory(*, thorough: bool = True) -> None:
    """Collect reference cycles and give cached blocks back to the device; call it outside the ``except`` block.

    Args:
        thorough: Collect all cycles, which takes up to a second in a large process unless :func:`freeze_objects` was
            called after the model was loaded. Otherwise only young ones, such as those of the failed step.
    """
    # What a prompt or notebook keeps of the last uncaught error.
    last = getattr(sys, "last_exc", None) or getattr(sys, "last_value", None)
    if last is not None and is_out_of_memory(last):
        release(last)
        sys.last_traceback = None
    gc.collect() if thorough else gc.collect(1)
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.empty_cache()


def freeze_objects() -> None:
    """Spare later collections what is alive now: modules, the model, the dataset.

    They become cheap, also the thorough ones. What is alive now and becomes part of an unreachable cycle later stays until
    ``gc.unfreeze()``.
    """
    gc.collect()
    gc.freeze()
