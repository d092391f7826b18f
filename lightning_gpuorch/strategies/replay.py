"""Callbacks that collect what a predict call computes: each rank computes a part, and a collection wants the whole.

A callback sees the batches of its own rank, which differ from run to run. With ``replay_outputs=True`` the batch hooks of the
user's callbacks wait until the job is complete; then every rank drives them over all batches and their stored outputs, in
dataset order, before ``on_predict_epoch_end``. Without it, a callback that has collected a part is named in a warning.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from typing import Any

from torch import Tensor

from lightning_gpuorch.predictions.loading.describe import Source
from lightning_gpuorch.predictions.loading.shared_loader import SharedLoader
from lightning_gpuorch.predictions.samples.tensors import to_device

log = logging.getLogger(__name__)

_HOOKS = ("on_predict_batch_start", "on_predict_batch_end")
_OURS = ("lightning.", "pytorch_lightning.", "lightning_fabric.", "lightning_gpuorch.")
_MAX_DEPTH = 3


class BatchCallbacks:
    """The user's callbacks that see batches.

    Args:
        trainer: The Trainer.
        replays: Whether their hooks wait for the whole.
    """

    def __init__(self, trainer: Any, replays: bool):
        self._trainer, self._replays = trainer, replays
        self._callbacks = [callback for callback in trainer.callbacks if _sees_batches(callback)]
        self._sizes = [_num_kept(callback) for callback in self._callbacks]
        if replays:
            for callback in self._callbacks:
                for hook in _HOOKS:
                    setattr(callback, hook, _nothing)

    def restore(self) -> None:
        """Give the callbacks their hooks back; safe to call again."""
        if self._replays:
            for callback in self._callbacks:
                for hook in _HOOKS:
                    vars(callback).pop(hook, None)

    def warn_of_collections(self, num_seen: int, num_batches: int) -> None:
        """Name the callbacks that have kept something of each batch they saw, if they saw some and not all.

        Args:
            num_seen: Batches that this rank has computed.
            num_batches: Batches of the job.
        """
        if self._replays or not 0 < num_seen < num_batches:
            return
        for callback, before in zip(self._callbacks, self._sizes, strict=True):
            if _num_kept(callback) - before >= num_seen:
                log.warning(
                    "%s collects in on_predict_batch_end and has seen %d of %d batches: each rank's callbacks see the "
                    'batches that the rank computes. trainer.predict returns all; strategy="gpuorch_replay_outputs", or '
                    "GPUOrchStrategy(replay_outputs=True), gives callbacks all of them, in dataset order, when the job is "
                    "complete.",
                    type(callback).__name__,
                    num_seen,
                    num_batches,
                )

    def replay(
        self,
        sources: Sequence[Source],
        predictions: Any,
        to_step: Callable[[Any, int], Any],
        device: Any,
    ) -> None:
        """Drive the hooks over all batches of the job.

        Args:
            sources: The dataloaders, described.
            predictions: All outputs: a sequence, or a list of one for each of several dataloaders.
            to_step: Brings a batch of a dataloader to the device as the loop does.
            device: Where outputs go, as the step left them.
        """
        self.restore()
        if not self._replays or not self._callbacks:
            return
        trainer, module = self._trainer, self._trainer.lightning_module
        many = len(sources) > 1
        for loader, source in enumerate(sources):
            outputs: Iterator[Any] = iter(predictions[loader] if many else predictions)
            batches = SharedLoader(source, lambda: (0, 1))
            for number, (batch, output) in enumerate(zip(batches, outputs, strict=True)):
                batch = to_step(batch, loader)
                rest = (batch, number, loader) if many else (batch, number)
                for callback in self._callbacks:
                    callback.on_predict_batch_start(trainer, module, *rest)
                for callback in self._callbacks:
                    callback.on_predict_batch_end(trainer, module, to_device(output, device), *rest)


def _nothing(*args: Any, **kwargs: Any) -> None:
    """In place of a hook that is driven later."""


def _sees_batches(callback: Any) -> bool:
    if hasattr(callback, "total_predict_batches_current_epoch"):
        return False  # a progress bar counts
    # A prediction writer has its hooks from Lightning, unless it does more than write.
    homes = [getattr(getattr(type(callback), hook, None), "__module__", "lightning.") for hook in _HOOKS]
    return any(not f"{home}.".startswith(_OURS) for home in homes)


def _num_kept(value: Any, depth: int = 0) -> int:
    """Entries in an object's containers, and rows of its tensors."""
    if isinstance(value, Tensor):
        return len(value) if value.dim() else 0
    if depth == _MAX_DEPTH:
        return 0
    if isinstance(value, Mapping):
        return len(value) + sum(_num_kept(item, depth + 1) for item in value.values())
    if isinstance(value, (list, Set)) or (isinstance(value, Sequence) and not isinstance(value, (str, bytes, tuple))):
        return len(value) + sum(_num_kept(item, depth + 1) for item in list(value)[:8] if not isinstance(item, Tensor))
    return _num_kept(vars(value), depth + 1) if depth == 0 and hasattr(value, "__dict__") else 0
