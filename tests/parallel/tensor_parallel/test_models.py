"""Every style of model: planned, sharded over threads that stand for ranks, equal to the whole model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import tp_models
from torch import nn
from tp_models import EXAMPLES, Network, build, hidden, randomized, with_random_names
from tp_ranks import relative_error, sharded_outputs

from lightning_gpuorch.parallel.tensor_parallel import LayerKind, plan_tensor_parallel, verify_plan
from lightning_gpuorch.parallel.tensor_parallel.values import tensors_within

CASES = [(name, num_ranks) for name in EXAMPLES for num_ranks in (2, 3)]
CASES += [(name, 4) for name in ("separate", "grouped", "packed_grouped", "multi_query", "nn_transformer")]
GATHERED = {LayerKind.COLUMN_GATHER, LayerKind.ROW_SPLIT}


def assert_equal_to_whole(model: nn.Module, inputs: tuple[Any, ...], plan: Any) -> None:
    with torch.no_grad():
        expected = list(tensors_within(model(*inputs)))
    for outputs in sharded_outputs(model, plan, lambda part: model_call(part, inputs)):
        values = list(tensors_within(outputs))
        assert len(values) == len(expected)
        for value, whole in zip(values, expected, strict=True):
            assert relative_error(value, whole) < 1e-5


def model_call(part: nn.Module, inputs: tuple[Any, ...]) -> Any:
    return part(*inputs)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize(("name", "num_ranks"), CASES)
def test_sharded_equals_whole(name: str, num_ranks: int) -> None:
    model, inputs = build(name)
    plan = plan_tensor_parallel(model, inputs, num_ranks)
    assert_equal_to_whole(model, inputs, plan)
    gathered = [layer for layer, role in plan.layers.items() if role.kind in GATHERED]
    if EXAMPLES[name].cut:
        assert set(gathered) <= {"lm_head"}, plan.describe()
        assert plan.sharded_fraction > EXAMPLES[name].min_sharded, plan.describe()
    else:
        assert gathered


MIXERS = [
    "Separate",
    "PackedThirds",
    "PackedStacked",
    "PackedPerHead",
    "HardCoded",
    "Grouped",
    "PackedGrouped",
    "MultiQuery",
]
MIXERS += ["Einsum", "RelativeTable", "Slopes", "LinearAttention", "StateSpace", "ParallelBlock", "GatedPairs"]


@pytest.mark.parametrize("mixer", MIXERS)
def test_names_do_not_matter(mixer: str) -> None:
    original = getattr(tp_models, mixer)
    renamed = with_random_names(original, seed=3)
    assert not set(dict(renamed().named_children())) & set(dict(original().named_children()))
    for num_ranks in (2, 3):
        plans = []
        for cls in (original, renamed):
            model = randomized(Network(cls))
            plans.append(plan_tensor_parallel(model, hidden(), num_ranks))
            assert_equal_to_whole(model, (hidden(),), plans[-1])
        expected, found = (sorted(role.kind.value for role in plan.layers.values()) for plan in plans)
        assert found == expected
        assert "column_gather" not in found


def test_blocks_without_common_names() -> None:
    class Flat(nn.Module):
        """Blocks held under unrelated names, so that no two layers look like siblings."""

        def __init__(self) -> None:
            super().__init__()
            for index, cls in enumerate((tp_models.Separate, tp_models.PackedThirds, tp_models.Mlp, tp_models.Grouped)):
                self.add_module("abcd"[index] * (index + 1), cls())
            self.norm = nn.LayerNorm(tp_models.WIDTH)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for name in ("a", "bb", "ccc", "dddd"):
                x = x + getattr(self, name)(self.norm(x))
            return x

    model = randomized(Flat())
    plan = plan_tensor_parallel(model, hidden(), 2)
    assert_equal_to_whole(model, (hidden(),), plan)
    assert {role.kind for role in plan.layers.values()} == {LayerKind.COLUMN, LayerKind.ROW}


class KeepsState(tp_models.Separate):
    """Keeps a mask, a counter and a position between calls, as much real code does."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("position", torch.zeros((), dtype=torch.long), persistent=False)
        self.mask: torch.Tensor | None = None
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, n, _ = x.shape
        if self.mask is None:
            self.mask = torch.zeros(1, self.num_heads, n, n)
        self.position += n
        self.calls += 1
        shape = (b, n, self.num_heads, self.head_dim)
        q, k, v = (f(x).view(shape).transpose(1, 2) for f in (self.query, self.key, self.value))
        return self.out(tp_models.attend(q, k, v, self.mask).transpose(1, 2).reshape(b, n, -1))


def test_state_of_planning_runs_is_not_kept() -> None:
    model = randomized(Network(KeepsState))
    plan = plan_tensor_parallel(model, hidden(), 2)
    assert plan.layers["mixers.0.out"].kind is LayerKind.ROW
    for mixer in model.mixers:  # type: ignore[union-attr]
        assert mixer.mask is None
        assert mixer.calls == 0
        assert mixer.position == 0
    fresh = randomized(Network(KeepsState))
    with torch.no_grad():
        expected = fresh(hidden())
    for output in sharded_outputs(model, plan, lambda part: part(hidden())):
        assert relative_error(output, expected) < 1e-5


def test_layers_with_a_forward_on_the_instance_stay_whole() -> None:
    model = randomized(Network(tp_models.Separate))
    layer = model.get_submodule("mixers.0.query")
    original = layer.forward
    layer.forward = lambda x: original(x) * 2  # type: ignore[method-assign]
    plan = plan_tensor_parallel(model, hidden(), 2)
    assert "mixers.0.query" not in plan.layers
    assert plan.parameters["mixers.0.query.weight"].dim is None
    with torch.no_grad():
        expected = model(hidden())
    layer.__dict__.pop("forward")
    plain = plan_tensor_parallel(model, hidden(), 2)
    layer.forward = lambda x: original(x) * 2  # type: ignore[method-assign]
    report = verify_plan(model, plain, hidden())
    assert "mixers.0.query has a forward of its own" in str(report.failures[0])
    assert expected.isfinite().all()


class InPlace(nn.Module):
    """Adds to the residual stream in place, after layers have been given it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = tp_models.Mlp(), tp_models.Mlp()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.clone()
        x += self.first(x)
        x += self.second(x)
        return x


def test_changes_in_place() -> None:
    model = randomized(InPlace())
    plan = plan_tensor_parallel(model, hidden(), 2)
    assert {role.kind for role in plan.layers.values()} == {LayerKind.COLUMN, LayerKind.ROW}
    assert_equal_to_whole(model, (hidden(),), plan)
