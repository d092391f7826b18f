"""Answers that are given now, later, or not at all."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import Future
from typing import Any, TypeVar

from lightning_gpuorch.errors import GPUOrchError

T = TypeVar("T")


def pending() -> Future[Any]:
    """An answer that is given later. A connection that ends while it waits cannot cancel it."""
    future: Future[Any] = Future()
    future.set_running_or_notify_cancel()
    return future


def answered(answer: T) -> Future[T]:
    """An answer that is there already."""
    future: Future[T] = pending()
    future.set_result(answer)
    return future


def failed(error: GPUOrchError) -> Future[Any]:
    """A request that is refused."""
    future = pending()
    future.set_exception(error)
    return future


def resolve(waiting: Iterable[Future[Any]], answer: object) -> None:
    """Answer requests: with a message, or by raising an error."""
    for future in waiting:
        if isinstance(answer, GPUOrchError):
            future.set_exception(answer)
        else:
            future.set_result(answer)
