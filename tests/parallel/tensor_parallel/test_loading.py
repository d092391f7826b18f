"""Every kind of checkpoint: each rank reads its part, and the model computes what the whole one does."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import nn
from tp_models import EXAMPLES, build, randomized
from tp_ranks import on_threads, relative_error

from lightning_gpuorch.errors import ModelDoesNotFitError, TensorParallelError
from lightning_gpuorch.parallel.tensor_parallel import (
    Communicator,
    LoadReport,
    TensorParallelPlan,
    apply_plan,
    empty_parameters,
    load_sharded,
    open_checkpoint,
    plan_tensor_parallel,
    smallest_tensor_parallel_size,
)


def unshared(model: nn.Module) -> dict[str, torch.Tensor]:
    seen: dict[int, str] = {}
    return {
        name: value.detach().clone()
        for name, value in model.state_dict(keep_vars=True).items()
        if seen.setdefault(id(value), name) == name
    }


def write_safetensors(state: dict[str, torch.Tensor], folder: Path) -> Path:
    save_file(state, folder / "model.safetensors")
    return folder / "model.safetensors"


def write_index(state: dict[str, torch.Tensor], folder: Path) -> Path:
    names = sorted(state)
    parts = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for file, keys in parts.items():
        save_file({key: state[key] for key in keys}, folder / file)
    weight_map = {key: file for file, keys in parts.items() for key in keys}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def write_bin(state: dict[str, torch.Tensor], folder: Path) -> Path:
    torch.save(state, folder / "pytorch_model.bin")
    return folder


def write_lightning(state: dict[str, torch.Tensor], folder: Path) -> Path:
    content = {
        "epoch": 3,
        "state_dict": {f"model.{key}": value for key, value in state.items()},
        "hyper_parameters": {"width": 64},
    }
    torch.save(content, folder / "last.ckpt")
    return folder / "last.ckpt"


def write_distributed(state: dict[str, torch.Tensor], folder: Path) -> Path:
    dcp.save(state, checkpoint_id=folder / "dcp", no_dist=True)
    return folder / "dcp"


WRITERS: list[Callable[[dict[str, torch.Tensor], Path], Any]] = [
    write_safetensors,
    write_index,
    write_bin,
    write_lightning,
    write_distributed,
    lambda state, folder: state,
]


def empty(name: str) -> nn.Module:
    with empty_parameters():
        return EXAMPLES[name].build().eval()


def load_and_run(
    name: str, plan: TensorParallelPlan, source: Any, inputs: tuple[Any, ...], **options: Any
) -> list[tuple[torch.Tensor, LoadReport, nn.Module]]:
    def work(communicator: Communicator) -> tuple[torch.Tensor, LoadReport, nn.Module]:
        torch.manual_seed(0)
        model = empty(name)
        assert all(parameter.is_meta for parameter in model.parameters())
        apply_plan(model, plan, communicator.rank, communicator)
        report = load_sharded(model, source, plan, communicator.rank, **options)
        with torch.no_grad():
            return model(*inputs), report, model

    # Building swaps register_parameter for the whole process, so ranks in threads build one after another (a lock).
    return on_threads(plan.tensor_parallel_size, work)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled", "ignore:.*TypedStorage is deprecated")
@pytest.mark.parametrize("writer", WRITERS, ids=["safetensors", "index", "bin", "lightning", "distributed", "memory"])
@pytest.mark.parametrize("name", ["language", "slopes"])
def test_every_kind_of_checkpoint(tmp_path: Path, name: str, writer: Callable[..., Any]) -> None:
    model, inputs = build(name)
    plan = plan_tensor_parallel(model, inputs, 2)
    source = writer(unshared(model), tmp_path)
    with torch.no_grad():
        expected = model(*inputs)
    for rank, (output, report, part) in enumerate(load_and_run(name, plan, source, inputs)):
        assert relative_error(output, expected) < 1e-5
        assert report.missing == report.unexpected == ()
        cut_buffers = sum(buffer.numel() * buffer.element_size() for buffer in part.buffers())
        assert report.local_bytes == plan.bytes_on(rank) - cut_buffers
        assert report.bytes_read <= 1.02 * plan.bytes_on(rank)
        if name == "language":
            assert part.lm_head.weight is part.embed.weight


def test_resharding_reads_the_same_files(tmp_path: Path) -> None:
    model, inputs = build("packed_stacked")
    source = write_index(unshared(model), tmp_path)
    with torch.no_grad():
        expected = model(*inputs)
    for size in (4, 3, 2, 1):
        plan = plan_tensor_parallel(model, inputs, size)
        for output, _, _ in load_and_run("packed_stacked", plan, source, inputs):
            assert relative_error(output, expected) < 1e-5


def test_experts_biases_and_dtype(tmp_path: Path) -> None:
    model, inputs = build("interleaved_experts")
    plan = plan_tensor_parallel(model, inputs, 3)
    state = {key: value.to(torch.float16) for key, value in unshared(model).items()}
    model.load_state_dict({key: value.float() for key, value in state.items()})
    with torch.no_grad():
        expected = model(*inputs)
    source = write_safetensors(state, tmp_path)
    for output, report, part in load_and_run("interleaved_experts", plan, source, inputs, dtype=torch.float32):
        assert relative_error(output, expected) < 1e-5
        assert report.converted == {"float16 -> float32": report.num_tensors - 2 * int(not part.mlps[0].bank.b2.any())}


def test_progress_and_renaming(tmp_path: Path) -> None:
    model, inputs = build("separate")
    plan = plan_tensor_parallel(model, inputs, 2)
    state = {f"net::{key}": value for key, value in unshared(model).items()} | {"net::extra": torch.ones(3)}
    source = write_safetensors(state, tmp_path)
    calls: list[tuple[int, int]] = []
    part = empty("separate")
    apply_plan(part, plan, 0, Communicator(None, 0, 2))
    report = load_sharded(
        part, source, plan, 0, rename=lambda key: key.removeprefix("net::"), progress=lambda *step: calls.append(step)
    )
    assert report.unexpected == ("net::extra",)
    assert calls == [(index + 1, report.num_tensors) for index in range(report.num_tensors)]
    assert "1 keys not used" in report.describe()


def shell(name: str, rank: int = 0) -> tuple[nn.Module, TensorParallelPlan, nn.Module]:
    model, inputs = build(name)
    plan = plan_tensor_parallel(model, inputs, 2)
    part = empty(name)
    apply_plan(part, plan, rank, Communicator(None, rank, 2))
    return part, plan, model


def test_wrong_checkpoints_are_named_before_anything_changes(tmp_path: Path) -> None:
    part, plan, model = shell("separate")
    state = unshared(model)

    def refused(source: Any, match: str, **options: Any) -> None:
        with pytest.raises(TensorParallelError, match=match):
            load_sharded(part, source, plan, 0, **options)
        assert all(parameter.is_meta for parameter in part.parameters())

    refused(tmp_path / "absent.safetensors", "There is no checkpoint")
    refused(tmp_path, "holds no checkpoint")
    (tmp_path / "notes.txt").write_text("no")
    refused(tmp_path / "notes.txt", "no checkpoint this release reads")
    refused(
        {key: value for key, value in state.items() if "query" not in key}, r"lacks 4 of the model's .*mixers\.0\.query"
    )
    refused({**state, "head.weight": torch.zeros(11, 64)}, r"another model.*\n.*head.weight has shape \(11, 64\)")
    refused({"hyper_parameters": 3}, "holds no tensors")
    other, _ = build("einsum")
    refused(unshared(other), "lacks")
    whole = write_safetensors(state, tmp_path)
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(whole.read_bytes()[:-200])
    refused(damaged, "damaged")
    torch.save(state, tmp_path / "good.pt")
    (tmp_path / "bad.pt").write_bytes((tmp_path / "good.pt").read_bytes()[:5000])
    refused(tmp_path / "bad.pt", "damaged")
    torch.save({"state_dict": state, "callback": Path}, tmp_path / "objects.ckpt")
    refused(tmp_path / "objects.ckpt", "could run code")
    sharded = tmp_path / "sharded"
    sharded.mkdir()
    write_index(state, sharded)
    (sharded / "model-2.safetensors").unlink()
    refused(sharded, "1 are missing: model-2.safetensors")
    (sharded / "model.safetensors.index.json").write_text("{")
    refused(sharded, "index .* is damaged")
    report = load_sharded(part, whole, plan, 0)
    assert report.missing == ()


def quantised(state: dict[str, torch.Tensor], suffix: str, dtype: torch.dtype, **more: torch.Tensor) -> Any:
    """Replace every large weight by narrow values with a scale beside them."""
    result: dict[str, torch.Tensor] = dict(more)
    for name, value in state.items():
        if value.dim() == 2:
            result[name] = (value * 100).to(dtype)
            result[name.removesuffix(".weight") + suffix if suffix.startswith(".") else name + suffix] = torch.ones(1)
        else:
            result[name] = value
    return result


@pytest.mark.parametrize(
    ("suffix", "dtype"),
    [
        ("_scale_inv", torch.float8_e4m3fn),
        (".weight_scale", torch.float8_e5m2),
        (".scales", torch.float8_e4m3fn),
        (".SCB", torch.int8),
        ("_other_name", torch.int8),
        (".qzeros", torch.int32),
        (".absmax", torch.uint8),
        (".weight_scale", torch.float32),
    ],
)
def test_quantised_weights_are_refused_before_anything_changes(tmp_path: Path, suffix: str, dtype: torch.dtype) -> None:
    model, inputs = build("separate")
    plan = plan_tensor_parallel(model, inputs, 2)
    state = quantised(unshared(model), suffix, dtype)

    def work(communicator: Communicator) -> None:
        part = build("separate")[0]
        apply_plan(part, plan, communicator.rank, communicator)
        before = {name: value.clone() for name, value in part.state_dict().items()}
        for source in (state, write_safetensors(state, tmp_path / str(communicator.rank))):
            with pytest.raises(TensorParallelError, match=r"the checkpoint is quantised\. Save it with full values"):
                load_sharded(part, source, plan, communicator.rank)
        assert all(torch.equal(value, before[name]) for name, value in part.state_dict().items())

    for rank in range(2):
        (tmp_path / str(rank)).mkdir()
    on_threads(2, work)


def test_other_scales_and_plain_narrow_weights_are_not_quantised() -> None:
    model, inputs = build("separate")
    plan = plan_tensor_parallel(model, inputs, 2)
    state = {**unshared(model), "logit_scale": torch.ones(()), "mixers.0.scale": torch.ones(3)}
    narrow = {
        name: value.to(torch.float8_e5m2) if value.dim() == 2 else value for name, value in unshared(model).items()
    }

    def work(communicator: Communicator) -> None:
        part = build("separate")[0]
        apply_plan(part, plan, communicator.rank, communicator)
        report = load_sharded(part, state, plan, communicator.rank)
        assert report.unexpected == ("logit_scale", "mixers.0.scale")
        load_sharded(part, narrow, plan, communicator.rank)

    on_threads(2, work)


@pytest.mark.parametrize("nested", [False, True])
def test_a_configuration_that_says_quantised_is_refused(tmp_path: Path, nested: bool) -> None:
    write_safetensors(unshared(build("separate")[0]), tmp_path)
    setting = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
    (tmp_path / "config.json").write_text(json.dumps({"text_config": setting} if nested else setting))
    for source in (tmp_path, tmp_path / "model.safetensors"):
        with pytest.raises(
            TensorParallelError, match=r"the weights are quantised \(quantization_config, method 'fp8'\)"
        ):
            open_checkpoint(source)
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": None}))
    assert open_checkpoint(tmp_path).keys()


def test_not_strict_reports_what_is_missing() -> None:
    part, plan, model = shell("separate")
    state = {key: value for key, value in unshared(model).items() if key != "head.bias"}
    report = load_sharded(part, state, plan, 0, strict=False)
    assert report.missing == ("head.bias",)
    assert part.get_parameter("head.bias").is_meta


def test_plan_must_be_applied() -> None:
    model, inputs = build("separate")
    plan = plan_tensor_parallel(model, inputs, 2)
    with pytest.raises(TensorParallelError, match="Apply the plan"):
        load_sharded(model, unshared(model), plan, 0)


def test_lost_buffers_are_named() -> None:
    with torch.device("meta"):
        part = EXAMPLES["slopes"].build()
    model, inputs = build("slopes")
    plan = plan_tensor_parallel(model, inputs, 2)
    apply_plan(part, plan, 0, Communicator(None, 0, 2))
    with pytest.raises(TensorParallelError, match="empty_parameters"):
        load_sharded(part, unshared(model), plan, 0)


def test_plan_of_a_model_on_meta_is_the_same() -> None:
    for name in ("language", "slopes", "stacked_experts", "state_space"):
        model, inputs = build(name)
        assert plan_tensor_parallel(empty(name), inputs, 2) == plan_tensor_parallel(model, inputs, 2)


def test_empty_parameters_leaves_the_library_as_it_was() -> None:
    before = nn.Module.register_parameter
    with pytest.raises(ZeroDivisionError), empty_parameters():
        raise ZeroDivisionError
    assert nn.Module.register_parameter is before
    assert not any(parameter.is_meta for parameter in nn.Linear(2, 2).parameters())


def test_smallest_size() -> None:
    model, inputs = build("separate")
    weights = sum(value.numel() * 4 for value in model.parameters())
    one = smallest_tensor_parallel_size(model, 2 * weights)
    assert (one.tensor_parallel_size, one.plan) == (1, None)
    two = smallest_tensor_parallel_size(model, int(weights * 0.75), inputs, headroom_fraction=0.1)
    assert two.tensor_parallel_size == 2
    assert two.plan is not None
    assert two.rank_bytes == two.plan.max_rank_bytes <= 0.9 * int(weights * 0.75)
    assert "2 ranks" in two.describe()
    with pytest.raises(ModelDoesNotFitError, match=r"8 ranks: .* too much") as caught:
        smallest_tensor_parallel_size(model, weights // 20, inputs)
    assert caught.value.needed_bytes > caught.value.budget_bytes
    with pytest.raises(TensorParallelError, match="example_input"):
        smallest_tensor_parallel_size(model, int(weights * 0.75))


def test_open_checkpoint_lists_keys(tmp_path: Path) -> None:
    model = randomized(nn.Linear(4, 3))
    checkpoint = open_checkpoint(write_safetensors(unshared(model), tmp_path))
    assert sorted(checkpoint.keys()) == ["bias", "weight"]
    assert checkpoint.shape("weight") == (3, 4)
    value, num_bytes = checkpoint.read("weight", 1, ((0, 1), (3, 4)))
    assert torch.equal(value, model.weight[:, [0, 3]])
    assert num_bytes == 3 * 2 * 4
