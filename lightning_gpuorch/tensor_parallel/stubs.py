"""How does a model run without its weights? Every layer that could be cut is a stub that returns pseudo-random numbers.

Stubs make a forward cheap at any size (weights may be on meta, nothing is multiplied) and make each layer's output
known in advance. A *reference run* records what every layer receives in the whole model. A *local run* is the same
forward as one rank would do it: stubs return only that rank's channels, attributes have the rank's values, and every
layer must receive exactly its slice of what it received in the reference run. A local run that ends without a
deviation, for every rank, proves the plan for this input without weights, processes or a GPU.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import math
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from lightning_gpuorch.errors import TensorParallelError
from lightning_gpuorch.tensor_parallel.anatomy import Anatomy, ModelCall, evaluation_mode, layer_parameters
from lightning_gpuorch.tensor_parallel.apply import get_attribute, set_attribute
from lightning_gpuorch.tensor_parallel.experts import keeps_shape
from lightning_gpuorch.tensor_parallel.intervals import take
from lightning_gpuorch.tensor_parallel.layers import features, library_class, runs_inside
from lightning_gpuorch.tensor_parallel.plan import (
    AttributePatch,
    LayerKind,
    LayerPlan,
    ParameterPlan,
    ShapeRule,
    generic_name,
)
from lightning_gpuorch.tensor_parallel.shape_rules import ShapeRuleMode, index_rules
from lightning_gpuorch.tensor_parallel.swap import subclass_of
from lightning_gpuorch.tensor_parallel.values import (
    detached,
    difference,
    plain_outputs,
    pseudo_random,
    snapshot,
    tensors_within,
    to_float32,
)

MAX_DISTINCT_ELEMENTS = 1 << 24
"""Parameters that are not cut and larger than this repeat one row of random numbers, to bound memory."""
REPLICATED = LayerPlan(LayerKind.REPLICATED)


class Deviation(TensorParallelError):  # noqa: N818 - an event of the search, not an error of the user
    """A rank's forward went another way than the whole model's.

    Attributes:
        layer: Name of the layer where it showed; empty if it showed at the model's output or as an exception.
    """

    def __init__(self, layer: str, message: str) -> None:
        super().__init__(f"{layer}: {message}" if layer else message)
        self.layer = layer


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


_ON_CPU: dict[Any, Callable[..., Any]] = {
    torch.Tensor.device.__get__: lambda *_: torch.device("cpu"),
    torch.Tensor.is_meta.__get__: lambda *_: False,  # type: ignore[attr-defined]
    torch.Tensor.get_device: lambda *_: -1,
}
"""What a hidden weight says about its place: it takes no memory, but code that asks must not move its input to meta."""


class HiddenWeight(torch.Tensor):
    """Stands in for a stubbed layer's weight: has a shape and a dtype, no values. Reading it is reported."""

    @staticmethod
    def make(layer: str, shape: tuple[int, ...], dtype: torch.dtype) -> HiddenWeight:
        """Make the stand-in of a layer's weight."""
        weight: HiddenWeight = torch.Tensor._make_subclass(HiddenWeight, torch.empty(shape, dtype=dtype, device="meta"))
        weight.__dict__.update(_layer=layer, _is_param=True)
        return weight

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return _ON_CPU.get(func, func)(*args, **kwargs)
        for item in (*args, *kwargs.values()):
            for value in item if isinstance(item, (list, tuple)) else (item,):
                if isinstance(value, HiddenWeight):
                    raise WeightReadDirectly(value.__dict__["_layer"])
        raise WeightReadDirectly("")


@dataclasses.dataclass
class LayerCall:
    """One call of a stubbed layer in the reference run.

    Attributes:
        module: The layer.
        index: How many times it was called before.
        inputs: The tensors it received; the first is its input, for the first call of a kind of layer with the autograd
            graph that led to it.
        output: The graph leaf behind its output; None for layers with fixed roles and later calls of a kind.
    """

    module: nn.Module
    index: int
    inputs: tuple[torch.Tensor, ...]
    output: torch.Tensor | None


@dataclasses.dataclass
class Reference:
    """What the reference run recorded.

    Attributes:
        calls: Layer calls in order.
        inputs: Inputs of every layer call, without graph.
        output_tensors: The model's output tensors with graph.
        outputs: The tensors a caller sees, by path, without graph.
        hidden_outputs: Tensors inside opaque output objects (caches), without graph.
        scope_calls: Arguments of the first call of a module, for modules that are the first of their kind.
        tensors: Parameters and buffers that are not a layer's, by graph leaf.
        layer_arguments: Arguments of the first call of attention and expert modules.
    """

    calls: list[LayerCall] = dataclasses.field(default_factory=list)
    inputs: dict[tuple[nn.Module, int], tuple[torch.Tensor, ...]] = dataclasses.field(default_factory=dict)
    output_tensors: list[torch.Tensor] = dataclasses.field(default_factory=list)
    outputs: list[tuple[str, torch.Tensor]] = dataclasses.field(default_factory=list)
    hidden_outputs: list[torch.Tensor] = dataclasses.field(default_factory=list)
    scope_calls: dict[nn.Module, tuple[tuple[Any, ...], dict[str, Any]]] = dataclasses.field(default_factory=dict)
    tensors: dict[str, torch.Tensor] = dataclasses.field(default_factory=dict)
    layer_arguments: dict[nn.Module, tuple[tuple[Any, ...], dict[str, Any]]] = dataclasses.field(default_factory=dict)

    @property
    def called(self) -> set[nn.Module]:
        """Layers that were called."""
        return {module for module, _ in self.inputs}


@dataclasses.dataclass
class LocalPlan:
    """What a local run needs of a plan, for any subset of the layers.

    Attributes:
        layers: Roles by layer; layers that are not listed are replicated.
        tensors: Cuts of parameters and buffers that are not a layer's, by name.
        attributes: Attribute patches.
        shape_rules: Rules by scope.
    """

    layers: dict[nn.Module, LayerPlan] = dataclasses.field(default_factory=dict)
    tensors: dict[str, ParameterPlan] = dataclasses.field(default_factory=dict)
    attributes: Sequence[AttributePatch] = ()
    shape_rules: Mapping[str, tuple[ShapeRule, ...]] = dataclasses.field(default_factory=dict)


class StubbedModel:
    """A model whose layers are stubs while it runs, and itself otherwise.

    Args:
        anatomy: The model's parts.
        call: How the model is called.
        seed: Seed of the stubs' numbers and of torch's generator during runs.
    """

    def __init__(self, anatomy: Anatomy, call: ModelCall, seed: int = 0) -> None:
        self.anatomy = anatomy
        self.model = anatomy.model
        self.call = ModelCall(to_float32(call.args), to_float32(dict(call.kwargs)), call.method)
        self.numbers = pseudo_random(seed)
        self.seed = seed
        self.stubbed: dict[nn.Module, str] = {module: anatomy.names[module] for module in anatomy.leaves}
        self.read_directly: set[nn.Module] = set()
        self._experts = set(anatomy.experts)
        kinds: dict[tuple[Any, ...], nn.Module] = {}
        for name, module in anatomy.modules.items():
            shapes = tuple((key, tuple(value.shape)) for key, value in module.named_parameters())
            kinds.setdefault((generic_name(name), type(module), shapes), module)
        self._first_of_kind = set(kinds.values())
        self.attributes_read: dict[nn.Module, set[str]] = defaultdict(set)
        self.fields_read: dict[int, set[str]] = {}
        self.reference = Reference()

    # -- reference run ------------------------------------------------------------------------------------------------

    def run_reference(self) -> Reference:
        """Run the whole model with stubs and record it.

        Layers whose weight is read by other code are found here: they run for real and stay whole.

        Raises:
            TensorParallelError: If the model cannot be run with the example input.
        """
        while True:
            try:
                self.reference = self._record()
                return self.reference
            except WeightReadDirectly as error:
                self._unstub(error)
            except Exception as error:
                raise TensorParallelError(
                    f"{type(self.model).__name__} failed on the example input, before anything was sharded: "
                    f"{error!r}. Pass "
                    "an example_input the model accepts."
                ) from error

    def _unstub(self, error: WeightReadDirectly) -> None:
        module = self.anatomy.modules.get(error.layer)
        if module is None:
            raise error
        ids = {id(parameter) for parameter in module.parameters()}
        tied = [other for other in self.stubbed if other is module or any(id(own) in ids for own in other.parameters())]
        signatures = {self.anatomy.signature(other) for other in tied}
        found = [other for other in self.stubbed if self.anatomy.signature(other) in signatures]
        if not found:
            raise error
        for other in found:
            del self.stubbed[other]
            self.read_directly.add(other)

    def _record(self) -> Reference:
        record = Reference()
        counts: Counter[nn.Module] = Counter()
        kinds: set[tuple[Any, ...]] = set()

        def on_call(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            index = counts[module]
            counts[module] += 1
            if module not in record.layer_arguments and self._has_fixed_role(module):
                record.layer_arguments[module] = (snapshot(args), snapshot(kwargs))
                if module in self._experts and not keeps_shape(module, record.layer_arguments[module]):
                    raise WeightReadDirectly(self.stubbed[module])  # no experts after all: it runs for real
            inputs = tuple(value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor))
            record.inputs[module, index] = tuple(value.detach() for value in inputs)
            if self._has_fixed_role(module):
                record.calls.append(LayerCall(module, index, inputs, None))
                return self._fixed_output(module, index, args, kwargs)
            value = self.whole_output(module, index, inputs[0]).clone()
            signature = self.anatomy.signature(module)
            if signature in kinds:
                # One of each kind is enough for the analysis; graphs through all blocks would fill the memory.
                record.calls.append(LayerCall(module, index, tuple(record.inputs[module, index]), None))
                return value
            kinds.add(signature)
            record.calls.append(LayerCall(module, index, inputs, value.requires_grad_()))
            return value * 1.0

        with self.installed(on_call, record.tensors, trace=True), self._recording_scopes(record), torch.enable_grad():
            result = self._run_model()
        seen = list(plain_outputs(result))
        record.output_tensors = [tensor for _, tensor in seen if tensor.requires_grad]
        record.outputs = [(path, tensor.detach()) for path, tensor in seen]
        visible = {id(tensor) for _, tensor in seen}
        record.hidden_outputs = [tensor.detach() for tensor in tensors_within(result) if id(tensor) not in visible]
        return record

    @contextlib.contextmanager
    def _recording_scopes(self, record: Reference) -> Iterator[None]:
        handles = []
        uncopied: set[nn.Module] = set()

        def remember(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if module not in self._first_of_kind:
                # One block of each kind is analysed; the graph through the others would only fill the memory.
                return detached(args), detached(kwargs)
            if module not in record.scope_calls and module not in uncopied:
                try:
                    record.scope_calls[module] = (snapshot(args), snapshot(kwargs))
                except Exception:  # noqa: BLE001 - arguments of any type; what cannot be copied is replayed from outside
                    uncopied.add(module)
            return None

        for module in self._composites():
            handles.append(module.register_forward_pre_hook(remember, with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _composites(self) -> list[nn.Module]:
        return [
            module
            for module in self.anatomy.names
            if module not in self.stubbed and any(part in self.stubbed for part in module.modules())
        ]

    # -- local runs ---------------------------------------------------------------------------------------------------

    def run_local(
        self,
        plan: LocalPlan,
        rank: int,
        scope: nn.Module | None = None,
        learning: ShapeRuleMode | None = None,
    ) -> set[nn.Module]:
        """Run the model, or one module of it, as ``rank`` would.

        Args:
            plan: The plan.
            rank: The rank.
            scope: A module with a recorded call; None runs the whole model and compares its outputs too.
            learning: A mode that learns shape rules, for the search.

        Returns:
            The layers that were called.

        Raises:
            Deviation: If a layer or the caller would get something else than in the whole model.
        """
        counts: Counter[nn.Module] = Counter()  # a scope was recorded at its first call: the layers inside start at 0

        def on_call(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            index = counts[module]
            counts[module] += 1
            name = self.stubbed[module]
            expected = self.reference.inputs.get((module, index))
            if expected is None:
                raise Deviation(name, "called more often than in the whole model")
            role = plan.layers.get(module, REPLICATED)
            inputs = tuple(value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor))
            if len(inputs) != len(expected):
                raise Deviation(name, f"called with {len(inputs)} tensors instead of {len(expected)}")
            for position, (value, whole) in enumerate(zip(inputs, expected, strict=True)):
                if role.kind is LayerKind.ROW and position == 0:
                    whole = take(whole, whole.dim() - 1, role.intervals[rank])
                problem = difference(value, whole)
                if problem:
                    raise Deviation(name, f"input has {problem}")
            if self._has_fixed_role(module):
                return self._fixed_output(module, index, args, kwargs)
            output = self.whole_output(module, index, expected[0])
            if role.kind is LayerKind.COLUMN:
                output = take(output, output.dim() - 1, role.intervals[rank])
            return output.clone()

        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            stack.enter_context(self.installed(on_call, {}, plan=plan, rank=rank))
            stack.enter_context(self._patched(plan, rank))
            stack.enter_context(learning or contextlib.nullcontext())
            try:
                result = self._run_model() if scope is None else self._run_scope(scope)
            except (Deviation, WeightReadDirectly):
                raise
            except Exception as error:
                where = self._innermost_module(error)
                raise Deviation("", f"{where}: {type(error).__name__}: {str(error)[:160]}") from error
        if scope is None:
            self._compare_outputs(result)
        return set(counts)

    def _run_scope(self, scope: nn.Module) -> Any:
        args, kwargs = self.reference.scope_calls[scope]
        torch.manual_seed(self.seed)
        return scope(*snapshot(args), **snapshot(kwargs))

    def _run_model(self) -> Any:
        torch.manual_seed(self.seed)
        return self.call.run(self.model, snapshot(self.call.args), snapshot(dict(self.call.kwargs)))

    def _compare_outputs(self, result: Any) -> None:
        seen = list(plain_outputs(result))
        expected = self.reference.outputs
        if [path for path, _ in seen] != [path for path, _ in expected]:
            raise Deviation("", "the model's output has another structure")
        for (path, value), (_, whole) in zip(seen, expected, strict=True):
            problem = difference(value, whole)
            if problem:
                raise Deviation("", f"{path} has {problem}")
        visible = {id(value) for _, value in seen}
        hidden = [tensor for tensor in tensors_within(result) if id(tensor) not in visible]
        for value, whole in zip(hidden, self.reference.hidden_outputs, strict=False):
            # A key/value cache holds the rank's heads, by design; what has the whole shape must have the whole values.
            if value.shape == whole.shape and difference(value, whole):
                raise Deviation("", f"a tensor inside the output has {difference(value, whole)}")

    def _innermost_module(self, error: BaseException) -> str:
        name = type(self.model).__name__
        frames = error.__traceback__
        while frames is not None:
            module = frames.tb_frame.f_locals.get("self")
            if isinstance(module, nn.Module) and module in self.anatomy.names:
                name = self.anatomy.names[module] or name
            frames = frames.tb_next
        return name

    # -- stubs --------------------------------------------------------------------------------------------------------

    def whole_output(self, module: nn.Module, index: int, value: torch.Tensor) -> torch.Tensor:
        """Give what a Linear, Conv1D or Embedding returns in the whole model at its ``index``-th call, read-only."""
        leading = value.shape if isinstance(module, nn.Embedding) else value.shape[:-1]
        return self.numbers.view((self.stubbed[module], index), (*leading, features(module)[1]))

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
            return self.numbers.tensor((name, index), hidden.shape)
        query = args[0] if args else kwargs["query"]
        key = args[1] if len(args) > 1 else kwargs["key"]
        output = self.numbers.tensor((name, index), (*query.shape[:-1], module.embed_dim))
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
        with contextlib.ExitStack() as stack:
            stack.enter_context(evaluation_mode(self.model))
            stack.enter_context(torch.random.fork_rng(devices=[]))
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")
            fast_path = torch.backends.mha.get_fastpath_enabled()
            torch.backends.mha.set_fastpath_enabled(False)
            stack.callback(torch.backends.mha.set_fastpath_enabled, fast_path)
            self._replace_tensors(stack, tensors, plan or LocalPlan(), rank, differentiable=trace)
            for module in self.stubbed:
                self._replace_forward(stack, module, on_call)
            if trace:
                for module in self._glue():
                    for value in list(module.__dict__.values()):
                        self._trace_fields(stack, value)
                    stack.callback(setattr, module, "__class__", type(module))
                    module.__class__ = _traced(type(module), self.attributes_read)
            yield

    def _trace_fields(self, stack: contextlib.ExitStack, value: Any) -> None:
        """Record which fields of a configuration-like object are read."""
        own_class = type(value)
        original: Any = own_class.__getattribute__
        plain = isinstance(value, (nn.Module, torch.Tensor, dict, list, tuple, set, enum.Enum)) or callable(value)
        if plain or not hasattr(value, "__dict__") or id(value) in self.fields_read:
            return
        reads: set[str] = set()

        def read(self: Any, name: str) -> Any:
            reads.add(name)
            return original(self, name)

        try:
            value.__class__ = type(own_class.__name__, (own_class,), {"__getattribute__": read})
        except TypeError:  # a class that cannot be subclassed or exchanged: all its fields remain candidates
            return
        self.fields_read[id(value)] = reads
        stack.callback(setattr, value, "__class__", own_class)

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

        if self._has_fixed_role(module) or not runs_inside(type(module)):
            had = module.__dict__.get("forward")
            module.__dict__["forward"] = stub
            stack.callback(_restore, module.__dict__, "forward", had)
            return
        # The class's own forward runs, the library layer's inside it is the stub.
        stack.callback(setattr, module, "__class__", type(module))
        stack.callback(module.__dict__.pop, "_gpuorch_stub", None)
        module.__dict__["_gpuorch_stub"] = stub
        module.__class__ = subclass_of(type(module), _inner_stub(library_class(type(module))), True)

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
                for key, value in own.items():
                    if value is None:
                        continue
                    name = f"{prefix}.{key}" if prefix else key
                    if id(value) not in replaced:
                        stack.callback(_hold, value)  # ids stay unique while the original is held
                        if id(value) in hidden:
                            layer, cuts = hidden[id(value)]
                            shape = cuts[""].local_shape(rank) if cuts else tuple(value.shape)
                            dtype = torch.float32 if value.is_floating_point() else value.dtype
                            substitute: torch.Tensor = HiddenWeight.make(layer, shape, dtype)
                        else:
                            # Running statistics take no gradient.
                            wanted = differentiable and not isinstance(module, nn.modules.batchnorm._NormBase)
                            wanted = wanted and module in self._first_of_kind
                            substitute = self._substitute(name, value, own is module._parameters, wanted)
                            if substitute.requires_grad:
                                tensors[name] = substitute
                            if name in plan.tensors:
                                cut = plan.tensors[name]
                                assert cut.dim is not None
                                substitute = take(substitute.detach(), cut.dim, cut.intervals[rank])
                                if own is module._parameters:
                                    substitute = nn.Parameter(substitute, requires_grad=False)
                        replaced[id(value)] = substitute
                    stack.callback(_restore, own, key, value)
                    own[key] = replaced[id(value)]  # type: ignore[assignment]

    def _substitute(self, name: str, value: torch.Tensor, is_parameter: bool, differentiable: bool) -> torch.Tensor:
        """Give what stands for a parameter or buffer outside the layers."""
        if not value.is_floating_point():
            if not value.is_meta:
                return value.detach().cpu()
            return torch.zeros(value.shape, dtype=value.dtype)
        if not is_parameter and not value.is_meta:
            real = value.detach().to("cpu", torch.float32, copy=True)
            return real.requires_grad_(differentiable)
        # Scaled by the fan-in, so that values stay finite through many layers.
        scale = 1.0 / math.sqrt(max(value[0].numel(), 1)) if value.dim() > 1 else 1.0
        large = value.numel() > MAX_DISTINCT_ELEMENTS
        shape = value.shape[-1:] if large else value.shape
        numbers = (self.numbers.tensor(("tensor", name), shape) * scale).expand(value.shape)
        if is_parameter:
            return nn.Parameter(numbers, requires_grad=differentiable and not large)
        return numbers.requires_grad_(differentiable and not large)

    @contextlib.contextmanager
    def _patched(self, plan: LocalPlan, rank: int) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for patch in plan.attributes:
                module = self.anatomy.modules[patch.module]
                holder = patch.attribute.split(".")[0]
                stack.callback(_restore, module.__dict__, holder, module.__dict__.get(holder, _ABSENT))
                if get_attribute(module, patch.attribute) is None:
                    raise Deviation("", f"{patch.module} has no attribute {patch.attribute}")
                set_attribute(module, patch.attribute, patch.values[rank])
            for scope, rules in plan.shape_rules.items():
                module = self.anatomy.modules[scope]
                stack.callback(_restore, module.__dict__, "forward", module.__dict__.get("forward", _ABSENT))
                module.__dict__["forward"] = _under_rules(module.forward, rules, rank)
            yield


_ABSENT = object()


def _restore(namespace: Any, key: str, value: Any) -> None:
    if value is _ABSENT or (key == "forward" and value is None):
        namespace.pop(key, None)
    else:
        namespace[key] = value


def _hold(value: torch.Tensor) -> None:
    """Keep a reference until the stack unwinds."""


def _under_rules(forward: Callable[..., Any], rules: tuple[ShapeRule, ...], rank: int) -> Callable[..., Any]:
    def ruled(*args: Any, **kwargs: Any) -> Any:
        with ShapeRuleMode(index_rules(rules), rank):
            return forward(*args, **kwargs)

    return ruled


_inner_stubs: dict[type[nn.Module], type[nn.Module]] = {}


def _inner_stub(base: type[nn.Module]) -> type[nn.Module]:
    if base not in _inner_stubs:

        def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return self.__dict__["_gpuorch_stub"](*args, **kwargs)

        _inner_stubs[base] = type(f"Stub{base.__name__}", (base,), {"forward": forward})
    return _inner_stubs[base]


def _traced(original: type[nn.Module], reads: dict[nn.Module, set[str]]) -> type[nn.Module]:
    """Make a subclass that records which attributes of an instance's own ``__dict__`` are read."""

    def read(self: nn.Module, name: str) -> Any:
        value = original.__getattribute__(self, name)
        if not name.startswith("_") and name in object.__getattribute__(self, "__dict__"):
            reads[self].add(name)
        return value

    return type(original.__name__, (original,), {"__getattribute__": read, "__module__": original.__module__})
