"""A plan comes from the sources in their order, each verified, until one is right."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from lightning_gpuorch.errors import TensorParallelError
from lightning_gpuorch.parallel.tensor_parallel.anatomy import Anatomy, ModelCall
from lightning_gpuorch.parallel.tensor_parallel.assemble import Decisions, assemble, independent_role, replicated
from lightning_gpuorch.parallel.tensor_parallel.plan import LayerKind, TensorParallelPlan, generic_name
from lightning_gpuorch.parallel.tensor_parallel.planner import decide_experts, decide_whole_layers, probe
from lightning_gpuorch.parallel.tensor_parallel.published import published_decisions
from lightning_gpuorch.parallel.tensor_parallel.stubs import StubbedModel
from lightning_gpuorch.parallel.tensor_parallel.variations import Recordings
from lightning_gpuorch.parallel.tensor_parallel.verify import VerificationFailure, verify_recordings

MAX_HEALING_STEPS = 32


def plan_tensor_parallel(
    model: nn.Module,
    example_input: Any,
    tensor_parallel_size: int,
    *,
    example_kwargs: Mapping[str, Any] | None = None,
    method: str | Callable[..., Any] = "forward",
    also: Sequence[ModelCall] = (),
    seed: int = 0,
) -> TensorParallelPlan:
    """Find a verified tensor-parallel plan for any module.

    No weights are read (they may be on meta), no process group or GPU is needed, and the same call gives the same plan.
    Sources, in order: shipped handlers (``nn.MultiheadAttention``, fused experts), the model's published plan
    (transformers' ``_tp_plan``), probing, and per block column-wise layers with gathered output. What cannot be cut
    stays whole on every rank, with the reason in the plan. Every plan passes :func:`verify_plan`'s check before it is
    returned.

    Args:
        model: The whole model.
        example_input: What the model is called with: a tensor, a tuple of arguments, or a mapping of keyword arguments.
            Small shapes are best, some 2 x 16 tokens; it decides which code path is checked.
        tensor_parallel_size: Number of ranks.
        example_kwargs: Keyword arguments of the call, besides ``example_input``.
        method: Name of the method that will be called, or a function that calls the model.
        also: Further calls the plan must be right for, because their code path differs: a step with a key/value cache,
            ``ModelCall(kwargs={"input_ids": ids, "max_new_tokens": 3}, method="generate")``, say.
        seed: Seed of the probe's numbers.

    Raises:
        TensorParallelError: If the model cannot be run with the example input, or no plan passes verification.
    """
    if tensor_parallel_size < 1:
        raise TensorParallelError(f"tensor_parallel_size must be at least 1, not {tensor_parallel_size}.")
    anatomy = Anatomy(model)
    if not any(True for _ in model.parameters()):
        raise TensorParallelError(f"{type(model).__name__} has no parameters; there is nothing to shard.")
    if tensor_parallel_size == 1:
        whole = Decisions(roles={module: replicated("one rank") for module in (*anatomy.linears, *anatomy.embeddings)})
        whole.roles.update({module: replicated("one rank") for module in anatomy.attentions})
        return assemble(anatomy, whole, 1)
    calls = (ModelCall.of(example_input, example_kwargs, method), *also)
    recordings = Recordings(anatomy, calls, tensor_parallel_size, seed)
    return _from_publication(recordings, tensor_parallel_size) or _from_probe(recordings, tensor_parallel_size)


def _first_failure(recordings: Recordings, plan: TensorParallelPlan) -> VerificationFailure | None:
    """Verify a plan for all recorded calls; the first has to reach what is cut."""
    report = verify_recordings(recordings, plan)
    return None if report.ok else report.failures[0]


def _from_publication(recordings: Recordings, num_ranks: int) -> TensorParallelPlan | None:
    """Take the model's own plan if it covers the model and is right as it stands."""
    stubbed = recordings.first
    decisions = published_decisions(stubbed.anatomy, num_ranks)
    if decisions is None:
        return None
    decide_whole_layers(stubbed, decisions)
    if any(module not in stubbed.stubbed for module in decisions.roles if module not in stubbed.read_directly):
        return None
    experts = Decisions()
    decide_experts(stubbed, num_ranks, experts)
    decisions.roles.update(experts.roles)
    decisions.expert_cuts = experts.expert_cuts
    plan = assemble(stubbed.anatomy, decisions, num_ranks)
    complete = all(
        layer.kind is not LayerKind.COLUMN_GATHER or stubbed.anatomy.modules[name] in _visible_layers(stubbed)
        for name, layer in plan.layers.items()
    )
    return plan if complete and _first_failure(recordings, plan) is None else None


def _visible_layers(stubbed: StubbedModel) -> set[nn.Module]:
    """Layers that are called once at most per kind: heads of the model, which have nothing to pair with."""
    kinds: dict[tuple[Any, ...], int] = {}
    for module in stubbed.reference.called:
        signature = stubbed.anatomy.signature(module)
        kinds[signature] = kinds.get(signature, 0) + 1
    return {module for module in stubbed.reference.called if kinds[stubbed.anatomy.signature(module)] == 1}


def _from_probe(recordings: Recordings, num_ranks: int) -> TensorParallelPlan:
    stubbed = recordings.first
    stubbed.analyze()
    decisions = probe(stubbed, num_ranks)
    decide_experts(stubbed, num_ranks, decisions)
    failure: VerificationFailure | None = None
    for _ in range(MAX_HEALING_STEPS):
        plan = assemble(stubbed.anatomy, decisions, num_ranks)
        failure = _first_failure(recordings, plan)
        if failure is None:
            return plan
        if not heal(stubbed, decisions, failure, num_ranks):
            break
    cause = (
        f"it computes something else in every run, by random numbers that are not seeded or by the time ({failure}). Seed "
        "its generators in the step, the same way on every rank"
        if stubbed.differs_from_run_to_run()
        else f"the last failure was {failure}. Run it with tensor_parallel_size=1, or pass your own plan or parallelize_fn"
    )
    raise TensorParallelError(
        f"No tensor-parallel plan for {type(stubbed.model).__name__} on {num_ranks} ranks passes verification: {cause}."
    )


def heal(stubbed: StubbedModel, decisions: Decisions, failure: VerificationFailure, num_ranks: int) -> bool:
    """Move the block where a plan failed to the next source: gathered, then whole.

    Returns:
        False if nothing is left to move.
    """
    anatomy = stubbed.anatomy
    cut = {
        anatomy.names[module]: module
        for module, role in decisions.roles.items()
        if role.kind in (LayerKind.COLUMN, LayerKind.ROW, LayerKind.ROW_SPLIT)
    }
    place = failure.where
    while True:
        scope = generic_name(place)
        inside = [
            name
            for name in cut
            if not scope or generic_name(name) == scope or generic_name(name).startswith(f"{scope}.")
        ]
        if len(inside) >= 2 or (inside and not scope):
            break
        if not place:
            return _heal_rest(stubbed, decisions, failure)
        place = place.rpartition(".")[0]
    for name in inside:
        decisions.roles[cut[name]] = independent_role(cut[name], num_ranks, reason=failure.message)
    prefix = f"{scope}." if scope else ""
    decisions.attributes = [
        patch for patch in decisions.attributes if not f"{generic_name(patch.module)}.".startswith(prefix)
    ]
    decisions.tensors = {
        name: cut_plan for name, cut_plan in decisions.tensors.items() if not generic_name(name).startswith(prefix)
    }
    decisions.shape_rules = {
        name: rules for name, rules in decisions.shape_rules.items() if not f"{generic_name(name)}.".startswith(prefix)
    }
    decisions.notes.append(f"{scope or 'model'}: gathered ({failure.message})")
    return True


def _heal_rest(stubbed: StubbedModel, decisions: Decisions, failure: VerificationFailure) -> bool:
    """Nothing is cut along a block any more: the layer that failed stays whole, then everything does."""
    anatomy = stubbed.anatomy
    module = anatomy.modules.get(failure.where)
    done = replicated(f"not cut: {failure.message}")
    layers = {*anatomy.linears, *anatomy.embeddings, *anatomy.attentions, *anatomy.experts}
    whole = {layer for layer, role in decisions.roles.items() if role.kind is LayerKind.REPLICATED}
    targets = {module} if module in layers and module not in whole else layers - whole
    for target in targets:
        decisions.roles[target] = done
        prefix = f"{anatomy.names[target]}."
        for name in [name for name in decisions.expert_cuts if name.startswith(prefix)]:
            del decisions.expert_cuts[name]
    return bool(targets)
