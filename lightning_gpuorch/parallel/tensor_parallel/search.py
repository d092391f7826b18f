"""Finds the attributes that change with the cut, one block at a time, until a local run agrees on every rank.

A block's forward often holds sizes: ``self.num_heads``, ``self.embed_dim``, ``config.num_key_value_heads``, or plain
numbers in a ``view``. The search knows no attribute's name: candidates are the attributes the forward was seen to read
whose value is one of the sizes that the cut changes. A combination counts only if, on every rank, every layer of the
block receives exactly its slice.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from lightning_gpuorch.parallel.tensor_parallel.assemble import Decisions
from lightning_gpuorch.parallel.tensor_parallel.dependencies import Pair, Partition, Signature
from lightning_gpuorch.parallel.tensor_parallel.hidden_weight import WeightReadDirectly
from lightning_gpuorch.parallel.tensor_parallel.intervals import RankIntervals, length, union
from lightning_gpuorch.parallel.tensor_parallel.layers import features
from lightning_gpuorch.parallel.tensor_parallel.plan import (
    AttributePatch,
    LayerKind,
    LayerPlan,
    ParameterPlan,
    ShapeRule,
    dtype_name,
)
from lightning_gpuorch.parallel.tensor_parallel.records import Deviation, LocalPlan
from lightning_gpuorch.parallel.tensor_parallel.shape_rules import RuleSearch, ShapeRuleMode
from lightning_gpuorch.parallel.tensor_parallel.stubs import StubbedModel

MAX_COMBINATIONS = 300
MAX_COMBINED_ATTRIBUTES = 7
MAX_RULE_ATTEMPTS = 12
"""How many combinations of the sizes in hard-coded calls are tried as those that the cut changes."""


@dataclasses.dataclass
class Block:
    """Pairs that share producers and so are cut together.

    Attributes:
        pairs: The pairs.
    """

    pairs: list[Pair]

    @property
    def name(self) -> str:
        """The consumers' generic names."""
        return " + ".join(str(pair.signature[0]) for pair in self.pairs)

    def options(self) -> list[list[Partition]]:
        """Ways to cut the block: each pair's alternatives if it stands alone, else the first of each."""
        if len(self.pairs) == 1:
            return [[partition] for partition in self.pairs[0].partitions]
        firsts = [[pair.partitions[0] for pair in self.pairs]]
        if any(len(pair.partitions) > 1 for pair in self.pairs):
            firsts.append([pair.partitions[-1] for pair in self.pairs])
        return firsts


@dataclasses.dataclass
class Solution:
    """A block's cut that passed the local runs.

    Attributes:
        block: The block.
        roles: Roles by signature.
        decisions: The same for every instance of the block, with attributes, tensors and rules.
        scope: Name of the module that was replayed.
    """

    block: Block
    roles: dict[Signature, LayerPlan]
    decisions: Decisions
    scope: str


class BlockSearch:
    """Finds solutions for blocks of one model.

    Args:
        stubbed: The model, with its reference run recorded.
        num_ranks: Number of ranks.
    """

    def __init__(self, stubbed: StubbedModel, num_ranks: int) -> None:
        self.stubbed, self.anatomy, self.num_ranks = stubbed, stubbed.anatomy, num_ranks
        self.instances: dict[Signature, list[nn.Module]] = {}
        for module in stubbed.stubbed:
            self.instances.setdefault(self.anatomy.signature(module), []).append(module)
        self.first_called: dict[Signature, nn.Module] = {}
        for call in stubbed.reference.calls:
            self.first_called.setdefault(self.anatomy.signature(call.module), call.module)

    def solve(self, block: Block) -> tuple[Solution | None, str]:
        """Search a cut of the block; the text says what went wrong last if there is none."""
        problem = "no way to cut it"
        for option in block.options():
            merged = self._merge(block, option)
            if merged is None:
                problem = "its layers need different cuts of one tensor"
                continue
            roles, tensors = merged
            consumers = [pair.consumer for pair in block.pairs]
            members = consumers + [self.first_called[signature] for signature in roles]
            scope = self._scope(members)
            sizes, ratios = self._local_sizes(block, option, roles)
            candidates = self._candidates(sizes, ratios, scope, members, block)
            for attempt in (None, *range(MAX_RULE_ATTEMPTS)):
                num_attempts = 0
                for patches in itertools.islice(_combinations(candidates), MAX_COMBINATIONS):
                    rules = None if attempt is None else RuleSearch(sizes, attempt)
                    solution, problem = self._try(block, roles, tensors, patches, scope, rules)
                    if solution is not None:
                        return solution, ""
                    num_attempts = max(num_attempts, 0 if rules is None else rules.num_attempts)
                if attempt is not None and attempt + 1 >= num_attempts:
                    break
        return None, problem

    # -- one attempt --------------------------------------------------------------------------------------------------

    def _try(
        self,
        block: Block,
        roles: dict[Signature, LayerPlan],
        tensors: Mapping[str, tuple[int, RankIntervals]],
        patches: Sequence[AttributePatch],
        scope: nn.Module,
        search: RuleSearch | None,
    ) -> tuple[Solution | None, str]:
        scope_name = self.anatomy.names[scope]
        decisions = self.expand(block, roles, tensors, patches, scope_name, ())
        local = LocalPlan(decisions.roles, decisions.tensors, decisions.attributes)
        target = None if scope is self.anatomy.model else scope
        try:
            for rank in range(self.num_ranks):
                mode = None if search is None else ShapeRuleMode({}, rank, search)
                called = self.stubbed.run_local(local, rank, target, mode)
                if not all(pair.consumer in called for pair in block.pairs):
                    return None, "the consumer was not reached"
        except (Deviation, WeightReadDirectly) as deviation:
            return None, str(deviation)
        decisions = self.expand(block, roles, tensors, patches, scope_name, search.rules if search else ())
        return Solution(block, roles, decisions, scope_name), ""

    def expand(
        self,
        block: Block,
        roles: Mapping[Signature, LayerPlan],
        tensors: Mapping[str, tuple[int, RankIntervals]],
        patches: Sequence[AttributePatch],
        scope: str,
        rules: tuple[ShapeRule, ...],
    ) -> Decisions:
        """Carry a cut found on the first block over to all blocks of its kind."""
        decisions = Decisions()
        for signature, role in roles.items():
            decisions.roles.update(dict.fromkeys(self.instances[signature], role))
        reference = self.anatomy.names[block.pairs[0].consumer]
        known: dict[str, torch.Tensor] = dict(self.anatomy.model.named_parameters(remove_duplicate=False))
        known.update(self.anatomy.model.named_buffers(remove_duplicate=False))
        attributes: dict[tuple[str, str], AttributePatch] = {}
        for instance in self.instances[block.pairs[0].signature]:
            name = self.anatomy.names[instance]
            for patch in patches:
                module = _transfer(patch.module, reference, name)
                if module in self.anatomy.modules:
                    attributes[module, patch.attribute] = dataclasses.replace(patch, module=module)
            for tensor, (dim, cuts) in tensors.items():
                place = _transfer(tensor, reference, name)
                if place in known:
                    value = known[place]
                    decisions.tensors[place] = ParameterPlan(tuple(value.shape), dtype_name(value.dtype), dim, cuts)
            if rules:
                decisions.shape_rules[_transfer(scope, reference, name)] = rules
        decisions.attributes = list(attributes.values())
        return decisions

    def _merge(
        self, block: Block, option: list[Partition]
    ) -> tuple[dict[Signature, LayerPlan], dict[str, tuple[int, RankIntervals]]] | None:
        columns: dict[Signature, RankIntervals] = {}
        tensors: dict[str, tuple[int, RankIntervals]] = {}
        for partition in option:
            for signature, cuts in partition.producers.items():
                columns[signature] = _join(columns.get(signature), cuts)
            for name, (dim, cuts) in partition.tensors.items():
                if name in tensors and tensors[name][0] != dim:
                    return None
                tensors[name] = (dim, _join(tensors[name][1] if name in tensors else None, cuts))
        roles = {signature: LayerPlan(LayerKind.COLUMN, cuts) for signature, cuts in columns.items()}
        for pair, partition in zip(block.pairs, option, strict=True):
            if pair.signature in roles:
                return None
            roles[pair.signature] = LayerPlan(LayerKind.ROW, partition.channels)
        return roles, tensors

    def _scope(self, members: Iterable[nn.Module]) -> nn.Module:
        """Nearest common ancestor with a recorded call; the model if there is none."""
        paths = [self.anatomy.names[module].split(".")[:-1] for module in members]
        shared: list[str] = []
        for parts in zip(*paths, strict=False):
            if len(set(parts)) > 1:
                break
            shared.append(parts[0])
        while shared:
            module = self.anatomy.modules.get(".".join(shared))
            if module is not None and module in self.stubbed.reference.scope_calls:
                return module
            shared.pop()
        return self.anatomy.model

    # -- candidates ---------------------------------------------------------------------------------------------------

    def _local_sizes(
        self, block: Block, option: list[Partition], roles: Mapping[Signature, LayerPlan]
    ) -> tuple[dict[int, tuple[int, ...]], dict[int, tuple[int, ...]]]:
        """Sizes that the cut changes, whole to local by rank; and ratios (query heads per key/value head) alike."""
        sizes: dict[int, tuple[int, ...]] = {}
        ratios: dict[int, tuple[int, ...]] = {}

        def note(whole: int, local: Iterable[int], into: dict[int, tuple[int, ...]]) -> None:
            by_rank = tuple(local)
            if whole > 1 and any(value != whole for value in by_rank):
                into.setdefault(whole, by_rank)

        for pair, partition in zip(block.pairs, option, strict=True):
            channels = [length(own) for own in partition.channels]
            units = [count // pair.unit for count in channels]
            note(pair.num_units, units, sizes)
            note(pair.num_channels, channels, sizes)
            for signature in partition.producers:
                whole = features(self.first_called[signature])[1]
                local = [length(own) for own in roles[signature].intervals]
                note(whole, local, sizes)
                if whole % pair.unit == 0 and all(count and count % pair.unit == 0 for count in local):
                    heads, own_heads = whole // pair.unit, [count // pair.unit for count in local]
                    note(heads, own_heads, sizes)
                    if pair.num_units % heads == 0 and all(a % b == 0 for a, b in zip(units, own_heads, strict=True)):
                        ratio = [a // b for a, b in zip(units, own_heads, strict=True)]
                        note(pair.num_units // heads, ratio, ratios)
            for signature in partition.broadcast:  # replicated key/value heads: only the ratio changes
                whole = features(self.first_called[signature])[1]
                heads = whole // pair.unit
                divides = whole % pair.unit == 0 and heads > 0 and pair.num_units % heads == 0
                if divides and all(count % heads == 0 for count in units):
                    note(pair.num_units // heads, [count // heads for count in units], ratios)
            divisors = range(2, pair.num_units) if pair.unit > 1 else ()
            for divisor in divisors:  # key/value heads, or their width, inside a packed projection
                if pair.num_units % divisor == 0 and all(count * divisor % pair.num_units == 0 for count in units):
                    share = [count * divisor // pair.num_units for count in units]
                    note(divisor, share, sizes)
                    note(divisor * pair.unit, [count * pair.unit for count in share], sizes)
        return sizes, ratios

    def _candidates(
        self,
        sizes: Mapping[int, tuple[int, ...]],
        ratios: Mapping[int, tuple[int, ...]],
        scope: nn.Module,
        members: Sequence[nn.Module],
        block: Block,
    ) -> list[tuple[int, AttributePatch]]:
        """List ``(priority, patch)``: what the block's code reads and the cut changes."""
        heads = {pair.num_units for pair in block.pairs} | {pair.num_channels for pair in block.pairs}
        found: list[tuple[int, AttributePatch]] = []
        for module in self._glue(scope, members):
            name = self.anatomy.names[module]
            for attribute in sorted(self.stubbed.attributes_read.get(module, ())):
                value = module.__dict__.get(attribute)
                for priority, local in _local_values(value, sizes, ratios, heads):
                    found.append((priority, AttributePatch(name, attribute, local, _whole(value))))
                fields = getattr(value, "__dict__", None)
                if fields is None or isinstance(value, nn.Module) or callable(value):
                    continue
                for field, inner in fields.items():
                    if field.startswith("_") or field not in self.stubbed.fields_read.get(id(value), fields):
                        continue
                    for priority, local in _local_values(inner, sizes, ratios, heads):
                        patch = AttributePatch(name, f"{attribute}.{field}", local, _whole(inner))
                        found.append((priority + 4, patch))
        return sorted(found, key=lambda entry: entry[0])

    def _glue(self, scope: nn.Module, members: Iterable[nn.Module]) -> list[nn.Module]:
        """Modules between the scope and the members, and their children that hold no layers."""
        scope_name = self.anatomy.names[scope]
        chain: dict[nn.Module, None] = {}
        for member in members:
            name = self.anatomy.names[member]
            while name and name != scope_name:
                name = name.rpartition(".")[0]
                chain[self.anatomy.modules[name]] = None
        for module in list(chain):
            for child in module.children():
                if child in self.anatomy.names and not any(part in self.stubbed.stubbed for part in child.modules()):
                    chain.update(dict.fromkeys(child.modules()))
        return [module for module in chain if module in self.anatomy.names]


def _whole(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _local_values(
    value: Any, sizes: Mapping[int, tuple[int, ...]], ratios: Mapping[int, tuple[int, ...]], likely: set[int]
) -> Iterator[tuple[int, tuple[Any, ...]]]:
    if type(value) is int:
        if value in sizes:
            yield (0 if value in likely else 1), sizes[value]
        if value in ratios:
            yield 1, ratios[value]
    elif isinstance(value, (tuple, list)) and all(type(item) is int for item in value):
        if not any(item in sizes for item in value):
            return
        num_ranks = len(next(iter(sizes.values())))
        columns = [sizes.get(item, (item,) * num_ranks) for item in value]
        yield 2, tuple(tuple(row) for row in zip(*columns, strict=True))


def _combinations(candidates: Sequence[tuple[int, AttributePatch]]) -> Iterator[list[AttributePatch]]:
    """Yield selections, likely ones first: all of the likely, none, all, then every subset, larger ones first."""
    seen: set[frozenset[int]] = set()

    def emit(indices: Iterable[int]) -> Iterator[list[AttributePatch]]:
        chosen = frozenset(indices)
        places = {(candidates[index][1].module, candidates[index][1].attribute) for index in chosen}
        if chosen not in seen and len(places) == len(chosen):
            seen.add(chosen)
            yield [candidates[index][1] for index in sorted(chosen)]

    for limit in (0, 1, -1, 2, 3):
        yield from emit(index for index, (priority, _) in enumerate(candidates) if priority <= limit)
    plain = [index for index, (priority, _) in enumerate(candidates) if priority < 4][:MAX_COMBINED_ATTRIBUTES]
    for size in range(len(plain), 0, -1):
        for chosen in itertools.combinations(plain, size):
            yield from emit(chosen)
    mixed = range(min(len(candidates), MAX_COMBINED_ATTRIBUTES + 1))
    for size in range(1, len(mixed) + 1):
        for chosen in itertools.combinations(mixed, size):
            yield from emit(chosen)


def _join(first: RankIntervals | None, second: RankIntervals) -> RankIntervals:
    return second if first is None else tuple(union(a, b) for a, b in zip(first, second, strict=True))


def _transfer(name: str, reference: str, instance: str) -> str:
    """Carry a name seen next to ``reference`` over to the same place next to ``instance``."""
    parts = name.split(".")
    for index, (part, old, new) in enumerate(zip(list(parts), reference.split("."), instance.split("."), strict=False)):
        if part != old:
            break
        parts[index] = new
    return ".".join(parts)
