"""Real ranks: two gloo processes with real collectives, in the modes inference runs in."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tp_models import build, hidden
from tp_ranks import ProcessRanks, relative_error

from lightning_gpuorch.errors import TensorParallelError
from lightning_gpuorch.parallel.tensor_parallel import (
    Communicator,
    TensorParallelPlan,
    apply_plan,
    plan_tensor_parallel,
)
from lightning_gpuorch.parallel.tensor_parallel.apply import communicator_of
from lightning_gpuorch.parallel.tensor_parallel.values import tensors_within

SAMPLE = ["separate", "packed_thirds", "hard_coded", "multi_query", "einsum", "talking_heads", "state_space"]
SAMPLE += ["listed_experts", "interleaved_experts", "language", "nn_transformer", "attention_map", "vision"]


def run_sharded(rank: int, name: str, mode: str) -> list[tuple[torch.Tensor, torch.Tensor]]:
    model, inputs = build(name)
    plan = plan_tensor_parallel(model, inputs, 2)
    if mode == "bfloat16":
        model = model.to(torch.bfloat16)
        inputs = tuple(value.bfloat16() if value.is_floating_point() else value for value in inputs)
    with torch.no_grad():
        expected = list(tensors_within(model(*inputs)))
    apply_plan(model, plan, rank)
    forward: Any = torch.compile(model, fullgraph=True) if mode == "compile" else model
    with torch.inference_mode() if mode == "inference_mode" else torch.no_grad():
        values = list(tensors_within(forward(*inputs)))
    return [(value.float().clone(), whole.float().clone()) for value, whole in zip(values, expected, strict=True)]


@pytest.mark.parametrize("name", SAMPLE)
def test_two_processes(two_ranks: ProcessRanks, name: str) -> None:
    for outputs in two_ranks.run(run_sharded, name, "inference_mode"):
        assert outputs
        for value, whole in outputs:
            assert relative_error(value, whole) < 1e-5


def test_bfloat16(two_ranks: ProcessRanks) -> None:
    for outputs in two_ranks.run(run_sharded, "grouped", "bfloat16"):
        for value, whole in outputs:
            assert relative_error(value, whole) < 0.03  # bfloat16 keeps 8 bits; sums are taken in another order


def test_compiled(two_ranks: ProcessRanks) -> None:
    """One graph, with both collectives and the shape rules in it."""
    for outputs in two_ranks.run(run_sharded, "language_hard_coded", "compile"):
        for value, whole in outputs:
            assert relative_error(value, whole) < 1e-5


def count_collectives(rank: int, name: str) -> tuple[int, dict[str, int]]:
    model, inputs = build(name)
    plan = plan_tensor_parallel(model, inputs, 2)
    apply_plan(model, plan, rank)
    calls: list[str] = []
    communicator = communicator_of(model)
    for key in ("all_reduce", "all_gather_last"):
        setattr(communicator, key, counting(getattr(communicator, key), calls))
    with torch.no_grad():
        model(*inputs)
    return len(calls), plan.collectives()


def counting(collective: Any, calls: list[str]) -> Any:
    def call(*args: Any) -> Any:
        calls.append(collective.__name__)
        return collective(*args)

    return call


def test_two_collectives_per_block(two_ranks: ProcessRanks) -> None:
    for name in ("separate", "nn_encoder"):
        for counted, planned in two_ranks.run(count_collectives, name):
            assert counted == sum(planned.values()) == 4  # two blocks; the small head stays whole


def move_to_another_group(rank: int) -> float:
    model, inputs = build("separate")
    with torch.no_grad():
        expected = model(*inputs)
        plan = plan_tensor_parallel(model, inputs, 2)
        communicator = Communicator()
        apply_plan(model, plan, rank, communicator)
        copied = copy.deepcopy(model)
        communicator.process_group = dist.new_group([0, 1], backend="gloo")
        error = relative_error(model(*inputs), expected)
        assert torch.equal(copied(*inputs), model(*inputs))
        restored = pickle.loads(pickle.dumps(model))
        assert torch.equal(restored(*inputs), model(*inputs))
        assert type(restored) is type(model)
    return error


def test_group_can_be_exchanged_and_models_copied(two_ranks: ProcessRanks) -> None:
    assert max(two_ranks.run(move_to_another_group)) < 1e-5


def wrong_uses(rank: int) -> list[str]:
    messages = []

    def expect(plan: TensorParallelPlan, at_rank: int, model: torch.nn.Module) -> None:
        before = {name: tuple(value.shape) for name, value in model.named_parameters()}
        with pytest.raises(TensorParallelError) as caught:
            apply_plan(model, plan, at_rank)
        assert before == {name: tuple(value.shape) for name, value in model.named_parameters()}
        messages.append(str(caught.value))

    model, inputs = build("separate")
    expect(plan_tensor_parallel(model, inputs, 4), rank, model)
    expect(plan_tensor_parallel(model, inputs, 2), 1 - rank, model)
    expect(plan_tensor_parallel(model, inputs, 2), 2, model)
    other, _ = build("einsum")
    expect(plan_tensor_parallel(model, inputs, 2), rank, other)
    plan = plan_tensor_parallel(model, inputs, 2)
    apply_plan(model, plan, rank)
    expect(plan, rank, model)
    return messages


def test_wrong_uses_are_refused_and_change_nothing(two_ranks: ProcessRanks) -> None:
    for messages in two_ranks.run(wrong_uses):
        assert "has 2 ranks" in messages[0]
        assert "this process is rank" in messages[1]
        assert "Rank 2 does not exist" in messages[2]
        assert "does not fit this model" in messages[3]
        assert "sharded already" in messages[4]


def test_isinstance_and_state_dict_keys_stay() -> None:
    from tp_ranks import on_threads

    model, inputs = build("language")
    plan = plan_tensor_parallel(model, inputs, 2)
    keys, classes = set(model.state_dict()), {name: type(module) for name, module in model.named_modules()}

    def work(communicator: Communicator) -> None:
        part = copy.deepcopy(model)
        apply_plan(part, plan, communicator.rank, communicator)
        assert set(part.state_dict()) == keys
        assert all(isinstance(module, classes[name]) for name, module in part.named_modules())
        assert part.lm_head.weight is part.embed.weight
        assert not any(parameter.requires_grad for parameter in part.parameters())
        assert sum(value.numel() * 4 for value in part.parameters()) == plan.bytes_on(communicator.rank)
        storages = {value.untyped_storage().data_ptr(): value.untyped_storage().nbytes() for value in part.parameters()}
        assert sum(storages.values()) == plan.bytes_on(communicator.rank)  # nothing whole is kept alive behind a view

    on_threads(2, work)
    assert hidden().shape == (2, 16, 64)
