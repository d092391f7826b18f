"""Each kind of layer or step that people write is right when sharded, on inputs it was not planned with, or refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from layer_kinds import KINDS
from tp_ranks import sharded_outputs

from lightning_gpuorch.errors import TensorParallelError
from lightning_gpuorch.parallel.tensor_parallel import plan_tensor_parallel
from lightning_gpuorch.parallel.tensor_parallel.values import leaf_difference, output_leaves

pytestmark = pytest.mark.slow  # two ranks for each of a hundred kinds

SIZES = (2, 3, 4)


def judge(name: str, num_ranks: int) -> tuple[str, Any]:
    """Plan, shard and compare a kind: ``equal``, ``refused`` or ``WRONG``, and the plan or what is wrong."""
    kind = KINDS[name]
    model, inputs = kind.model(), kind.inputs()

    def steps(part: Any) -> list[Any]:
        return [leaf for one in inputs for leaf in output_leaves(part.predict_step(one))]

    try:
        plan = plan_tensor_parallel(model, (inputs[0],), num_ranks, method="predict_step")
    except TensorParallelError as error:
        return "refused", error
    whole_model = copy.deepcopy(model)
    with torch.inference_mode():
        expected = steps(whole_model)
    for own in sharded_outputs(model, plan, steps, inference_mode=True):
        if [path for path, _ in own] != [path for path, _ in expected]:
            return "WRONG", "another structure"
        for (path, value), (_, whole) in zip(own, expected, strict=True):
            problem = leaf_difference(value, whole)
            if problem and not _is_close(value, whole, kind.tolerance):
                return "WRONG", f"{path}: {problem}"
    return "equal", plan


def _is_close(value: Any, whole: Any, tolerance: float) -> bool:
    alike = isinstance(value, torch.Tensor) and value.shape == whole.shape
    return alike and bool((value - whole).abs().max() <= tolerance * whole.abs().max())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("index", "name"), list(enumerate(KINDS)), ids=list(KINDS))
def test_kind(index: int, name: str) -> None:
    verdict, found = judge(name, SIZES[index % len(SIZES)])
    assert verdict == "equal", found
