"""A model runs without its weights: every layer that could be cut is a stub that returns pseudo-random numbers.

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

import numpy as np
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from lightning_gpuorch.parallel.tensor_parallel.apply import get_attribute, set_attribute, swap_layer
from lightning_gpuorch.parallel.tensor_parallel.hidden_weight import WeightReadDirectly
from lightning_gpuorch.parallel.tensor_parallel.installation import MIXED
from lightning_gpuorch.parallel.tensor_parallel.intervals import Intervals, take
from lightning_gpuorch.parallel.tensor_parallel.plan import LayerKind, ShapeRule
from lightning_gpuorch.parallel.tensor_parallel.random_draws import RandomDraws
from lightning_gpuorch.parallel.tensor_parallel.records import REPLICATED, Deviation, LocalPlan, Received, picked
from lightning_gpuorch.parallel.tensor_parallel.reference_run import ReferenceRun
from lightning_gpuorch.parallel.tensor_parallel.shape_rules import ShapeRuled, ShapeRuleMode, index_rules
from lightning_gpuorch.parallel.tensor_parallel.state import seed_everything
from lightning_gpuorch.parallel.tensor_parallel.swap import subclass_of
from lightning_gpuorch.parallel.tensor_parallel.values import (
    NOTHING_FINITE,
    leaf_difference,
    output_leaves,
    snapshot,
    tensors_within,
)


class StubbedModel(ReferenceRun):
    """A model whose layers are stubs while it runs, and itself otherwise."""

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
        deviations: list[Deviation] = []

        def on_call(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            try:
                return compared(module, args, kwargs)
            except Deviation as deviation:
                deviations.append(deviation)  # the model's code may catch it
                raise

        def compared(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
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
                own = role.intervals[rank] if role.kind is LayerKind.ROW and position == 0 else None
                problem = self._difference_of_input(value, whole, own)
                if problem:
                    raise Deviation(name, f"input has {problem}")
            if draws and draws.drawn != self.reference.draws[: self.reference.num_draws[module, index]]:
                raise Deviation(name, "random numbers are drawn for a rank's own channels before it")
            if self._has_fixed_role(module):
                return self._fixed_output(module, index, args, kwargs)
            output = self.whole_output(module, index, expected[0].shape)
            if role.kind is LayerKind.COLUMN:
                output = take(output, output.dim() - 1, role.intervals[rank])
            return output.clone()

        # Where the whole model draws nothing, the state of the generator shows in the end that a rank drew nothing either.
        draws = RandomDraws() if scope is None and self.reference.draws else None
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.installed(on_call, {}, plan=plan, rank=rank))
            stack.enter_context(self._patched(plan, rank))
            stack.enter_context(self._grad_mode())
            stack.enter_context(draws or contextlib.nullcontext())
            stack.enter_context(learning or contextlib.nullcontext())
            if torch.__version__ < "2.13":
                stack.enter_context(_NoHeadlessAttention())
            try:
                result = self._run_model() if scope is None else self._run_scope(scope)
                leaves = list(output_leaves(result, caches=self._caches_are_seen)) if scope is None else []
                random_state = torch.get_rng_state()
            except (Deviation, WeightReadDirectly):
                raise
            except Exception as error:
                if deviations:
                    raise deviations[0] from error
                where = self._innermost_module(error)
                raise Deviation("", f"{where}: {type(error).__name__}: {str(error)[:160]}") from error
        if deviations:
            raise deviations[0]
        if scope is None:
            self._compare_outputs(result, leaves)
            drawn = draws.drawn if draws else []
            if drawn != self.reference.draws or not torch.equal(random_state, self.reference.random_state):
                raise Deviation("", "random numbers are drawn for a rank's own channels")
            for module, index in self.reference.inputs:
                if counts[module] <= index:
                    raise Deviation(self.stubbed[module], "called less often than in the whole model")
        return set(counts)

    def _run_scope(self, scope: nn.Module) -> Any:
        args, kwargs = self.reference.scope_calls[scope]
        seed_everything(self.seed)
        result = scope(*snapshot(args), **snapshot(kwargs))
        self._refuse_readings()
        return result

    def _difference_of_input(self, value: torch.Tensor, whole: Received, own: Intervals | None) -> str:
        """Compare what a layer receives with what it received in the whole model, or with its ``own`` channels of that."""
        expected, shape = whole.values, whole.shape
        if own is not None:
            expected = take(expected, expected.dim() - 1, own)
            shape = torch.Size((*shape[:-1], expected.shape[-1]))
        if value.shape != shape:
            return f"shape {tuple(value.shape)} instead of {tuple(shape)}"
        places, some = whole.channels_within(own)
        return self._difference(picked(value, whole.rows), expected) or (
            self._difference(value.index_select(-1, places), some) if len(places) else ""
        )

    def _difference(self, value: Any, whole: Any) -> str:
        problem = leaf_difference(value, whole, by_row=self.scale is MIXED)
        # Numbers that overflow because the stubs' are scaled tell nothing, as long as they overflow alike.
        return "" if problem == NOTHING_FINITE and self.scale != 1.0 else problem

    def _compare_outputs(self, result: Any, seen: list[tuple[str, Any]]) -> None:
        expected = self.reference.outputs
        if [path for path, _ in seen] != [path for path, _ in expected]:
            raise Deviation("", "the model's output has another structure")
        for (path, value), (_, whole) in zip(seen, expected, strict=True):
            problem = self._difference(value, whole)
            if problem and not (_is_small(whole) and path in self._unstable_outputs()):
                raise Deviation("", f"{path} has {problem}")
        visible = {id(value) for _, value in seen}
        hidden = [tensor for tensor in tensors_within(result) if id(tensor) not in visible]
        for value, whole in zip(hidden, self.reference.hidden_outputs, strict=False):
            # A key/value cache holds the rank's heads, by design; what has the whole shape must have the whole values.
            if value.shape == whole.shape and self._difference(value, whole):
                raise Deviation("", f"a tensor inside the output has {self._difference(value, whole)}")

    def _unstable_outputs(self) -> set[str]:
        """Paths of numbers and text that differ between two runs of the whole model: nothing to hold a rank to."""
        if self.reference.unstable is None:
            again = dict(self._record().outputs)
            self.reference.unstable = {
                path for path, value in self.reference.outputs if path in again and leaf_difference(again[path], value)
            }
        return self.reference.unstable

    def differs_from_run_to_run(self) -> bool:
        """Tell whether two runs of the whole model differ in a tensor."""
        again = self._record()
        known = dict(again.outputs)
        return any(
            len(values) != len(again.inputs.get(call, ()))
            or any(
                one.shape != other.shape or self._difference(one.values, other.values)
                for one, other in zip(again.inputs[call], values, strict=True)
            )
            for call, values in self.reference.inputs.items()
        ) or any(path not in known or self._difference(known[path], leaf) for path, leaf in self.reference.outputs)

    def _innermost_module(self, error: BaseException) -> str:
        name = self.model_name
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
            for module, role in plan.layers.items():
                # Code that asks for a layer's class sees the one it will have.
                stack.callback(setattr, module, "__class__", type(module))
                swap_layer(module, role.kind)
            for scope, rules in plan.shape_rules.items():
                module = self.anatomy.modules[scope]
                stack.callback(_restore, module.__dict__, "forward", module.__dict__.get("forward", _ABSENT))
                stack.callback(setattr, module, "__class__", type(module))
                module.__dict__["forward"] = _under_rules(module.forward, rules, rank)
                module.__class__ = subclass_of(type(module), ShapeRuled, False)
            yield


def _is_small(value: Any) -> bool:
    return isinstance(value, (int, float, str, bytes, np.generic))


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
