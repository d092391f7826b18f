"""The type of every path on the command line: one of this machine, with ``~`` and ``file:`` URLs understood."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

from lightning_gpuorch.errors import ConfigurationError
from lightning_gpuorch.paths import local_path


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
