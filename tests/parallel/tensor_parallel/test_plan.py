"""Intervals and plans as data: properties, text, JSON, arithmetic. No processes, hardly a tensor."""

from __future__ import annotations

import dataclasses
import itertools
import json
import subprocess
import sys
from collections import namedtuple
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tp_models import EXAMPLES, Language, Network, Separate, build, hidden, randomized, tokens
from tp_ranks import relative_error, sharded_outputs

import lightning_gpuorch.parallel.tensor_parallel as room
from lightning_gpuorch.errors import TensorParallelError
from lightning_gpuorch.parallel.tensor_parallel import (
    LayerKind,
    LayerPlan,
    ParameterPlan,
    TensorParallelPlan,
    cut_small,
    find_example_input,
    plan_tensor_parallel,
)
from lightning_gpuorch.parallel.tensor_parallel.intervals import (
    covers,
    from_indices,
    from_mask,
    indices_of,
    length,
    shift,
    split_aligned,
    split_evenly,
    take,
    tiles,
    union,
)
from lightning_gpuorch.parallel.tensor_parallel.loading import common_renaming
from lightning_gpuorch.parallel.tensor_parallel.plan import format_bytes, generic_name, local_parameter
from lightning_gpuorch.parallel.tensor_parallel.values import PseudoRandom, difference

index_sets = st.sets(st.integers(0, 200), min_size=1)

# -- intervals ---------------------------------------------------------------------------------------------------------


@given(index_sets)
def test_intervals_hold_exactly_their_indices(indices: set[int]) -> None:
    intervals = from_indices(sorted(indices))
    assert indices_of(intervals) == sorted(indices)
    assert length(intervals) == len(indices)
    assert all(first[1] < second[0] for first, second in itertools.pairwise(intervals))
    mask = torch.zeros(201, dtype=torch.bool)
    mask[sorted(indices)] = True
    assert from_mask(mask) == intervals
    assert indices_of(shift(intervals, 7)) == [index + 7 for index in sorted(indices)]


@given(index_sets, index_sets)
def test_union_is_the_set_union(first: set[int], second: set[int]) -> None:
    joined = union(from_indices(sorted(first)), from_indices(sorted(second)))
    assert set(indices_of(joined)) == first | second


@given(st.integers(1, 16), st.integers(1, 12), st.integers(1, 64))
def test_even_splits_tile_and_differ_by_one_unit(num_ranks: int, unit: int, num_units: int) -> None:
    cuts = split_evenly(num_units * unit, num_ranks, unit)
    sizes = [length(own) for own in cuts]
    assert len(cuts) == num_ranks
    assert max(sizes) - min(sizes) <= unit
    assert all(size % unit == 0 for size in sizes)
    assert tiles(tuple(own if length(own) else () for own in cuts), num_units * unit)


@given(st.integers(1, 8), st.integers(8, 4096))
def test_aligned_splits_tile(num_ranks: int, size: int) -> None:
    cuts = split_aligned(size, num_ranks)
    assert tiles(cuts, size)
    if size % 8 == 0 and size >= 8 * num_ranks:
        assert all(length(own) % 8 == 0 for own in cuts)


@given(st.lists(index_sets, min_size=1, max_size=4), st.integers(1, 201))
def test_tiling_and_covering(parts: list[set[int]], size: int) -> None:
    cuts = tuple(from_indices(sorted(part)) for part in parts)
    counted = sorted(index for part in parts for index in part)
    assert tiles(cuts, size) == (counted == list(range(size)))
    assert covers(cuts, size) == (set(counted) == set(range(size)))


@given(index_sets, st.integers(0, 2))
def test_taking_is_indexing(indices: set[int], dim: int) -> None:
    tensor = torch.arange(3 * 2 * 201).view(3, 2, 201).movedim(2, dim)
    assert torch.equal(
        take(tensor, dim, from_indices(sorted(indices))), tensor.index_select(dim, torch.tensor(sorted(indices)))
    )


# -- plans -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(EXAMPLES))
def test_plans_survive_json(name: str) -> None:
    model, inputs = build(name)
    for num_ranks in (1, 2, 3):
        plan = plan_tensor_parallel(model, inputs, num_ranks)
        restored = TensorParallelPlan.from_dict(json.loads(plan.to_json()))
        assert restored == plan
        assert restored.describe() == plan.describe()
        whole = sum(value.numel() * value.element_size() for value in model.parameters())
        cut_buffers = sum(value.numel() * 4 for key, value in model.named_buffers() if key in plan.parameters)
        assert plan.total_bytes == whole + cut_buffers
        for rank in range(num_ranks):
            local = sum(
                local_parameter(value, plan.parameters[key], rank).numel() * 4
                for key, value in model.named_parameters()
            )
            buffers = sum(
                local_parameter(value, plan.parameters[key], rank).numel() * 4
                for key, value in model.named_buffers()
                if key in plan.parameters
            )
            assert plan.bytes_on(rank) == local + buffers
        assert plan.max_rank_bytes == max(plan.bytes_on(rank) for rank in range(num_ranks))
        assert plan.replicated_bytes <= min(plan.bytes_on(rank) for rank in range(num_ranks))


def test_one_rank_cuts_nothing() -> None:
    model, inputs = build("nn_transformer")
    plan = plan_tensor_parallel(model, inputs, 1)
    assert {layer.kind for layer in plan.layers.values()} == {LayerKind.REPLICATED}
    assert plan.sharded_fraction == 0.0
    assert plan.collectives() == {}


def test_description_names_costs_and_reasons() -> None:
    model, inputs = build("language_reads_weight")
    text = plan_tensor_parallel(model, inputs, 2).describe()
    assert "Tensor-parallel plan for 2 ranks" in text
    assert "body.mixers.*.query" in text
    assert "embed" in text
    assert "128.00 KiB on every rank  (its weight is read by other code)" in text
    assert "4 all_reduce" in text
    assert "Attributes that differ by rank: body.mixers.*.num_heads" in text


def test_unreadable_plans_are_refused() -> None:
    good = plan_tensor_parallel(*build("separate"), 2).to_dict()
    for broken in ({}, {**good, "format_version": 2}, {**good, "layers": 3}, {**good, "layers": {"a": {"kind": "x"}}}):
        with pytest.raises(TensorParallelError):
            TensorParallelPlan.from_dict(broken)
    with pytest.raises(TensorParallelError, match="Unknown dtype"):
        assert ParameterPlan((1,), "float99").num_bytes


def test_impossible_requests_are_named() -> None:
    model = randomized(Network(Separate))
    with pytest.raises(TensorParallelError, match="at least 1"):
        plan_tensor_parallel(model, hidden(), 0)
    with pytest.raises(TensorParallelError, match="has no parameters"):
        plan_tensor_parallel(torch.nn.ReLU(), hidden(), 2)
    with pytest.raises(TensorParallelError, match="compiled already"):
        plan_tensor_parallel(torch.compile(model), hidden(), 2)  # type: ignore[arg-type]
    with pytest.raises(TensorParallelError, match="failed on the example input"):
        plan_tensor_parallel(model, torch.zeros(2, 3, 5), 2)


def test_more_ranks_than_heads_gathers() -> None:
    model = randomized(Network(Separate))
    plan = plan_tensor_parallel(model, hidden(), 16)
    assert plan.layers["mixers.0.query"].kind is LayerKind.COLUMN_GATHER
    assert plan.layers["mlps.0.up"].kind is LayerKind.COLUMN
    assert any("8 heads or blocks for 16 ranks" in note for note in plan.notes)


def test_inputs_are_read_as_lightning_reads_them() -> None:
    class Two(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part = Separate()

        def forward(self, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
            return self.part(x) * scale

        def predict_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
            return self(batch["x"], batch["scale"]) + batch_idx

    model = randomized(Two())
    x, scale = hidden(), torch.ones(1)
    plans = [
        plan_tensor_parallel(model, (x, scale), 2),
        plan_tensor_parallel(model, {"x": x, "scale": scale}, 2),
        plan_tensor_parallel(model, x, 2, example_kwargs={"scale": scale}),
        plan_tensor_parallel(model, ({"x": x, "scale": scale}, 0), 2, method="predict_step"),
    ]
    assert all(plan == plans[0] for plan in plans)
    assert plans[0].layers["part.out"].kind is LayerKind.ROW


def test_lightning_modules() -> None:
    lightning = pytest.importorskip("lightning.pytorch")

    class Wrapped(lightning.LightningModule):  # type: ignore[name-defined,misc]
        def __init__(self) -> None:
            super().__init__()
            self.example_input_array = tokens()
            self.net = Language(Separate)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.net(ids)

    model = randomized(Wrapped())
    example, origin = find_example_input(model)
    assert origin == "example_input_array"
    plan = plan_tensor_parallel(model, example, 2)
    assert plan.sharded_fraction > 0.9
    with torch.no_grad():
        expected = model(tokens())
    for output in sharded_outputs(model, plan, lambda part: part(tokens())):
        assert relative_error(output, expected) < 1e-5


# -- examples ----------------------------------------------------------------------------------------------------------


def test_examples_are_found_in_order() -> None:
    model = randomized(Network(Separate))
    with pytest.raises(TensorParallelError, match="Nothing says what Network is called with"):
        find_example_input(model)
    value, origin = find_example_input(model, torch.zeros(9, 40, 64))
    assert origin == "batch"
    assert value.shape == (2, 40, 64)
    model.config = SimpleNamespace(vocab_size=1000, is_encoder_decoder=False)
    model.main_input_name = "input_ids"
    value, origin = find_example_input(model)
    assert origin == "config"
    assert value["input_ids"].shape == (2, 16)
    model.config, model.main_input_name = SimpleNamespace(image_size=24), "pixel_values"
    assert find_example_input(model)[0]["pixel_values"].shape == (2, 3, 24, 24)


def test_batches_are_cut_small() -> None:
    pair = namedtuple("pair", "ids names")
    ids, mask = torch.ones(8, 100, dtype=torch.int64), torch.ones(8, 100)
    small = cut_small({"ids": ids, "mask": mask, "pair": pair(ids, ["a"] * 8), "scale": torch.tensor(2.0), "n": 8})
    assert small["ids"].shape == small["mask"].shape == small["pair"].ids.shape == (2, 32)
    assert small["pair"].names == ["a", "a"]
    assert small["n"] == 8
    square = cut_small((ids, torch.ones(8, 1, 100, 100)))
    assert square[0].shape == (2, 100)
    assert square[1].shape == (2, 1, 100, 100)
    assert cut_small("text") == "text"


# -- small parts -------------------------------------------------------------------------------------------------------


def test_names_and_bytes() -> None:
    assert generic_name("layers.12.mlp.fc1") == "layers.*.mlp.fc1"
    assert generic_name("0.1.conv2d") == "*.*.conv2d"
    assert format_bytes(1536) == "1.50 KiB"
    assert format_bytes(3 * 2**40) == "3.00 TiB"


@pytest.mark.parametrize(
    ("keys", "names", "pairs"),
    [
        (["a.w", "b.w"], ["a.w", "b.w"], {"a.w": "a.w"}),
        (["model.a.w", "model.b.w", "epoch"], ["a.w", "b.w"], {"model.a.w": "a.w"}),
        (["a.w", "b.w"], ["net.a.w", "net.b.w"], {"a.w": "net.a.w"}),
        (["module.model.a.w"], ["a.w"], {"module.model.a.w": "a.w"}),
        (["a.w"], ["head.w", "a.w"], {"a.w": "a.w"}),
    ],
)
def test_common_prefixes_are_found(keys: list[str], names: list[str], pairs: dict[str, str]) -> None:
    rename = common_renaming(keys, names)
    assert {key: rename(key) for key in pairs} == pairs


def test_pseudo_random_numbers_depend_on_the_key_only() -> None:
    first, second = PseudoRandom(3), PseudoRandom(3)
    assert torch.equal(first.tensor("a", (4, 5)), second.tensor("a", (4, 5)))
    assert not torch.equal(first.tensor("a", (4, 5)), first.tensor("b", (4, 5)))
    assert not torch.equal(first.tensor("a", (4, 5)), PseudoRandom(4).tensor("a", (4, 5)))
    large = first.tensor("large", (9, 1 << 20))
    assert large.shape == (9, 1 << 20)
    assert abs(large.std().item() - 1) < 0.01


def test_differences_are_named() -> None:
    value = torch.tensor([1.0, -2.0, float("inf")])
    assert difference(value, value.clone()) == ""
    assert "shape" in difference(value, value[:2])
    assert "dtype" in difference(value, torch.tensor([1, 2, 3]))
    assert "differ by" in difference(value, torch.tensor([1.0, -2.1, float("inf")]))
    assert "other values" in difference(torch.tensor([1.0, -2.0, 3.0]), value)
    assert "differ by" in difference(value, torch.tensor([1.0, -2.0, 3.0]))
    assert difference(value, value + torch.tensor([1e-6, 0.0, 0.0])) == ""
    nothing = torch.full((3,), float("nan"))
    assert "no finite values" in difference(nothing, nothing.clone())


def test_public_names_exist_and_the_package_stays_light() -> None:
    assert sorted(room.__all__) == sorted(set(room.__all__))
    assert all(hasattr(room, name) for name in room.__all__)
    code = "import sys, lightning_gpuorch.parallel.tensor_parallel; print([n for n in ('lightning', 'transformers', "
    code += "'safetensors', 'torch.distributed.checkpoint') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "[]"


def test_plans_are_frozen() -> None:
    plan = plan_tensor_parallel(*build("separate"), 2)
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.tensor_parallel_size = 3  # type: ignore[misc]
    assert LayerPlan(LayerKind.ROW, (((0, 1),),)) == LayerPlan(LayerKind.ROW, (((0, 1),),))
