"""A model's parts: the layers that can be cut, their relatives, and how the model is called."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from lightning_gpuorch.errors import TensorParallelError
from lightning_gpuorch.parallel.tensor_parallel.experts import looks_fused
from lightning_gpuorch.parallel.tensor_parallel.layers import features, has_own_forward, is_conv1d, weight_dims
from lightning_gpuorch.parallel.tensor_parallel.plan import (
    LayerKind,
    LayerPlan,
    ParameterPlan,
    dtype_name,
    generic_name,
)
from lightning_gpuorch.parallel.tensor_parallel.state import ModelState


@dataclasses.dataclass(frozen=True)
class ModelCall:
    """How the model is called.

    Attributes:
        args: Positional arguments.
        kwargs: Keyword arguments.
        method: Name of the method: ``forward`` calls the model itself. Or a function that calls the model somehow.
    """

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    method: str | Callable[..., Any] = "forward"

    @classmethod
    def of(
        cls,
        example_input: Any,
        example_kwargs: Mapping[str, Any] | None = None,
        method: str | Callable[..., Any] = "forward",
    ) -> ModelCall:
        """Read an example as Lightning reads ``example_input_array``: a tuple is arguments, a mapping keywords."""
        kwargs = dict(example_kwargs or {})
        if isinstance(example_input, tuple) and not hasattr(example_input, "_fields"):
            return cls(example_input, kwargs, method)
        if isinstance(example_input, Mapping) and all(isinstance(key, str) for key in example_input):
            return cls((), {**example_input, **kwargs}, method)
        return cls((example_input,), kwargs, method)

    def run(self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Call the model."""
        if callable(self.method):
            return self.method(*args, **kwargs)
        return model(*args, **kwargs) if self.method == "forward" else getattr(model, self.method)(*args, **kwargs)


class Anatomy:
    """A model's modules and which of them are layers that can be cut.

    Attributes:
        modules: Modules by qualified name; a module with several names is listed once.
        names: The reverse.
        linears: Linear and Conv1D layers (subclasses too).
        embeddings: Embedding layers.
        attentions: ``nn.MultiheadAttention`` modules; their own projections are not listed.
        experts: Modules that could hold fused experts.
        state: What the modules hold besides parameters, which runs must not change.
        keeps_shape: Those of them that were asked whether they map hidden states to hidden states.
    """

    def __init__(self, model: nn.Module) -> None:
        if any(_is_compiled(module) for module in model.modules()):
            raise TensorParallelError("The model is compiled already: plan and shard it first, then torch.compile it.")
        if any(isinstance(module, torch.jit.ScriptModule) for module in model.modules()):
            raise TensorParallelError("TorchScript modules cannot be sharded; pass the eager model.")
        self.model = model
        self.modules: dict[str, nn.Module] = dict(model.named_modules())
        self.names: dict[nn.Module, str] = {module: name for name, module in self.modules.items()}
        self.attentions = [
            module
            for module in self.names
            if type(module) is nn.MultiheadAttention and "forward" not in module.__dict__
        ]
        inside = {part for attention in self.attentions for part in attention.modules()}
        self.linears = [
            module
            for module in self.names
            if module not in inside and (isinstance(module, nn.Linear) or is_conv1d(module)) and _plain_weight(module)
        ]
        self.embeddings = [
            module for module in self.names if isinstance(module, nn.Embedding) and _plain_weight(module)
        ]
        self.experts = [module for module in self.names if looks_fused(module) and "forward" not in module.__dict__]
        self.state = ModelState(self.names)
        self.keeps_shape: dict[nn.Module, bool] = {}
        self._signatures: dict[nn.Module, tuple[Any, ...]] = {}
        self.ties = _ties(model)

    @property
    def leaves(self) -> list[nn.Module]:
        """All layers that can be cut."""
        return [*self.linears, *self.embeddings, *self.attentions, *self.experts]

    def signature(self, module: nn.Module) -> tuple[Any, ...]:
        """What layers that play the same part in repeated blocks have in common."""
        if module not in self._signatures:
            name = self.names[module]
            parent = self.modules[name.rpartition(".")[0]]
            own = (
                features(module) if isinstance(module, nn.Embedding) or module in self.linears else module.extra_repr()
            )
            self._signatures[module] = (
                generic_name(name),
                type(module).__qualname__,
                own,
                type(parent).__qualname__,
                parent.extra_repr(),
            )
        return self._signatures[module]


def _is_compiled(module: nn.Module) -> bool:
    return type(module).__name__ == "OptimizedModule" or module.__dict__.get("_compiled_call_impl") is not None


def _plain_weight(module: nn.Module) -> bool:
    """Tell whether a layer holds an ordinary weight and runs its class's forward, not one put on the instance."""
    weight = module._parameters.get("weight")
    if "forward" in module.__dict__ or (is_conv1d(module) and has_own_forward(module)):
        return False
    if "bias" not in module._parameters and ("bias" in module.__dict__ or hasattr(type(module), "bias")):
        return False  # computed from other parameters
    return weight is not None and weight.dim() == 2 and weight.is_floating_point() and type(weight) is nn.Parameter


def _ties(model: nn.Module) -> tuple[tuple[str, ...], ...]:
    names: dict[int, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names[id(parameter)].append(name)
    return tuple(tuple(group) for group in names.values() if len(group) > 1)


def layer_parameters(module: nn.Module, layer: LayerPlan) -> dict[str, ParameterPlan]:
    """Give what a Linear, Conv1D or Embedding keeps of its parameters, by their name inside the layer."""
    cut: dict[str, int] = {}
    input_dim, output_dim = weight_dims(module)
    if layer.kind in (LayerKind.COLUMN, LayerKind.COLUMN_GATHER):
        cut = {"weight": output_dim, "bias": 0}
    elif layer.kind in (LayerKind.ROW, LayerKind.ROW_SPLIT, LayerKind.VOCABULARY):
        cut = {"weight": input_dim}
    plans = {}
    for name, value in module._parameters.items():
        if value is not None:
            dim = cut.get(name)
            intervals = () if dim is None else layer.intervals
            plans[name] = ParameterPlan(tuple(value.shape), dtype_name(value.dtype), dim, intervals)
    return plans
