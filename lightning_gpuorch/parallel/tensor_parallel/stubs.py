"""How does a model run without its weights? Every layer that could be cut is a stub that returns pseudo-random numbers.

Stubs make a forward cheap at any size (weights may be on meta, nothing is multiplied) and make each layer's output
known in advance. A *reference run* records what every layer receives in the whole model. A *local run* is the same
forward as one rank would do it: stubs return only that rank's channels, attributes have the rank's values, and every
layer must receive exactly its slice of what it received in the reference run. A local run that ends without a
deviation, for every rank, proves the plan for this input without weights, processes or a GPU.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from lightning_gpuorch.errors import TensorParallelError
from lightning_gpuorch.parallel.tensor_parallel.anatomy import Anatomy, ModelCall
from lightning_gpuorch.parallel.tensor_parallel.apply import get_attribute, set_attribute
from lightning_gpuorch.parallel.tensor_parallel.experts import keeps_shape
from lightning_gpuorch.parallel.tensor_parallel.hidden_weight import WeightReadDirectly
from lightning_gpuorch.parallel.tensor_parallel.installation import StubInstaller
from lightning_gpuorch.parallel.tensor_parallel.intervals import take
from lightning_gpuorch.parallel.tensor_parallel.isolation import CommunicatesError
from lightning_gpuorch.parallel.tensor_parallel.plan import LayerKind, ShapeRule
from lightning_gpuorch.parallel.tensor_parallel.records import REPLICATED, Deviation, LayerCall, LocalPlan, Reference
from lightning_gpuorch.parallel.tensor_parallel.shape_rules import ShapeRuleMode, index_rules
from lightning_gpuorch.parallel.tensor_parallel.values import (
    detached,
    difference,
    plain_outputs,
    snapshot,
    tensors_within,
    to_float32,
)


class StubbedModel(StubInstaller):
    """A model whose layers are stubs while it runs, and itself otherwise.

    Args:
        anatomy: The model's parts.
        call: How the model is called.
        seed: Seed of the stubs' numbers and of torch's generator during runs.
    """

    def __init__(self, anatomy: Anatomy, call: ModelCall, seed: int = 0) -> None:
        super().__init__(anatomy, seed)
        self.call = ModelCall(to_float32(call.args), to_float32(dict(call.kwargs)), call.method)
        self.read_directly: set[nn.Module] = set()
        self.reference = Reference()
        self._copy_inputs = False

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
                if self._copy_inputs or not self._inputs_changed():
                    return self.reference
                self._copy_inputs = True  # the model writes into tensors its layers were given
            except WeightReadDirectly as error:
                self._unstub(error)
            except CommunicatesError:
                raise
            except Exception as error:
                raise TensorParallelError(
                    f"{type(self.model).__name__} failed on the example input, before anything was sharded: {error!r}. "
                    "Pass an example_input the model accepts."
                ) from error

    def _inputs_changed(self) -> bool:
        record = self.reference
        return any(
            value._version != version
            for key, values in record.inputs.items()
            for value, version in zip(values, record.versions[key], strict=True)
        )

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
            copies = (value.detach().clone() for value in inputs) if self._copy_inputs else map(torch.detach, inputs)
            record.inputs[module, index] = tuple(copies)
            record.versions[module, index] = tuple(value._version for value in record.inputs[module, index])
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
            if torch.__version__ < "2.13":
                stack.enter_context(_NoHeadlessAttention())
            try:
                result = self._run_model() if scope is None else self._run_scope(scope)
            except (Deviation, WeightReadDirectly):
                raise
            except Exception as error:
                where = self._innermost_module(error)
                raise Deviation("", f"{where}: {type(error).__name__}: {str(error)[:160]}") from error
        if scope is None:
            self._compare_outputs(result)
            for module, index in self.reference.inputs:
                if counts[module] <= index:
                    raise Deviation(self.stubbed[module], "called less often than in the whole model")
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


class _NoHeadlessAttention(TorchFunctionMode):
    """Refuses attention without heads: torch 2.11 divides by their number, which ends the process; 2.13 does not."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is nn.functional.scaled_dot_product_attention:
            operands = [*args[:3], *(kwargs[name] for name in ("query", "key", "value") if name in kwargs)]
            if not all(operand.numel() for operand in operands):
                raise Deviation("", f"attention over tensors of shape {[tuple(one.shape) for one in operands]}")
        return func(*args, **kwargs)


_ABSENT = object()


def _restore(namespace: Any, key: str, value: Any) -> None:
    if value is _ABSENT or (key == "forward" and value is None):
        namespace.pop(key, None)
    else:
        namespace[key] = value


def _under_rules(forward: Callable[..., Any], rules: tuple[ShapeRule, ...], rank: int) -> Callable[..., Any]:
    def ruled(*args: Any, **kwargs: Any) -> Any:
        with ShapeRuleMode(index_rules(rules), rank):
            return forward(*args, **kwargs)

    return ruled
