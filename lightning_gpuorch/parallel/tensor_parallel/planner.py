"""Finds a plan for any model: layers are paired, blocks cut, every rank run, and what agrees is kept."""

from __future__ import annotations

import dataclasses

from torch import nn

from lightning_gpuorch.parallel.tensor_parallel.assemble import Decisions, replicated
from lightning_gpuorch.parallel.tensor_parallel.dependencies import Dependencies, Pair, Signature, analyze
from lightning_gpuorch.parallel.tensor_parallel.experts import plan_experts
from lightning_gpuorch.parallel.tensor_parallel.hidden_weight import WeightReadDirectly
from lightning_gpuorch.parallel.tensor_parallel.plan import AttributePatch, LayerKind, LayerPlan, generic_name
from lightning_gpuorch.parallel.tensor_parallel.records import Deviation, LocalPlan
from lightning_gpuorch.parallel.tensor_parallel.search import Block, BlockSearch, Solution
from lightning_gpuorch.parallel.tensor_parallel.shape_rules import index_rules
from lightning_gpuorch.parallel.tensor_parallel.stubs import StubbedModel

MAX_CUT_EMBEDDING_ROWS = 4096
"""An embedding with more rows is a vocabulary and is cut by rows; a smaller one may be a table of per-head biases."""


def probe(stubbed: StubbedModel, num_ranks: int) -> Decisions:
    """Plan a model by probing.

    Args:
        stubbed: The model, with its reference run recorded.
        num_ranks: Number of ranks.

    Returns:
        Decisions that passed a local run of the whole model on every rank.
    """
    dependencies = analyze(stubbed, stubbed.reference, num_ranks)
    search = BlockSearch(stubbed, num_ranks)
    decisions = Decisions(notes=list(dependencies.notes))
    solutions, failed = [], []
    for block in _blocks(stubbed, dependencies):
        solution, problem = search.solve(block)
        if solution is None:
            failed.append((block, problem))
        else:
            solutions.append(solution)
    _keep_compatible(stubbed, solutions, num_ranks, decisions)
    for block, problem in failed:
        if any(pair.consumer not in decisions.roles for pair in block.pairs):  # not cut as part of another block either
            decisions.notes.append(f"{block.name}: gathered, no cut passed ({problem})")
    decide_whole_layers(stubbed, decisions)
    return decisions


def decide_experts(stubbed: StubbedModel, num_ranks: int, decisions: Decisions) -> None:
    """Cut the fused experts of a model, each kind once."""
    by_kind: dict[Signature, dict[str, object] | None] = {}
    anatomy = stubbed.anatomy
    for module in anatomy.experts:
        if module not in stubbed.stubbed:
            continue
        signature = anatomy.signature(module)
        if signature not in by_kind and module in stubbed.reference.layer_arguments:
            by_kind[signature] = plan_experts(module, stubbed.reference.layer_arguments[module], num_ranks)  # type: ignore[assignment]
    for module in anatomy.experts:
        cuts = by_kind.get(anatomy.signature(module)) if module in stubbed.stubbed else None
        if cuts:
            name = anatomy.names[module]
            decisions.roles[module] = LayerPlan(LayerKind.EXPERTS, source="handler")
            decisions.expert_cuts.update({f"{name}.{key}" if name else key: cut for key, cut in cuts.items()})  # type: ignore[misc]


def decide_whole_layers(stubbed: StubbedModel, decisions: Decisions) -> None:
    """Decide which layers stay whole: weights that other code reads, layers the example does not reach."""
    called = stubbed.reference.called
    anatomy = stubbed.anatomy
    called_kinds = {anatomy.signature(module) for module in called}
    # A weight that a called layer shares was watched during the run, so the layers that share it may cut it alike.
    watched = {id(parameter) for module in called for parameter in module.parameters()}
    for attention in anatomy.attentions:
        if attention in stubbed.read_directly:
            decisions.roles[attention] = replicated("it drops out at random, in train mode")
    for module in (*anatomy.linears, *anatomy.embeddings):
        if module in stubbed.read_directly:
            prefix = f"{anatomy.names[module]}."
            cut = any(name.startswith(prefix) for name in decisions.tensors)
            reason = "its weight is read by other code"
            decisions.roles[module] = LayerPlan(LayerKind.LOCAL, reason=reason) if cut else replicated(reason)
        elif module in called or id(module.weight) in watched:
            continue
        elif anatomy.signature(module) not in called_kinds:
            decisions.roles[module] = replicated("not reached with the example input")


def _blocks(stubbed: StubbedModel, dependencies: Dependencies) -> list[Block]:
    """Join pairs that share producers, after dropping producers that others need whole."""
    tied = {name for group in stubbed.anatomy.ties for name in group}
    modules = {stubbed.anatomy.signature(module): module for module in stubbed.stubbed}

    def needed_whole(signature: Signature) -> bool:
        feeds = {pair.signature for pair in pairs if signature in pair.partitions[0].producers}
        module = modules[signature]
        vocabulary = isinstance(module, nn.Embedding) and (
            module.num_embeddings > MAX_CUT_EMBEDDING_ROWS
            or module.max_norm is not None
            or f"{stubbed.anatomy.names[module]}.weight" in tied
        )
        return bool(dependencies.consumers_of[signature] - feeds) or signature in dependencies.visible or vocabulary

    pairs = list(dependencies.pairs)
    changed = True
    while changed:
        changed = False
        for pair in list(pairs):
            for partition in pair.partitions:
                for signature in list(partition.producers):
                    if needed_whole(signature):
                        del partition.producers[signature]
                        partition.broadcast.add(signature)
                        changed = True
            pair.partitions = [partition for partition in pair.partitions if partition.producers]
            if not pair.partitions:
                pairs.remove(pair)
                changed = True
    blocks: list[list[Pair]] = []
    for pair in pairs:
        sharing = [block for block in blocks if any(_share_producer(pair, other) for other in block)]
        joined = [other for block in sharing for other in block] + [pair]
        blocks = [block for block in blocks if block not in sharing] + [joined]
    return [Block(block) for block in blocks]


def _share_producer(first: Pair, second: Pair) -> bool:
    return bool(set(first.partitions[0].producers) & set(second.partitions[0].producers))


def _keep_compatible(stubbed: StubbedModel, solutions: list[Solution], num_ranks: int, decisions: Decisions) -> None:
    """Run all solutions together on every rank; drop the one to blame until they agree."""
    kept = list(solutions)
    while True:
        merged, clash = _merge(kept)
        if clash is None:
            local = LocalPlan(merged.roles, merged.tensors, merged.attributes, merged.shape_rules)
            try:
                for rank in range(num_ranks):
                    stubbed.run_local(local, rank)
            except (Deviation, WeightReadDirectly) as deviation:
                clash = _blame(stubbed, deviation, kept)
                problem = str(deviation)
            else:
                break
        else:
            problem = "it would cut a layer that another block cuts differently"
        if clash is None:
            decisions.notes.append(f"everything is gathered: the cut blocks do not work together ({problem})")
            return
        kept.remove(clash)
        decisions.notes.append(f"{clash.block.name}: gathered ({problem})")
    notes = decisions.notes
    for field in dataclasses.fields(Decisions):
        setattr(decisions, field.name, getattr(merged, field.name))
    decisions.notes = notes


def _merge(solutions: list[Solution]) -> tuple[Decisions, Solution | None]:
    merged = Decisions()
    attributes: dict[tuple[str, str], AttributePatch] = {}
    for solution in solutions:
        own = solution.decisions
        if any(merged.roles.get(module, role) != role for module, role in own.roles.items()):
            return merged, solution
        if any(merged.tensors.get(name, cut) != cut for name, cut in own.tensors.items()):
            return merged, solution
        patches = {(patch.module, patch.attribute): patch for patch in own.attributes}
        if any(attributes.get(place, patch) != patch for place, patch in patches.items()):
            return merged, solution
        for scope, rules in own.shape_rules.items():
            known, new = index_rules(merged.shape_rules.get(scope, ())), index_rules(rules)
            if any(known.get(key, rule) != rule for key, rule in new.items()):
                return merged, solution
            merged.shape_rules[scope] = tuple({**known, **new}.values())
        merged.roles.update(own.roles)
        merged.tensors.update(own.tensors)
        attributes.update(patches)
    merged.attributes = list(attributes.values())
    return merged, None


def _blame(stubbed: StubbedModel, problem: Exception, solutions: list[Solution]) -> Solution | None:
    """Find the solution a deviation belongs to: by the layer where it showed, else by the module that raised."""
    layer = getattr(problem, "layer", "") or str(problem).split(":")[0]
    for solution in reversed(solutions):
        if any(stubbed.anatomy.names[module] == layer for module in solution.decisions.roles):
            return solution
    place = generic_name(layer)
    inside = [
        solution
        for solution in solutions
        if solution.scope and (f"{place}.").startswith(f"{generic_name(solution.scope)}.")
    ]
    return (inside or solutions or [None])[-1]  # type: ignore[list-item]
