"""The verifier accepts what is right and nothing else: judged against runs of the sharded models."""

from __future__ import annotations

import dataclasses
import random
import sys
from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn
from tp_models import HEADS, WIDTH, Network, PackedThirds, Separate, StateSpace, build, hidden, randomized
from tp_ranks import relative_error, sharded_outputs

from lightning_gpuorch.errors import TensorParallelError
from lightning_gpuorch.parallel.tensor_parallel import (
    LayerKind,
    LayerPlan,
    ParameterPlan,
    TensorParallelPlan,
    plan_tensor_parallel,
    verify_plan,
)
from lightning_gpuorch.parallel.tensor_parallel.anatomy import layer_parameters
from lightning_gpuorch.parallel.tensor_parallel.intervals import from_indices, indices_of, split_evenly
from lightning_gpuorch.parallel.tensor_parallel.values import tensors_within

MODELS = ["separate", "packed_thirds", "packed_stacked", "packed_per_head", "hard_coded", "grouped", "packed_grouped"]
MODELS += ["multi_query", "einsum", "relative_table", "slopes", "configured", "linear_attention", "talking_heads"]
MODELS += ["parallel_block", "listed_experts", "interleaved_experts", "language", "state_space", "nn_encoder"]
PLANS_PER_MODEL = 5


def mutate(model: nn.Module, plan: TensorParallelPlan, chooser: random.Random) -> TensorParallelPlan:
    """Break a plan, or change it into another right one: the run decides which it was."""
    modules = dict(model.named_modules())
    size = plan.tensor_parallel_size
    layers, parameters = dict(plan.layers), dict(plan.parameters)

    def set_role(name: str, role: LayerPlan) -> None:
        layers[name] = role
        prefix = f"{name}." if name else ""
        parameters.update({prefix + key: cut for key, cut in layer_parameters(modules[name], role).items()})

    plain = [name for name in layers if isinstance(modules[name], nn.Linear)]
    kind = chooser.choice(
        ["role", "role", "shuffle", "rotate", "attribute", "value", "block", "even", "tensor", "rule"]
    )
    if kind == "attribute" and plan.attributes:
        victim = chooser.choice(plan.attributes)
        return dataclasses.replace(plan, attributes=tuple(patch for patch in plan.attributes if patch != victim))
    if kind == "value" and plan.attributes:
        victim = chooser.choice(plan.attributes)
        values = tuple(
            value if isinstance(value, tuple) else max(1, value + chooser.choice([-1, 1, value]))
            for value in victim.values
        )
        patches = tuple(dataclasses.replace(p, values=values) if p == victim else p for p in plan.attributes)
        return dataclasses.replace(plan, attributes=patches)
    if kind == "rule" and plan.shape_rules:
        scope = chooser.choice(sorted(plan.shape_rules))
        rest = {key: rules for key, rules in plan.shape_rules.items() if key != scope}
        return dataclasses.replace(plan, shape_rules=rest)
    extra = [name for name, cut in parameters.items() if cut.dim is not None and name.rpartition(".")[0] not in layers]
    if kind == "tensor" and extra:
        name = chooser.choice(extra)
        cut = parameters[name]
        intervals = tuple(reversed(cut.intervals)) if chooser.random() < 0.5 else ()
        changed = dataclasses.replace(cut, intervals=intervals, dim=cut.dim if intervals else None)
        return dataclasses.replace(plan, parameters={**parameters, name: changed})
    name = chooser.choice(plain)
    linear: Any = modules[name]
    role = layers[name]
    if kind == "rotate" and role.intervals and role.kind in (LayerKind.COLUMN, LayerKind.ROW):
        set_role(name, dataclasses.replace(role, intervals=(*role.intervals[1:], role.intervals[0])))
    elif kind == "shuffle" and role.kind in (LayerKind.COLUMN, LayerKind.ROW):
        # Move a few indices from one rank to another.
        first, second = (set(indices_of(role.intervals[rank])) for rank in (0, 1))
        moved = set(chooser.sample(sorted(first), min(len(first) - 1, 4)))
        swapped = set(chooser.sample(sorted(second), min(len(second) - 1, 4)))
        cuts = [sorted((first - moved) | swapped), sorted((second - swapped) | moved)]
        set_role(name, dataclasses.replace(role, intervals=(*map(from_indices, cuts), *role.intervals[2:])))
    elif kind == "even" and role.kind is LayerKind.COLUMN:
        set_role(name, dataclasses.replace(role, intervals=split_evenly(linear.out_features, size)))
    elif kind == "block":
        # A whole part is gathered while its neighbours are not, often right.
        for other in plain:
            if other.rpartition(".")[0] == name.rpartition(".")[0]:
                set_role(other, LayerPlan(LayerKind.COLUMN_GATHER, split_evenly(modules[other].out_features, size)))  # type: ignore[arg-type]
        prefix = name.rpartition(".")[0]
        kept = tuple(patch for patch in plan.attributes if not patch.module.startswith(prefix))
        if chooser.random() < 0.7:
            plan = dataclasses.replace(plan, attributes=kept)
    else:
        choice = chooser.choice(
            [k for k in LayerKind if k not in (LayerKind.HEADS, LayerKind.EXPERTS, LayerKind.LOCAL)]
        )
        cut = linear.in_features if choice in (LayerKind.ROW, LayerKind.ROW_SPLIT) else linear.out_features
        if choice is LayerKind.VOCABULARY or cut < size:
            choice = LayerKind.REPLICATED
        set_role(name, LayerPlan(choice, () if choice is LayerKind.REPLICATED else split_evenly(cut, size)))
    return dataclasses.replace(plan, layers=layers, parameters=parameters)


def really_right(model: nn.Module, plan: TensorParallelPlan, inputs: tuple[Any, ...]) -> bool:
    with torch.no_grad():
        expected = list(tensors_within(model(*inputs)))
    try:
        results = sharded_outputs(model, plan, lambda part: part(*inputs))
        values = [list(tensors_within(result)) for result in results]
        return all(
            len(own) == len(expected)
            and all(a.shape == b.shape and relative_error(a, b) < 1e-5 for a, b in zip(own, expected, strict=True))
            for own in values
        )
    except Exception:  # noqa: BLE001 - a broken plan may fail in any way
        return False


def judge_plans(name: str, num_plans: int, seed: str = "") -> Counter[tuple[bool, bool]]:
    """Verify and run changed plans of one model; counts ``(accepted, right)``."""
    model, inputs = build(name)
    chooser = random.Random(name + seed)
    verdicts: Counter[tuple[bool, bool]] = Counter()
    for index in range(num_plans):
        size = 2 + index % 2
        plan = plan_tensor_parallel(model, inputs, size)
        for _ in range(chooser.choice([0, 1, 1, 1, 2])):
            plan = mutate(model, plan, chooser)
        accepted, right = verify_plan(model, plan, inputs).ok, really_right(model, plan, inputs)
        assert right or not accepted, f"a broken plan was accepted:\n{plan.describe()}"
        verdicts[accepted, right] += 1
    return verdicts


def test_verdicts_agree_with_runs() -> None:
    """A sample; run this file as a script for more plans: ``python tests/parallel/tensor_parallel/test_verify.py 20``."""
    verdicts = sum((judge_plans(name, PLANS_PER_MODEL) for name in MODELS), Counter[tuple[bool, bool]]())
    assert verdicts[True, True] > len(MODELS)
    assert verdicts[False, False] > len(MODELS)
    # Rejecting a right plan costs speed, not truth; it happens for parts the stubs cannot see, and is rare.
    assert verdicts[False, True] <= verdicts.total() // 10


def separate() -> nn.Module:
    return randomized(Network(Separate))


def test_silent_errors_are_caught() -> None:
    """Plans whose sharded run neither raises nor has another shape, only other numbers."""
    model = randomized(Network(PackedThirds))
    plan = plan_tensor_parallel(model, hidden(), 2)
    name = "mixers.0.c_attn"
    naive = LayerPlan(LayerKind.COLUMN, split_evenly(3 * WIDTH, 2))  # query, key and value torn apart
    parameters = {f"{name}.{key}": cut for key, cut in layer_parameters(model.get_submodule(name), naive).items()}
    broken = dataclasses.replace(
        plan, layers={**plan.layers, name: naive}, parameters={**plan.parameters, **parameters}
    )
    outputs = sharded_outputs(model, broken, lambda part: part(hidden()))
    assert outputs[0].shape == model(hidden()).shape
    assert not really_right(model, broken, (hidden(),))
    report = verify_plan(model, broken, hidden())
    assert report.failures[0].where == "mixers.0.c_proj"
    with pytest.raises(TensorParallelError, match=r"mixers\.0\.c_proj: input has values differ"):
        report.raise_for_failures()


def test_wrong_plans_are_named() -> None:
    model = separate()
    plan = plan_tensor_parallel(model, hidden(), 2)
    other = randomized(Network(StateSpace))
    report = verify_plan(other, plan, hidden())
    assert "does not exist" in str(report.failures[0]) or "is not planned for" in str(report.failures[0])
    role = LayerPlan(LayerKind.ROW, (((0, 40),), ((32, 64),)))
    overlapping = dataclasses.replace(plan, layers={**plan.layers, "mixers.0.out": role})
    assert "tile" in str(verify_plan(model, overlapping, hidden()).failures[0])
    shape = dataclasses.replace(plan.parameters["head.weight"], shape=(10, 99))
    wrong_shape = dataclasses.replace(plan, parameters={**plan.parameters, "head.weight": shape})
    assert "(10, 64), the plan is for (10, 99)" in str(verify_plan(model, wrong_shape, hidden()).failures[0])


def test_layers_the_example_does_not_reach_are_not_cut() -> None:
    class Optional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = Separate(), PackedThirds()

        def forward(self, x: torch.Tensor, extra: bool = False) -> torch.Tensor:
            return self.unused(self.used(x)) if extra else self.used(x)

    model = randomized(Optional())
    plan = plan_tensor_parallel(model, hidden(), 2)
    assert plan.layers["unused.c_attn"].kind is LayerKind.REPLICATED
    assert "not reached" in plan.layers["unused.c_attn"].reason
    full = plan_tensor_parallel(model, hidden(), 2, example_kwargs={"extra": True})
    assert full.layers["unused.c_attn"].kind is LayerKind.COLUMN
    report = verify_plan(model, full, hidden())
    assert any("does not reach" in str(failure) for failure in report.failures)


def test_tied_parameters_must_agree() -> None:
    model, inputs = build("language")
    plan = plan_tensor_parallel(model, inputs, 2)
    assert plan.parameters["lm_head.weight"] == plan.parameters["embed.weight"]
    whole = ParameterPlan(plan.parameters["embed.weight"].shape)
    broken = dataclasses.replace(plan, parameters={**plan.parameters, "lm_head.weight": whole})
    assert "tied" in str(verify_plan(model, broken, inputs).failures[0])


def test_outputs_of_another_shape_are_refused() -> None:
    class Maps(Separate):
        """Also returns its attention map, of which a rank would have its heads only."""

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
            b, n, _ = x.shape
            shape = (b, n, self.num_heads, WIDTH // HEADS)
            q, k, v = (f(x).view(shape).transpose(1, 2) for f in (self.query, self.key, self.value))
            weights = (q @ k.transpose(-1, -2)).softmax(-1)
            return self.out((weights @ v).transpose(1, 2).reshape(b, n, -1)), weights

    model = randomized(Maps())
    plan = plan_tensor_parallel(model, hidden(), 2)
    assert plan.layers["query"].kind is LayerKind.COLUMN_GATHER
    with torch.no_grad():
        expected = model(hidden())
    for output in sharded_outputs(model, plan, lambda part: part(hidden())):
        assert relative_error(output[0], expected[0]) < 1e-5
        assert relative_error(output[1], expected[1]) < 1e-5


if __name__ == "__main__":
    torch.set_num_threads(1)
    totals = sum((judge_plans(name, int(sys.argv[1]), "script") for name in MODELS), Counter[tuple[bool, bool]]())
    print({f"accepted={accepted} right={right}": count for (accepted, right), count in totals.items()})
