"""An uncaught error of ours ends the process with the exit code the error stands for."""

from __future__ import annotations

import sys
from typing import Any

from lightning_gpuorch.errors import GPUOrchError


def exit_with_codes() -> None:
    """Let an uncaught error of ours end the process with its own exit code, where no supervisor stands around it."""
    if getattr(sys.excepthook, "_gpuorch", False):
        return
    previous = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, traceback: Any) -> None:
        previous(kind, error, traceback)
        if isinstance(error, GPUOrchError):
            raise SystemExit(error.exit_code)

    hook._gpuorch = True  # type: ignore[attr-defined]
    sys.excepthook = hook
