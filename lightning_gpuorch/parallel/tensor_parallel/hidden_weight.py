"""A stand-in for a layer's weight has a shape and a dtype, no values, and reports each access to them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from lightning_gpuorch.errors import TensorParallelError


class WeightReadDirectly(TensorParallelError):  # noqa: N818 - as above
    """Code other than the layer itself reads the layer's weight.

    Attributes:
        layer: Name of the layer.
    """

    def __init__(self, layer: str) -> None:
        super().__init__(f"the weight of {layer} is read by other code")
        self.layer = layer


_METADATA: frozenset[Any] = frozenset(
    {
        *(
            getattr(torch.Tensor, name).__get__
            for name in ("dtype", "device", "shape", "is_meta", "requires_grad", "ndim", "layout", "is_cuda")
        ),
        torch.Tensor.size,
        torch.Tensor.dim,
        torch.Tensor.numel,
        torch.Tensor.nelement,
        torch.Tensor.element_size,
        torch.Tensor.is_floating_point,
        torch.Tensor.is_complex,
        torch.Tensor.get_device,
        torch.is_floating_point,
        torch.is_complex,
        torch.numel,
    }
)


_TRANSPOSED: frozenset[Any] = frozenset(
    {torch.Tensor.T.__get__, torch.Tensor.mT.__get__, torch.Tensor.t, torch.t}  # type: ignore[attr-defined]
)
"""A transposed weight has no values either; who uses it is reported then."""

_ON_CPU: dict[Any, Callable[..., Any]] = {
    torch.Tensor.device.__get__: lambda *_: torch.device("cpu"),
    torch.Tensor.is_meta.__get__: lambda *_: False,  # type: ignore[attr-defined]
    torch.Tensor.get_device: lambda *_: -1,
}
"""What a hidden weight says about its place: it takes no memory, but code that asks must not move its input to meta."""


class HiddenWeight(torch.Tensor):
    """Stands in for a stubbed layer's weight: has a shape and a dtype, no values. Reading it is reported."""

    @staticmethod
    def make(layer: str, shape: tuple[int, ...], dtype: torch.dtype, readings: list[str]) -> HiddenWeight:
        """Make the stand-in of a layer's weight.

        Args:
            layer: Name of the layer.
            shape: Its shape.
            dtype: Its dtype.
            readings: Gets the layer's name when it is read: the code that reads it may catch what is raised then.
        """
        weight: HiddenWeight = torch.Tensor._make_subclass(HiddenWeight, torch.empty(shape, dtype=dtype, device="meta"))
        weight.__dict__.update(_layer=layer, _readings=readings, _is_param=True)
        return weight

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return _ON_CPU.get(func, func)(*args, **kwargs)
        if func in _TRANSPOSED:
            own = args[0].__dict__
            return HiddenWeight.make(own["_layer"], tuple(args[0].shape)[::-1], args[0].dtype, own["_readings"])
        for item in (*args, *kwargs.values()):
            for value in item if isinstance(item, (list, tuple)) else (item,):
                if isinstance(value, HiddenWeight):
                    value.__dict__["_readings"].append(value.__dict__["_layer"])
                    raise WeightReadDirectly(value.__dict__["_layer"])
        raise WeightReadDirectly("")
