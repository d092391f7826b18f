"""A plan is right if it passes here: checked without weights, processes or a GPU, whatever its origin.

1. The plan is read against the model: names, shapes, kinds, index sets that tile what they must tile, tied parameters
   that agree.
2. Fused experts are run by themselves: the sum over the ranks must equal the whole.
3. The whole model runs once with stubs, then once per rank as that rank would run it (see :mod:`stubs`): every layer
   must receive exactly its slice of the whole model's input, and the caller the same outputs.

The check covers the code path the example input takes. A layer it does not reach may be cut only like a layer of the
same kind in a sibling block that it does reach.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from lightning_gpuorch.errors import TensorParallelError
from lightning_gpuorch.parallel.tensor_parallel.anatomy import Anatomy, ModelCall, layer_parameters
from lightning_gpuorch.parallel.tensor_parallel.apply import mismatches
from lightning_gpuorch.parallel.tensor_parallel.attention import plan_attention
from lightning_gpuorch.parallel.tensor_parallel.experts import experts_plan_is_right
from lightning_gpuorch.parallel.tensor_parallel.hidden_weight import WeightReadDirectly
from lightning_gpuorch.parallel.tensor_parallel.intervals import covers, length, tiles
from lightning_gpuorch.parallel.tensor_parallel.layers import features
from lightning_gpuorch.parallel.tensor_parallel.plan import LayerKind, LayerPlan, ParameterPlan, TensorParallelPlan
from lightning_gpuorch.parallel.tensor_parallel.records import Deviation, LocalPlan
from lightning_gpuorch.parallel.tensor_parallel.stubs import StubbedModel
from lightning_gpuorch.parallel.tensor_parallel.variations import Recordings


@dataclasses.dataclass(frozen=True)
class VerificationFailure:
    """One thing that is wrong with a plan.

    Attributes:
        where: Name of the layer, parameter or module; empty for the model as a whole.
        message: What is wrong.
        rank: The rank on which it showed, None if it holds for all.
    """

    where: str
    message: str
    rank: int | None = None

    def __str__(self) -> str:
        place = self.where or "model"
        return f"{place}: {self.message}" + ("" if self.rank is None else f" (rank {self.rank})")


@dataclasses.dataclass(frozen=True)
class VerificationReport:
    """What the verifier found.

    Attributes:
        failures: What is wrong; empty for a plan that is right.
        num_layer_calls: Layer calls that were compared on every rank.
    """

    failures: tuple[VerificationFailure, ...]
    num_layer_calls: int = 0

    @property
    def ok(self) -> bool:
        """Whether the plan is right."""
        return not self.failures

    def raise_for_failures(self) -> None:
        """Raise if the plan is wrong.

        Raises:
            TensorParallelError: Naming what is wrong.
        """
        if self.failures:
            listed = "\n  ".join(str(failure) for failure in self.failures[:12])
            raise TensorParallelError(f"The tensor-parallel plan fails verification:\n  {listed}")


def verify_plan(
    model: nn.Module,
    plan: TensorParallelPlan,
    example_input: Any,
    *,
    example_kwargs: Mapping[str, Any] | None = None,
    method: str | Callable[..., Any] = "forward",
    also: Sequence[ModelCall] = (),
    seed: int = 0,
) -> VerificationReport:
    """Verify a plan from any source against a whole model.

    Args:
        model: The whole model; weights may be on meta and are not read.
        plan: The plan.
        example_input: What the model is called with, as for :func:`plan_tensor_parallel`.
        example_kwargs: Keyword arguments of the call.
        method: Name of the method that is called, or a function that calls the model.
        also: Further calls the plan must be right for.
        seed: Seed of the stubs' numbers.

    Raises:
        TensorParallelError: If the model cannot be run with the example input.
    """
    failures = _failures_by_reading(model, plan)
    if failures:
        return VerificationReport(tuple(failures))
    calls = (ModelCall.of(example_input, example_kwargs, method), *also)
    return verify_recordings(Recordings(Anatomy(model), calls, plan.tensor_parallel_size, seed), plan)


def verify_recordings(recordings: Recordings, plan: TensorParallelPlan) -> VerificationReport:
    """Verify a plan for all recorded calls of a model, then for the variations of the first.

    Args:
        recordings: The calls; the first has to reach what is cut.
        plan: The plan.
    """
    report = first = verify_recorded(recordings.first, plan)
    for other in itertools.chain(recordings.others, recordings.variations()):
        if not report.ok:
            break
        report = verify_recorded(other, plan, must_reach=False)
        del other
    return dataclasses.replace(report, num_layer_calls=first.num_layer_calls)


def verify_recorded(stubbed: StubbedModel, plan: TensorParallelPlan, must_reach: bool = True) -> VerificationReport:
    """Verify a plan on a model whose reference run is recorded.

    Args:
        stubbed: The model.
        plan: The plan.
        must_reach: Whether a layer that is cut and not reached is a failure; False for a further call of a plan that
            another call has verified.
    """
    if stubbed.is_variation:
        # The layers have been read and their cuts judged for the call it varies; what it shows, every rank shows.
        last = (plan.tensor_parallel_size - 1,)
        return VerificationReport(tuple(_failures_by_running(stubbed, plan, last)), len(stubbed.reference.calls))
    failures = _failures_by_reading(stubbed.model, plan) or _failures_of_layers(stubbed, plan, must_reach)
    if not failures:
        failures = _failures_of_experts(stubbed, plan, must_reach) or _failures_by_running(
            stubbed, plan, range(plan.tensor_parallel_size)
        )
    return VerificationReport(tuple(failures), len(stubbed.reference.calls))


def _failures_by_reading(model: nn.Module, plan: TensorParallelPlan) -> list[VerificationFailure]:
    failures = [VerificationFailure("", problem) for problem in mismatches(model, plan)]
    if failures:
        return failures
    names: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        first = names.setdefault(id(parameter), name)
        if plan.parameters[first] != plan.parameters[name]:
            failures.append(VerificationFailure(name, f"is tied to {first}, which is cut differently"))
    return failures


def _failures_of_layers(stubbed: StubbedModel, plan: TensorParallelPlan, must_reach: bool) -> list[VerificationFailure]:
    anatomy = stubbed.anatomy
    failures = []
    called = stubbed.reference.called
    verified_kinds = {
        (anatomy.signature(module), layer.kind, layer.intervals)
        for module, layer in _layers(stubbed, plan).items()
        if module in called
    }
    for name, layer in plan.layers.items():
        module = anatomy.modules[name]
        problem = ""
        if layer.kind is LayerKind.REPLICATED:
            problem = _cut_parameter(name, plan)
        elif layer.kind is LayerKind.LOCAL:
            if module not in stubbed.read_directly and (must_reach or module in called):
                problem = "only a layer whose weight other code reads can be local"
        elif module in stubbed.read_directly:
            problem = "its weight is read by other code, so it cannot be cut"
        elif module not in stubbed.stubbed:
            problem = "is not a layer that can be cut"
        elif layer.kind is LayerKind.HEADS:
            role, cuts = plan_attention(module, plan.tensor_parallel_size)  # type: ignore[arg-type]
            if role.intervals != layer.intervals or role.kind is not layer.kind:
                problem = "its heads are not dealt out the way the head-sharded form needs"
            else:
                problem = _other_cut(name, cuts, plan)
        elif layer.kind is not LayerKind.EXPERTS:
            problem = _wrong_intervals(module, layer) or _other_cut(name, layer_parameters(module, layer), plan)
        needs_call = must_reach and layer.kind in (LayerKind.COLUMN, LayerKind.ROW, LayerKind.EXPERTS)
        kind = (anatomy.signature(module), layer.kind, layer.intervals)
        if not problem and needs_call and module not in called and kind not in verified_kinds:
            problem = "the example input does not reach it or a layer of its kind, so its cut cannot be checked"
        if problem:
            failures.append(VerificationFailure(name, problem))
    return failures


def _layers(stubbed: StubbedModel, plan: TensorParallelPlan) -> dict[nn.Module, LayerPlan]:
    return {stubbed.anatomy.modules[name]: layer for name, layer in plan.layers.items()}


def _cut_parameter(name: str, plan: TensorParallelPlan) -> str:
    prefix = f"{name}." if name else ""
    tied = {other for group in plan.ties for other in group}
    for key in ("weight", "bias"):
        own = plan.parameters.get(prefix + key)
        if own is not None and own.dim is not None:
            hint = ", because it is tied" if prefix + key in tied else ""
            return f"is replicated, but its {key} is cut{hint}"
    return ""


def _other_cut(name: str, expected: Mapping[str, ParameterPlan], plan: TensorParallelPlan) -> str:
    prefix = f"{name}." if name else ""
    for key, cut in expected.items():
        planned = plan.parameters[prefix + key]
        if (planned.dim, planned.intervals, planned.only_rank) != (cut.dim, cut.intervals, cut.only_rank):
            return f"its parameter {key} is cut in another way than the layer"
    return ""


def _wrong_intervals(module: nn.Module, layer: LayerPlan) -> str:
    rows, columns = features(module)
    if any(length(own) == 0 for own in layer.intervals):
        return "a rank keeps nothing of it"
    for own in layer.intervals:
        if any(start >= stop for start, stop in own) or any(a[1] > b[0] for a, b in itertools.pairwise(own)):
            return "its intervals are not ascending and disjoint"
    if layer.kind is LayerKind.COLUMN:
        return "" if covers(layer.intervals, columns) else "its output channels are not all kept by some rank"
    size = columns if layer.kind is LayerKind.COLUMN_GATHER else rows
    if not tiles(layer.intervals, size):
        return "its slices do not tile the dimension exactly once"
    if layer.kind in (LayerKind.COLUMN_GATHER, LayerKind.VOCABULARY):
        flat = [interval for own in layer.intervals for interval in own]
        if len(flat) != len(layer.intervals) or flat != sorted(flat):
            return "its slices are not one run per rank in rank order"
    return ""


def _failures_of_experts(
    stubbed: StubbedModel, plan: TensorParallelPlan, must_reach: bool
) -> list[VerificationFailure]:
    failures = []
    checked: dict[tuple[Any, ...], bool] = {}
    for name, layer in plan.layers.items():
        if layer.kind is not LayerKind.EXPERTS:
            continue
        module = stubbed.anatomy.modules[name]
        cuts = {
            key: plan.parameters[f"{name}.{key}" if name else key]
            for key, value in module._parameters.items()
            if value is not None
        }
        call = stubbed.reference.layer_arguments.get(module)
        identity = (stubbed.anatomy.signature(module), tuple(sorted(cuts.items(), key=lambda item: item[0])))
        if call is not None and identity not in checked:
            checked[identity] = experts_plan_is_right(module, call, plan.tensor_parallel_size, cuts)
        if not checked.get(identity, not must_reach):
            failures.append(VerificationFailure(name, "the sum of its ranks' outputs is not the whole output"))
    return failures


def local_plan(stubbed: StubbedModel, plan: TensorParallelPlan) -> LocalPlan:
    """Give what local runs need of a plan."""
    layers = {module: layer for module, layer in _layers(stubbed, plan).items() if layer.kind is not LayerKind.LOCAL}
    prefixes = {module: stubbed.anatomy.names[module] for module in layers}
    own = {
        f"{prefix}.{key}" if prefix else key
        for module, prefix in prefixes.items()
        for key, _ in module.named_parameters(remove_duplicate=False)
    }
    tensors = {name: cut for name, cut in plan.parameters.items() if cut.dim is not None and name not in own}
    tied_to_layers = {name for group in plan.ties if any(name in own for name in group) for name in group}
    tensors = {name: cut for name, cut in tensors.items() if name not in tied_to_layers}
    return LocalPlan(layers, tensors, plan.attributes, plan.shape_rules)


def _failures_by_running(
    stubbed: StubbedModel, plan: TensorParallelPlan, ranks: Iterable[int]
) -> list[VerificationFailure]:
    local = local_plan(stubbed, plan)
    for rank in ranks:
        try:
            stubbed.run_local(local, rank)
        except Deviation as deviation:
            where = deviation.layer
            message = str(deviation).removeprefix(f"{where}: ") if where else str(deviation)
            if not where and ": " in message and message.split(": ", 1)[0] in stubbed.anatomy.modules:
                where, message = message.split(": ", 1)
            return [VerificationFailure(where, message, rank)]
        except WeightReadDirectly as error:
            return [VerificationFailure(error.layer, "its weight is read by other code on a rank", rank)]
    return []
