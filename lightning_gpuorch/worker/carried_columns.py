"""Columns of the input that are stored with the predictions: named entries of each batch, by sample."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from lightning_gpuorch.config import OrchestratorConfig
from lightning_gpuorch.errors import ConfigurationError
from lightning_gpuorch.predictions.loading.tickets import Ticket
from lightning_gpuorch.predictions.samples import CannotSplitError, batch_size_of
from lightning_gpuorch.predictions.storage.parquet_columns import RESERVED
from lightning_gpuorch.worker.group_samples import samples_of

_SHOWN = 10


class CarriedColumns:
    """Takes the columns out of batches, on the rank that stores them.

    Args:
        config: Names them, in ``keep_columns`` and ``key_column``.
        stores: Whether this rank does.
        keeps_outputs: Whether there are predictions that they go along with.

    Raises:
        ConfigurationError: There is no place for columns, or one has the name of a column that each part has.
    """

    def __init__(self, config: OrchestratorConfig, stores: bool, keeps_outputs: bool):
        self._key = config.key_column
        names = [*(config.keep_columns or ()), *([self._key] if self._key else [])]
        self._names = list(dict.fromkeys(names))
        if self._names and config.output_format != "parquet":
            raise ConfigurationError(
                f"keep_columns={self._names} needs output_format='parquet': other parts have no columns. Set it, or remove "
                "keep_columns and key_column."
            )
        if self._names and not keeps_outputs:
            raise ConfigurationError(
                f"keep_columns={self._names} goes along with predictions, and none are kept. Set keep_outputs=True."
            )
        taken = sorted(set(self._names) & set(RESERVED))
        if taken:
            raise ConfigurationError(
                f"{taken} cannot be kept: each part has columns of these names already, with the dataset index and the order "
                "of the rows. Rename those of the dataset."
            )
        self._stores = stores

    def of(self, batch: Any, ticket: Ticket) -> dict[str, list[Any]] | None:
        """The columns of a batch as it is given to the step; None if none are to be kept here.

        Raises:
            ConfigurationError: A column is not there, has no entry for each sample, or has two equal keys.
        """
        if not self._names or not self._stores:
            return None
        if not isinstance(batch, Mapping):
            raise ConfigurationError(
                f"keep_columns={self._names} needs batches that are dicts, and this one is a {type(batch).__name__}. Return "
                "dicts from the dataset, or collate to one."
            )
        lacking = [name for name in self._names if name not in batch]
        if lacking:
            there = ", ".join(repr(name) for name in list(batch)[:_SHOWN])
            raise ConfigurationError(
                f"there is no column {lacking[0]!r} in the batches of the dataset; there are {there}."
            )
        size = ticket.size if ticket.size is not None else self._size_of(batch)
        columns = {name: _values(batch[name], name, size) for name in self._names}
        if self._key:
            self._refuse_equal_keys(columns[self._key], ticket)
        return columns

    def left(
        self,
        columns: dict[str, list[Any]] | None,
        before: Ticket,
        after: Ticket,
        lost: frozenset[int],
    ) -> dict[str, list[Any]] | None:
        """The columns of the samples that an output covers.

        Args:
            columns: Those of the batch as it was given out.
            before: Its ticket then.
            after: Its ticket when it was computed: other ranks of a group may have left samples out.
            lost: Positions in that batch that the output does not cover.
        """
        if columns is None or (before is after and not lost):
            return columns
        kept: Sequence[int] = range(len(next(iter(columns.values()))))
        if before is not after:
            place = {sample: position for position, sample in enumerate(samples_of(before.span))}
            kept = [place[sample] for sample in samples_of(after.span)]
        kept = [position for row, position in enumerate(kept) if row not in lost]
        return {name: [values[position] for position in kept] for name, values in columns.items()}

    def _size_of(self, batch: Any) -> int:
        try:
            return batch_size_of({name: batch[name] for name in self._names})
        except CannotSplitError as error:
            raise ConfigurationError(f"keep_columns={self._names} cannot be cut by sample: {error}") from error

    def _refuse_equal_keys(self, keys: list[Any], ticket: Ticket) -> None:
        seen: dict[Any, int] = {}
        equal = [(seen[key], row, key) for row, key in enumerate(keys) if seen.setdefault(key, row) != row]
        if equal:
            names = ticket.indices or list(range(len(keys)))
            shown = "; ".join(f"{key!r} of samples {names[a]} and {names[b]}" for a, b, key in equal[:_SHOWN])
            raise ConfigurationError(f"key_column={self._key!r} is not unique: {shown}.")


def _values(column: Any, name: str, size: int) -> list[Any]:
    """A value for each sample."""
    if isinstance(column, (torch.Tensor, np.ndarray)):
        values = column.tolist() if column.ndim else [column.item()]
    elif isinstance(column, (list, tuple)):
        values = [
            item.item() if isinstance(item, (np.generic, torch.Tensor)) and item.ndim == 0 else item for item in column
        ]
    else:
        raise ConfigurationError(f"column {name!r} is a {type(column).__name__}, which has no entry for each sample.")
    if len(values) != size:
        raise ConfigurationError(f"column {name!r} has {len(values)} entries for {size} samples.")
    return values
