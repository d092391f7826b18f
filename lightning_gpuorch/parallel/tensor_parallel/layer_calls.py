"""A subclass of a library layer keeps its own forward; the library's operation inside it is exchanged.

Such a forward may scale, cast, activate or clamp, by class or by attributes of the instance. It runs as it stands, while
what it computes with the layer's own weight is computed by someone else: a stub while planning, the sharded form at run
time. That is ``F.linear`` and ``F.embedding``, called directly or through ``super().forward``, and ``input @ weight.T``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch.overrides import TorchFunctionMode

_TRANSPOSE: frozenset[Any] = frozenset(
    {torch.Tensor.T.__get__, torch.Tensor.mT.__get__, torch.Tensor.t, torch.t}  # type: ignore[attr-defined]
)
_MATMUL: frozenset[Any] = frozenset({torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__})
_ADD: frozenset[Any] = frozenset({torch.add, torch.Tensor.add, torch.Tensor.__add__, torch.Tensor.__radd__})

Compute = Callable[[torch.Tensor, Any], torch.Tensor]


class LayerCalls(TorchFunctionMode):
    """While active, the operation on one layer's weight is computed by ``compute(input, bias)``.

    Args:
        weight: The layer's weight.
        bias: Its bias.
        compute: Gets the input, and the layer's bias or None if the forward adds it itself.
        adds_bias: Whether ``compute`` adds the bias in any case, so that adding it later is left out.
    """

    def __init__(self, weight: Any, bias: Any, compute: Compute, adds_bias: bool = False) -> None:
        super().__init__()
        self.weight, self.bias, self.compute, self.adds_bias = weight, bias, compute, adds_bias
        self.transposed: Any = None

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Exchange the layer's operation, let everything else pass."""
        kwargs = kwargs or {}
        if func is F.linear or func is F.embedding:
            weight = args[1] if len(args) > 1 else kwargs.get("weight")
            bias = args[2] if len(args) > 2 else kwargs.get("bias")
            if weight is self.weight:
                own = self.bias if func is F.embedding or bias is self.bias else None
                if func is F.embedding or bias is own:
                    return self.compute(args[0] if args else kwargs["input"], own)
        elif func in _TRANSPOSE and args[0] is self.weight:
            self.transposed = func(*args, **kwargs)
            return self.transposed
        elif func in _MATMUL and len(args) == 2 and self.transposed is not None and args[1] is self.transposed:
            return self.compute(args[0], None)
        elif self.adds_bias and func in _ADD and self.bias is not None and not kwargs:
            if args[1] is self.bias:
                return args[0]
            if args[0] is self.bias:
                return args[1]
        return func(*args, **kwargs)
