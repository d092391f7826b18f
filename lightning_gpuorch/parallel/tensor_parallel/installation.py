"""Stubs are put into a model and everything is put back: forwards, tensors and classes are exchanged for a while."""

from __future__ import annotations

import contextlib
import enum
import math
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from lightning_gpuorch.parallel.tensor_parallel.anatomy import Anatomy, layer_parameters
from lightning_gpuorch.parallel.tensor_parallel.hidden_weight import HiddenWeight, WeightReadDirectly
from lightning_gpuorch.parallel.tensor_parallel.intervals import take
from lightning_gpuorch.parallel.tensor_parallel.layer_calls import LayerCalls
from lightning_gpuorch.parallel.tensor_parallel.layers import features, has_own_forward
from lightning_gpuorch.parallel.tensor_parallel.plan import ParameterPlan, generic_name
from lightning_gpuorch.parallel.tensor_parallel.records import REPLICATED, LocalPlan
from lightning_gpuorch.parallel.tensor_parallel.state import random_state_kept
from lightning_gpuorch.parallel.tensor_parallel.values import pseudo_random

MAX_DISTINCT_ELEMENTS = 1 << 24
"""Parameters that are not cut and larger than this repeat one row of random numbers, to bound memory."""

LARGEST_SCALE = 1024.0
"""Largest factor of stubs' numbers, and the inverse of the smallest: thresholds beyond it are not reached."""
MIXED = float("nan")
"""In place of a scale: every row has its own."""


class StubInstaller:
    """Puts stubs into a model for the time of a run.

    Args:
        anatomy: The model's parts.
        seed: Seed of the stubs' numbers.
        scale: Factor of the stubs' numbers, whose standard deviation is 1 otherwise; MIXED gives every row its own.
    """

    def __init__(self, anatomy: Anatomy, seed: int, scale: float = 1.0) -> None:
        self.anatomy = anatomy
        self.model = anatomy.model
        self.numbers = pseudo_random(seed)
        self.seed, self.scale = seed, scale
        self.stubbed: dict[nn.Module, str] = {module: anatomy.names[module] for module in anatomy.leaves}
        self.attributes_read: dict[nn.Module, set[str]] = defaultdict(set)
        self.fields_read: dict[int, set[str]] = {}
        self.weights_read: list[str] = []
        """Layers whose weight was read by other code in the present run."""
        self._experts = set(anatomy.experts)
        kinds: dict[tuple[Any, ...], nn.Module] = {}
        for name, module in anatomy.modules.items():
            shapes = tuple((key, tuple(value.shape)) for key, value in module.named_parameters())
            kinds.setdefault((generic_name(name), type(module), shapes), module)
        self._first_of_kind = set(kinds.values())

    def whole_output(self, module: nn.Module, index: int, shape: torch.Size) -> torch.Tensor:
        """Give what a Linear, Conv1D or Embedding returns in the whole model at its ``index``-th call, read-only.

        Args:
            module: The layer.
            index: How many times it was called before.
            shape: Shape of its input.
        """
        leading = shape if isinstance(module, nn.Embedding) else shape[:-1]
        return self._numbers((self.stubbed[module], index), (*leading, features(module)[1]))

    def _numbers(self, key: tuple[Any, ...], shape: tuple[int, ...]) -> torch.Tensor:
        """Give the numbers of a stub, scaled."""
        numbers = self.numbers.view(key, shape)
        if self.scale is not MIXED:
            return numbers if self.scale == 1.0 else numbers * self.scale
        # All powers in between, dealt out to the rows at random: a threshold lies between two of them.
        order = self.numbers.view((*key, "scale"), shape[:-1]).flatten().argsort()
        powers = torch.linspace(-1.0, 1.0, max(len(order), 1))[order].view(*shape[:-1], 1)
        return numbers * LARGEST_SCALE**powers

    def _has_fixed_role(self, module: nn.Module) -> bool:
        return isinstance(module, nn.MultiheadAttention) or module in self._experts

    def _fixed_output(self, module: nn.Module, index: int, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        name = self.stubbed[module]
        if not isinstance(module, nn.MultiheadAttention):
            hidden = next(
                value
                for value in (*args, *kwargs.values())
                if isinstance(value, torch.Tensor) and value.is_floating_point()
            )
            return self._numbers((name, index), tuple(hidden.shape)).clone()
        query = args[0] if args else kwargs["query"]
        key = args[1] if len(args) > 1 else kwargs["key"]
        output = self._numbers((name, index), (*query.shape[:-1], module.embed_dim)).clone()
        if not kwargs.get("need_weights", True):
            return output, None
        length_dim = 0 if query.dim() == 2 or not module.batch_first else 1
        shape: tuple[int, ...] = (query.shape[length_dim], key.shape[length_dim])
        if not kwargs.get("average_attn_weights", True):
            shape = (module.num_heads, *shape)
        if query.dim() == 3:
            shape = (query.shape[1 - length_dim], *shape)
        return output, self.numbers.tensor((name, index, "weights"), shape).softmax(-1)

    @contextlib.contextmanager
    def installed(
        self,
        on_call: Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], Any],
        tensors: dict[str, torch.Tensor],
        plan: LocalPlan | None = None,
        rank: int = 0,
        trace: bool = False,
    ) -> Iterator[None]:
        """Put the stubs in place, and everything back afterwards.

        Args:
            on_call: Called in place of a layer's forward.
            tensors: Filled with the graph leaves that stand for parameters and buffers outside the layers; pass one to
                be differentiated.
            plan: Cuts for a local run.
            rank: The rank of a local run.
            trace: Record which plain attributes the model's code reads.
        """
        self.weights_read = []
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.anatomy.state.protected())
            for module in self.anatomy.names:
                # Flags, not eval(): layers that merge adapters do so there.
                module.__dict__["training"] = False
            stack.enter_context(random_state_kept())
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")
            fast_path = torch.backends.mha.get_fastpath_enabled()
            torch.backends.mha.set_fastpath_enabled(False)
            stack.callback(torch.backends.mha.set_fastpath_enabled, fast_path)
            self._replace_tensors(stack, tensors, plan or LocalPlan(), rank, differentiable=trace)
            for module in self.stubbed:
                self._replace_forward(stack, module, on_call)
            if trace:
                self._trace(stack)
            yield

    def _refuse_readings(self) -> None:
        """Raise what the code of the model may have caught.

        Raises:
            WeightReadDirectly: A layer's weight was read.
        """
        if self.weights_read:
            raise WeightReadDirectly(self.weights_read[0])

    def _trace(self, stack: contextlib.ExitStack) -> None:
        """Record which plain attributes of modules, and fields of configuration-like objects they hold, are read.

        The classes themselves report it for the time of the run: code that asks for the type of an object sees no other.
        """
        readers: dict[int, set[str]] = {}
        for module in self._glue():
            readers[id(module)] = self.attributes_read[module]
            _watch(stack, type(module), readers)
            for value in list(module.__dict__.values()):
                plain = isinstance(value, (nn.Module, torch.Tensor, dict, list, tuple, set, enum.Enum)) or callable(
                    value
                )
                if plain or not hasattr(value, "__dict__") or id(value) in self.fields_read:
                    continue
                readers[id(value)] = set()
                if _watch(stack, type(value), readers):
                    self.fields_read[id(value)] = readers[id(value)]

    def _glue(self) -> list[nn.Module]:
        plain = (nn.ModuleList, nn.ModuleDict, nn.Sequential, nn.LayerNorm, nn.Dropout)
        return [module for module in self.anatomy.names if module not in self.stubbed and type(module) not in plain]

    def _replace_forward(
        self,
        stack: contextlib.ExitStack,
        module: nn.Module,
        on_call: Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], Any],
    ) -> None:
        def stub(*args: Any, **kwargs: Any) -> Any:
            return on_call(module, args, kwargs)

        if self._has_fixed_role(module) or not has_own_forward(module):
            module.__dict__["forward"] = stub
            return
        own_forward: Any = type(module).forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            weight, bias = module._parameters["weight"], module._parameters.get("bias")
            with LayerCalls(weight, bias, lambda value, _: on_call(module, (value,), {}), adds_bias=True):
                return own_forward(module, *args, **kwargs)

        module.__dict__["forward"] = forward

    def _replace_tensors(
        self,
        stack: contextlib.ExitStack,
        tensors: dict[str, torch.Tensor],
        plan: LocalPlan,
        rank: int,
        differentiable: bool,
    ) -> None:
        hidden: dict[int, tuple[str, dict[str, ParameterPlan]]] = {}
        for module, name in self.stubbed.items():
            cuts = {} if self._has_fixed_role(module) else layer_parameters(module, plan.layers.get(module, REPLICATED))
            for key, parameter in module.named_parameters():
                hidden.setdefault(id(parameter), (name, {"": cuts[key]} if key in cuts else {}))
        replaced: dict[int, torch.Tensor] = {}
        for prefix, module in self.anatomy.modules.items():
            if module in self._experts and module in self.stubbed:
                continue
            for own in (module._parameters, module._buffers):
                for key, value in list(own.items()):
                    if value is None:
                        continue
                    name = f"{prefix}.{key}" if prefix else key
                    if id(value) not in replaced:
                        stack.callback(_hold, value)  # ids stay unique while the original is held
                        if id(value) in hidden:
                            layer, cuts = hidden[id(value)]
                            shape = cuts[""].local_shape(rank) if cuts else tuple(value.shape)
                            dtype = torch.float32 if value.is_floating_point() else value.dtype
                            substitute: torch.Tensor = HiddenWeight.make(layer, shape, dtype, self.weights_read)
                        else:
                            # Running statistics take no gradient.
                            wanted = differentiable and not isinstance(module, nn.modules.batchnorm._NormBase)
                            wanted = wanted and module in self._first_of_kind
                            substitute = self._substitute(name, value, own is module._parameters, wanted)
                            if substitute.requires_grad:
                                tensors[name] = substitute
                                if own is module._buffers:
                                    substitute = substitute * 1.0  # a leaf could not be written into
                            if name in plan.tensors:
                                cut = plan.tensors[name]
                                assert cut.dim is not None
                                substitute = take(substitute.detach(), cut.dim, cut.intervals[rank])
                                if own is module._parameters:
                                    substitute = nn.Parameter(substitute, requires_grad=False)
                        replaced[id(value)] = substitute
                    own[key] = replaced[id(value)]  # type: ignore[assignment]

    def _substitute(self, name: str, value: torch.Tensor, is_parameter: bool, differentiable: bool) -> torch.Tensor:
        """Give what stands for a parameter or buffer outside the layers."""
        if not value.is_floating_point():
            if not value.is_meta:
                return value.detach().to("cpu", copy=True)
            return torch.zeros(value.shape, dtype=value.dtype)
        if not is_parameter and not value.is_meta:
            real = value.detach().to("cpu", torch.float32, copy=True)
            return real.requires_grad_(differentiable)
        # Scaled by the fan-in, so that values stay finite through many layers.
        scale = 1.0 / math.sqrt(max(value.shape[1:].numel(), 1)) if value.dim() > 1 else 1.0
        large = value.numel() > MAX_DISTINCT_ELEMENTS
        shape = value.shape[-1:] if large else value.shape
        numbers = (self.numbers.tensor(("tensor", name), shape) * scale).expand(value.shape)
        if is_parameter:
            return nn.Parameter(numbers, requires_grad=differentiable and not large)
        return numbers.requires_grad_(differentiable and not large)


def _hold(value: torch.Tensor) -> None:
    """Keep a reference until the stack unwinds."""


def _watch(stack: contextlib.ExitStack, cls: type, readers: dict[int, set[str]]) -> bool:
    """Make a class report which attributes are read from the ``__dict__`` of the listed instances.

    Returns:
        False for a class that cannot be changed; all attributes of its instances remain candidates.
    """
    original: Any = cls.__getattribute__
    if getattr(original, "readers", None) is readers:
        return True

    def read(self: Any, name: str) -> Any:
        known = readers.get(id(self))
        if known is not None and not name.startswith("_") and name in object.__getattribute__(self, "__dict__"):
            known.add(name)
        return original(self, name)

    read.readers = readers  # type: ignore[attr-defined]
    own = cls.__dict__.get("__getattribute__")
    watched: Any = cls
    try:
        watched.__getattribute__ = read
    except TypeError:
        return False
    if own is None:
        stack.callback(delattr, cls, "__getattribute__")
    else:
        stack.callback(setattr, cls, "__getattribute__", own)
    return True
