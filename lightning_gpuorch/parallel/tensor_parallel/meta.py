"""Models without memory for their weights: parameters on meta, buffers real."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

from torch import nn

_lock = threading.RLock()


@contextlib.contextmanager
def empty_parameters() -> Iterator[None]:
    """Build modules whose parameters take no memory while their buffers are computed as usual.

    ``torch.device("meta")`` puts buffers on meta too; those that no checkpoint holds (rotary tables, position ids) are
    garbage after ``to_empty``, without an error. Here only parameters go to meta, at the moment they are registered.
    :func:`load_sharded` gives them values.
    """
    with _lock:
        original = nn.Module.register_parameter

        def register(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
            if type(param) is nn.Parameter and not param.is_meta:
                param = nn.Parameter(param.detach().to("meta"), requires_grad=param.requires_grad)
            original(self, name, param)

        nn.Module.register_parameter = register  # type: ignore[method-assign]
        try:
            yield
        finally:
            nn.Module.register_parameter = original  # type: ignore[method-assign]
