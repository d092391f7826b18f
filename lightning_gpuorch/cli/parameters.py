"""The types of values on the command line: paths of this machine or in a store, and numbers of nodes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

from lightning_gpuorch.config import storage_options_in_force
from lightning_gpuorch.errors import ConfigurationError
from lightning_gpuorch.paths import ObjectPath, local_path, location


class LocalPath(click.Path):
    """As :class:`click.Path`, for what :func:`~lightning_gpuorch.paths.local_path` takes; gives a ``Path``."""

    def __init__(self, **checks: Any):
        super().__init__(path_type=Path, **checks)

    def convert(self, value: str | os.PathLike[str], param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Give the path, or say what is wrong with it."""
        try:
            path = local_path(value, param.human_readable_name if param is not None else "path")
        except ConfigurationError as error:
            self.fail(str(error), param, ctx)
        return super().convert(path, param, ctx)


class OutputDirectory(LocalPath):
    """An output directory: of this machine, or in an object store; gives a ``Path`` or an ``ObjectPath``."""

    def __init__(self, **checks: Any):
        super().__init__(file_okay=False, **checks)

    def convert(self, value: str | os.PathLike[str], param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Give the path, or say what is wrong with it."""
        try:
            path = location(value, param.human_readable_name if param is not None else "path")
            if isinstance(path, ObjectPath):
                return location(path, "path", storage_options_in_force(None))
        except ConfigurationError as error:
            self.fail(str(error), param, ctx)
        return super().convert(path, param, ctx)


class NodeCount(click.ParamType):  # type: ignore[type-arg]
    """``4``, or ``1:8`` for at least one and at most eight; gives both numbers."""

    name = "nodes"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        """Give the fewest and the most nodes."""
        if isinstance(value, tuple):
            return value
        fewest, separator, most = str(value).partition(":")
        try:
            numbers = int(fewest), int(most if separator else fewest)
        except ValueError:
            self.fail(f"{value!r} is neither a number of nodes, such as 4, nor the fewest and the most, such as 1:8")
        if not 1 <= numbers[0] <= numbers[1]:
            self.fail(f"{value!r}: the fewest nodes come first, at least 1, then the most")
        return numbers
