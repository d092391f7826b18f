"""The first-batch check, the plan cache, and one plan for all ranks."""

from __future__ import annotations

import copy
import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from tp_models import EXAMPLES, WIDTH, GatedHalves, Mlp, Network, Separate, build, hidden, randomized
from tp_ranks import ProcessRanks, on_threads, relative_error

from lightning_gpuorch.errors import TensorParallelError
from lightning_gpuorch.parallel.tensor_parallel import (
    Communicator,
    PlanCache,
    apply_plan,
    check_first_batch,
    check_outputs_agree,
    plan_on_first_rank,
    plan_tensor_parallel,
)
from lightning_gpuorch.parallel.tensor_parallel import plan_cache as plan_cache_module


def check_on_threads(name: str, size: int, damage: Any = None, **cast: Any) -> list[tuple[str, float | None]]:
    model, inputs = build(name)
    plan = plan_tensor_parallel(model, inputs, size)
    with torch.no_grad():
        expected = model(*inputs)

    def work(communicator: Communicator) -> tuple[str, float | None]:
        part = copy.deepcopy(model)
        apply_plan(part, plan, communicator.rank, communicator)
        if damage is not None:
            damage(part, communicator.rank)
        check = check_first_batch(part)
        assert check is not None
        with torch.no_grad():
            first, second = part(*inputs), part(*inputs)
        assert torch.equal(first, second)  # the check changes nothing, and is over after the first batch
        assert relative_error(first, expected) < 1e-5
        assert not check._handles
        return check.block, check.error

    return on_threads(size, work)


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize(
    "name",
    ["packed_thirds", "hard_coded", "packed_grouped", "configured", "slopes", "interleaved_experts", "nn_encoder"],
)
def test_a_right_model_passes(name: str, size: int) -> None:
    results = check_on_threads(name, size)
    assert len(set(results)) == 1  # all ranks learn the same
    block, error = results[0]
    assert block
    assert error is not None
    assert error < 1e-5


def test_wrong_weights_on_one_rank_are_found_by_all() -> None:
    def damage(part: nn.Module, rank: int) -> None:
        if rank == 1:
            with torch.no_grad():
                part.get_parameter("mixers.0.out.bias").add_(0.5)  # whole on every rank, so nothing else would notice

    model, inputs = build("separate")
    plan = plan_tensor_parallel(model, inputs, 2)
    messages = []

    def work(communicator: Communicator) -> None:
        part = copy.deepcopy(model)
        apply_plan(part, plan, communicator.rank, communicator)
        damage(part, communicator.rank)
        # Ranks whose biases differ feed each other different inputs: seen where the shared bias enters again.
        check_first_batch(part)
        with torch.no_grad(), pytest.raises(TensorParallelError, match="differs from the unsharded block") as caught:
            part.get_submodule("mixers.0")(hidden(seed=4 + communicator.rank))
        messages.append(str(caught.value))

    on_threads(2, work)
    assert len(messages) == 2


class Recurrent(Separate):
    """Keeps state in a buffer, a plain tensor and a list."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("state", torch.zeros(WIDTH))
        self.mean = torch.zeros(WIDTH)
        self.seen: list[torch.Tensor] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = super().forward(x + self.state - self.mean)
        self.state = 0.5 * self.state + y.mean((0, 1))
        self.mean.lerp_(y.mean((0, 1)), 0.5)
        self.seen.append(y.mean((0, 1)))
        return y + torch.stack(self.seen).sum(0)


def test_blocks_that_keep_state_pass() -> None:
    model = randomized(Network(Recurrent))
    plan = plan_tensor_parallel(model, (hidden(),), 2)

    def work(communicator: Communicator) -> tuple[set[str], float | None]:
        part = copy.deepcopy(model)
        apply_plan(part, plan, communicator.rank, communicator)
        check = check_first_batch(part)
        assert check is not None
        with torch.no_grad():
            part(hidden())
        assert not check.pending
        return set(check.errors), check.error

    for blocks, error in on_threads(2, work):
        assert blocks == {"mixers.0", "mlps.0"}
        assert error is not None
        assert error < 1e-5


@pytest.mark.parametrize("name", ["mixers.1", "mlps.0", "head"])
def test_a_damaged_block_of_any_kind_is_found(name: str) -> None:
    """A kernel that fails on one rank's local shape, in a kind of block that is not the first."""

    class Three(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mixers = nn.ModuleList([GatedHalves(), Separate()])
            self.mlps = nn.ModuleList([Mlp()])
            self.head = nn.Linear(WIDTH, 4 * WIDTH)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for part in (*self.mixers, *self.mlps):
                x = x + part(x)
            return self.head(x)

    model = randomized(Three())
    plan = plan_tensor_parallel(model, (hidden(),), 2)

    def work(communicator: Communicator) -> str:
        part = copy.deepcopy(model)
        apply_plan(part, plan, communicator.rank, communicator)
        check_first_batch(part)
        damaged = next(layer for key, layer in part.named_modules() if key.startswith(name) and hasattr(layer, "bias"))
        if communicator.rank == 1:
            project = damaged.project
            damaged.project = lambda value, bias: project(value, bias) + 0.5
        with torch.no_grad(), pytest.raises(TensorParallelError, match="differs from the unsharded block") as caught:
            part(hidden())
        return str(caught.value)

    assert all(name.split(".")[0] in message for message in on_threads(2, work))


def test_half_precision_rounding_is_no_error() -> None:
    model, inputs = build("grouped")
    plan = plan_tensor_parallel(model, inputs, 2)

    def work(communicator: Communicator) -> float:
        part = copy.deepcopy(model).to(torch.bfloat16)
        apply_plan(part, plan, communicator.rank, communicator)
        check = check_first_batch(part)
        assert check is not None
        with torch.no_grad():
            part(*(value.bfloat16() for value in inputs))
        assert check.error is not None
        return check.error

    assert max(on_threads(2, work)) < 0.05


def test_a_whole_model_has_nothing_to_check() -> None:
    with pytest.raises(TensorParallelError, match="not sharded"):
        check_first_batch(build("separate")[0])


def compare_outputs(rank: int) -> list[str]:
    model = randomized(Network(Separate))
    plan = plan_tensor_parallel(model, (hidden(),), 2)
    apply_plan(model, plan, rank)
    messages = []
    with torch.inference_mode():
        check_outputs_agree(
            model, {"logits": model(hidden()), "seconds": float(rank), "array": model(hidden()).numpy()}
        )
        own = model.get_submodule("mixers.0.query")(hidden())
        for output in (own, {"features": [own.numpy()]}, (own.argmax(-1),)):
            with pytest.raises(TensorParallelError, match="is not the same on rank 1 as on rank 0") as caught:
                check_outputs_agree(model, output)
            messages.append(str(caught.value))
    return messages


def test_a_step_that_takes_out_a_ranks_own_channels_is_found(two_ranks: ProcessRanks) -> None:
    first, second = two_ranks.run(compare_outputs)
    assert first == second
    assert "output['features'][0]" in first[1]


# -- cache -------------------------------------------------------------------------------------------------------------


def no_planning(*args: Any, **kwargs: Any) -> Any:
    raise AssertionError("planned again")


def test_cached_plans_are_equal_and_planned_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = PlanCache(tmp_path / "plans")
    plans = {name: cache.plan(*build(name), 2) for name in EXAMPLES}
    monkeypatch.setattr(plan_cache_module, "plan_tensor_parallel", no_planning)
    for name, plan in plans.items():
        assert PlanCache(tmp_path / "plans").plan(*build(name), 2) == plan
    with pytest.raises(AssertionError, match="planned again"):
        cache.plan(*build("separate"), 3)
    assert not list(tmp_path.glob("plans/.plan-*"))


def test_the_fingerprint_sees_what_matters() -> None:
    base = randomized(Network(Separate))
    digest = plan_cache_module.fingerprint
    same = digest(copy.deepcopy(base), 2, (hidden(),))
    assert digest(base, 2, (hidden(seed=9),)) == same  # other numbers, same plan
    changed = copy.deepcopy(base)
    changed.mixers[0].num_heads = 4  # type: ignore[index,union-attr]
    tied = copy.deepcopy(base)
    tied.mixers[0].query.weight = tied.mixers[0].key.weight  # type: ignore[index,union-attr]
    half = copy.deepcopy(base).bfloat16()
    others = {
        digest(changed, 2, (hidden(),)),
        digest(tied, 2, (hidden(),)),
        digest(half, 2, (hidden(),)),
        digest(base, 3, (hidden(),)),
        digest(base, 2, (hidden(length=8),)),
        digest(base, 2, (hidden(), torch.ones(2, dtype=torch.int64))),
    }
    assert len(others | {same}) == 7


def test_damaged_cache_files_cost_time_only(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache = PlanCache(tmp_path)
    plan = cache.plan(*build("separate"), 2)
    (file,) = tmp_path.iterdir()
    for content in ("{", json.dumps({"format_version": 99}), json.dumps({"format_version": 1})):
        file.write_text(content)
        with caplog.at_level(logging.WARNING):
            assert cache.plan(*build("separate"), 2) == plan
        assert "planning again" in caplog.text
        caplog.clear()
    blocked = tmp_path / "file"
    blocked.write_text("")
    with caplog.at_level(logging.WARNING):
        assert PlanCache(blocked / "plans").plan(*build("separate"), 2) == plan
    assert "not cached" in caplog.text


# -- one plan for all ranks --------------------------------------------------------------------------------------------


def plan_together(rank: int, folder: str) -> tuple[str, str]:
    model, inputs = build("grouped")
    # Only the first rank's example counts; the other's would not even run.
    plan = plan_on_first_rank(model, inputs if rank == 0 else None, cache=PlanCache(folder))
    broken = build("separate")[0]
    with pytest.raises(TensorParallelError, match="failed on the example input") as caught:
        plan_on_first_rank(broken, torch.zeros(1, 2, 3))
    return plan.to_json(), str(caught.value)


def test_every_rank_gets_the_first_ranks_plan_or_error(two_ranks: ProcessRanks, tmp_path: Path) -> None:
    first, second = two_ranks.run(plan_together, str(tmp_path))
    assert first == second
    model, inputs = build("grouped")
    assert first[0] == plan_tensor_parallel(model, inputs, 2).to_json()


def test_planning_is_deterministic_and_leaves_the_model_alone() -> None:
    for name in EXAMPLES:
        model, inputs = build(name)
        model.train()
        before = {key: value.clone() for key, value in model.state_dict().items()}
        attributes = {key: dict(vars(module)) for key, module in model.named_modules()}
        classes = [type(module) for module in model.modules()]
        state = torch.get_rng_state()
        first = plan_tensor_parallel(model, inputs, 2)
        assert torch.equal(torch.get_rng_state(), state)
        assert plan_tensor_parallel(model, inputs, 2) == first
        assert dataclasses.replace(plan_tensor_parallel(model, inputs, 2, seed=7), notes=()) == dataclasses.replace(
            first, notes=()
        )
        assert [type(module) for module in model.modules()] == classes
        assert all(module.training for module in model.modules())
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
        for key, module in model.named_modules():
            assert {k: v for k, v in vars(module).items() if not k.startswith("_")} == {
                k: v for k, v in attributes[key].items() if not k.startswith("_")
            }
