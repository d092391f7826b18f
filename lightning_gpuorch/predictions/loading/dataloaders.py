"""What is asked of a dataloader in several places."""

from __future__ import annotations

from typing import Any

from torch.utils.data import DataLoader


def length_of(loader: Any) -> int | None:
    """How many batches there are, as far as the loader or its batch sampler say."""
    for sized in (loader, getattr(loader, "batch_sampler", None)):
        try:
            return len(sized)  # type: ignore[arg-type]
        except (TypeError, NotImplementedError):
            continue
    return None


def without_collation(clone: DataLoader[Any]) -> DataLoader[Any]:
    """Let a copy of a loader give the samples of a batch as they come from the dataset."""
    clone.collate_fn = as_it_is
    clone.pin_memory = False
    return clone


def as_it_is(samples: list[Any]) -> list[Any]:
    """A ``collate_fn`` that does nothing."""
    return samples


def qualified_name(obj: Any) -> str:
    """Name of an object's class, with its module."""
    return f"{type(obj).__module__}.{type(obj).__qualname__}"


def end_workers(iterator: Any) -> None:
    """End the worker processes of an iterator over a loader, whatever else still refers to it."""
    shut_down = getattr(iterator, "_shutdown_workers", None)
    if shut_down is not None:
        shut_down()
