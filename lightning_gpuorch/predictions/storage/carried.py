"""Columns of the input that go along with a prediction, until it is stored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass
class WithColumns:
    """A prediction on its way to a part, with what is carried along.

    It is cut and merged by sample as any dataclass is, and so are its columns.

    Attributes:
        output: The prediction.
        columns: By name, a value for each sample.
    """

    output: Any
    columns: dict[str, Sequence[Any]]

    @staticmethod
    def apart(output: Any) -> tuple[Any, Mapping[str, Sequence[Any]]]:
        """A prediction, and what is carried along with it, if anything is."""
        return (output.output, output.columns) if isinstance(output, WithColumns) else (output, {})
