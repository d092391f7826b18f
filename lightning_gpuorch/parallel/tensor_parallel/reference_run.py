"""The whole model runs with stubs, and what its layers receive and its caller gets is recorded."""

from __future__ import annotations

import contextlib
import logging
import random
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from lightning_gpuorch.errors import TensorParallelError
from lightning_gpuorch.parallel.tensor_parallel.analysis_run import PythonValues, gradients_stay_on
from lightning_gpuorch.parallel.tensor_parallel.anatomy import Anatomy, ModelCall
from lightning_gpuorch.parallel.tensor_parallel.attention import drops_out
from lightning_gpuorch.parallel.tensor_parallel.experts import keeps_shape
from lightning_gpuorch.parallel.tensor_parallel.hidden_weight import WeightReadDirectly
from lightning_gpuorch.parallel.tensor_parallel.installation import StubInstaller
from lightning_gpuorch.parallel.tensor_parallel.isolation import CommunicatesError
from lightning_gpuorch.parallel.tensor_parallel.layers import features, is_conv1d
from lightning_gpuorch.parallel.tensor_parallel.random_draws import RandomDraws
from lightning_gpuorch.parallel.tensor_parallel.records import LayerCall, Received, Reference, Room
from lightning_gpuorch.parallel.tensor_parallel.state import seed_everything
from lightning_gpuorch.parallel.tensor_parallel.values import (
    detached,
    output_leaves,
    plain_outputs,
    snapshot,
    tensors_within,
    to_float32,
)

logger = logging.getLogger(__name__)


class ExampleError(TensorParallelError):
    """The model cannot be run with the example input."""


class ReferenceRun(StubInstaller):
    """Runs the whole model with stubs and records what its layers receive.

    Runs are made under ``inference_mode``, as the real step is; under ``no_grad`` if the model cannot run so.

    Args:
        anatomy: The model's parts.
        call: How the model is called.
        seed: Seed of the stubs' numbers and of the random generators during runs.
        scale: Factor of the stubs' numbers, to reach code that only acts on large or small ones; or MIXED.
        num_steps: How many times the model is called in one run, for models that keep state between steps.
    """

    def __init__(
        self, anatomy: Anatomy, call: ModelCall, seed: int = 0, scale: float = 1.0, num_steps: int = 1
    ) -> None:
        super().__init__(anatomy, seed, scale)
        self.call = ModelCall(to_float32(call.args), to_float32(dict(call.kwargs)), call.method)
        self.num_steps = num_steps
        self.model_name = type(anatomy.model).__name__
        self.read_directly: set[nn.Module] = set()
        self.reference = Reference()
        self.keeps_state = self.is_variation = False
        self._grad_mode: Any = torch.inference_mode
        # The caller of predict_step gets everything it returns; the caller of a model passes its cache back to it.
        self._caches_are_seen = call.method == "predict_step"

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
            except TensorParallelError:
                raise
            except Exception as error:
                if self._grad_mode is torch.inference_mode:
                    self._grad_mode = torch.no_grad
                    continue
                raise ExampleError(
                    f"{self.model_name} failed on the example input, before anything was sharded: {error!r}. "
                    "Pass an example_input the model accepts."
                ) from error

    def analyze(self) -> None:
        """Run the recorded model once more with gradients, for the planner.

        Raises:
            TensorParallelError: See :meth:`run_reference`.
        """
        while True:
            try:
                self._analyze()
                return
            except WeightReadDirectly as error:
                self._unstub(error)
                self.run_reference()

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
        draws = RandomDraws()
        kinds: set[tuple[Any, ...]] = set()
        choice, room = random.Random(self.seed), Room()
        last: list[Received] = []

        def copied(value: torch.Tensor, whole: bool) -> Received:
            # Query, key and value projections get one tensor: one copy is enough.
            if not last or (whole and last[0].rows is not None) or not last[0].holds(value):
                last[:] = [Received.copy(value, room, None if whole else choice)]
            return last[0]

        def on_call(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            index = counts[module]
            counts[module] += 1
            inputs = tuple(value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor))
            if any(map(torch._C._functorch.is_functorch_wrapped_tensor, inputs)):
                raise WeightReadDirectly(self.stubbed[module])  # under vmap, no collective could be called
            if not self._has_fixed_role(module):
                _refuse_as_layer_would(module, inputs[0])
            elif module not in record.layer_arguments:
                record.layer_arguments[module] = (snapshot(args), snapshot(kwargs))
                if self._runs_as_it_is(module, record.layer_arguments[module]):
                    raise WeightReadDirectly(self.stubbed[module])
            signature = self.anatomy.signature(module)
            is_first = signature not in kinds
            kinds.add(signature)
            received = record.inputs[module, index] = tuple(copied(value, is_first) for value in inputs)
            record.num_draws[module, index] = len(draws.drawn)
            record.calls.append(LayerCall(module, index, tuple(one.values for one in received if is_first), None))
            if self._has_fixed_role(module):
                return self._fixed_output(module, index, args, kwargs)
            return self.whole_output(module, index, inputs[0].shape).clone()

        with self.installed(on_call, {}), self._recording_scopes(record), self._grad_mode():
            before = None if self.is_variation else self.anatomy.state.fingerprint()
            with draws:
                result = self._run_model()
            record.random_state = torch.get_rng_state()
            self.keeps_state = before is not None and self.anatomy.state.fingerprint() != before
            record.outputs = [
                (path, snapshot(leaf)) for path, leaf in output_leaves(result, caches=self._caches_are_seen)
            ]
        visible = {id(tensor) for _, tensor in plain_outputs(result)}
        record.hidden_outputs = [tensor.detach() for tensor in tensors_within(result) if id(tensor) not in visible]
        record.draws = draws.drawn
        return record

    def _runs_as_it_is(self, module: nn.Module, call: tuple[tuple[Any, ...], dict[str, Any]]) -> bool:
        """Tell whether an attention or a holder of stacked weights does what its sharded form cannot."""
        if isinstance(module, nn.MultiheadAttention):
            return drops_out(module)
        if module not in self.anatomy.keeps_shape:
            with torch._C._DisableTorchDispatch():  # the question draws random numbers, the model does not
                self.anatomy.keeps_shape[module] = keeps_shape(module, call)
        return not self.anatomy.keeps_shape[module]

    def _analyze(self) -> None:
        """Add the graphs that lead to the layers' inputs to the record, if there are any."""
        for no_grad_too in (False, True):
            record = Reference()
            try:
                self._record_graphs(record, no_grad_too)
            except (WeightReadDirectly, CommunicatesError):
                raise
            except Exception as error:  # noqa: BLE001 - user code under gradients may raise anything; it is not cut then
                logger.debug("%s cannot be differentiated: %r", self.model_name, error)
                continue
            same_path = [(call.module, call.index) for call in record.calls] == [
                (call.module, call.index) for call in self.reference.calls
            ]
            if same_path and any(call.inputs and call.inputs[0].requires_grad for call in record.calls):
                self.reference.calls, self.reference.visible = record.calls, record.visible
                self.reference.tensors = record.tensors
                return

    def _record_graphs(self, record: Reference, no_grad_too: bool) -> None:
        counts: Counter[nn.Module] = Counter()
        kinds: set[tuple[Any, ...]] = set()

        def on_call(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            index = counts[module]
            counts[module] += 1
            inputs = tuple(value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor))
            if self._has_fixed_role(module):
                record.calls.append(LayerCall(module, index, inputs, None))
                return self._fixed_output(module, index, args, kwargs)
            value = self.whole_output(module, index, inputs[0].shape).clone()
            signature = self.anatomy.signature(module)
            if signature in kinds:
                # One of each kind is enough for the analysis; graphs through all blocks would fill the memory.
                record.calls.append(LayerCall(module, index, (), None))
                return value
            kinds.add(signature)
            record.calls.append(LayerCall(module, index, inputs, value.requires_grad_()))
            return value * 1.0

        def detach_later_kinds(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return None if module in self._first_of_kind else (detached(args), detached(kwargs))

        with contextlib.ExitStack() as stack:
            stack.enter_context(self.installed(on_call, record.tensors, trace=True))
            for module in self._composites():
                stack.callback(module.register_forward_pre_hook(detach_later_kinds, with_kwargs=True).remove)
            stack.enter_context(gradients_stay_on(no_grad_too))
            stack.enter_context(PythonValues(record.visible))
            result = self._run_model()
            record.visible += [tensor for _, tensor in plain_outputs(result) if tensor.requires_grad]

    @contextlib.contextmanager
    def _recording_scopes(self, record: Reference) -> Iterator[None]:
        handles = []
        uncopied: set[nn.Module] = set()

        def remember(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if module in self._first_of_kind and module not in record.scope_calls and module not in uncopied:
                try:
                    record.scope_calls[module] = (snapshot(args), snapshot(kwargs))
                except Exception:  # noqa: BLE001 - arguments of any type; what cannot be copied is replayed from outside
                    uncopied.add(module)

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

    def _run_model(self) -> Any:
        seed_everything(self.seed)
        results = [
            self.call.run(self.model, snapshot(self.call.args), snapshot(dict(self.call.kwargs)))
            for _ in range(self.num_steps)
        ]
        self._refuse_readings()
        return results[0] if self.num_steps == 1 else results


def _refuse_as_layer_would(module: nn.Module, value: torch.Tensor) -> None:
    """Raise what the library layer raises for an input that is not for it: a stub would take anything."""
    if isinstance(module, nn.Embedding):
        if value.numel() and not bool(((value >= 0) & (value < module.num_embeddings)).all()):
            raise IndexError("index out of range in self")
    elif (isinstance(module, nn.Linear) or is_conv1d(module)) and value.shape[-1] != features(module)[0]:
        rows, columns = features(module)
        raise RuntimeError(f"mat1 and mat2 shapes cannot be multiplied ({tuple(value.shape)} and {rows}x{columns})")
