"""A model gets ready on one rank: where its weights and its example come from, and what is refused before any forward."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

import lightning_gpuorch
from lightning_gpuorch.devices.memory import total_memory_bytes
from lightning_gpuorch.errors import ConfigurationError, ModelDoesNotFitError, TensorParallelError
from lightning_gpuorch.parallel.tensor_parallel import (
    LayerKind,
    TensorParallelPlan,
    empty_parameters,
    find_example_input,
    plan_tensor_parallel,
)
from lightning_gpuorch.parallel.tensor_parallel.example_input import Calls, planned_calls
from lightning_gpuorch.predictions.samples.tensors import fingerprint_files, fingerprint_tensors, fingerprint_weights
from lightning_gpuorch.worker.model_setup import first_batch, plan_cache_directory


def network(width: int = 8) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, width), nn.BatchNorm1d(width), nn.Linear(width, 2)).eval()


def on_meta(width: int = 8) -> nn.Module:
    with empty_parameters():
        return network(width)


@pytest.fixture
def orchestrator() -> Iterator[Any]:
    one = lightning_gpuorch.MultiGPUOrchestrator(plan_cache="off")
    one.initialize()
    yield one
    one.cleanup()


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """A checkpoint in two files with an index."""
    state = network().state_dict()
    names = sorted(state)
    for number, part in enumerate((names[:4], names[4:]), 1):
        save_file({name: state[name] for name in part}, tmp_path / f"part-{number}.safetensors")
    files = {name: f"part-{1 if name in names[:4] else 2}.safetensors" for name in names}
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return index


def test_a_checkpoint_is_read_into_a_model_on_meta_or_with_weights(orchestrator: Any, weights: Path) -> None:
    batch = torch.randn(5, 4)
    expected = network()(batch)
    for source, model in itertools.product((weights, weights.parent), (on_meta(), network().double().float())):
        loaded = orchestrator.load_distributed_model(source, model)
        assert not loaded.training
        assert torch.equal(orchestrator.run_inference_step(batch), expected)
        report = orchestrator.model_setup.load_report
        assert report.bytes_read == sum(value.nbytes for value in network().state_dict().values())
        assert orchestrator.model_setup.fingerprint(loaded) == fingerprint_files(weights)


def test_bad_checkpoints_are_named_before_any_forward(orchestrator: Any, weights: Path, tmp_path: Path) -> None:
    def refusal(source: Any, model: nn.Module | None, kind: type[Exception] = TensorParallelError) -> str:
        with pytest.raises(kind) as caught:
            orchestrator.load_distributed_model(source, model)
        return str(caught.value)

    assert "is of another model" in refusal(weights, on_meta(width=6))
    assert "2.weight has shape (2, 8), the model needs (2, 6)" in refusal(weights, on_meta(width=6))
    deeper = nn.Sequential(*network(), nn.Linear(2, 2))
    assert "lacks 2 of the model's" in refusal(weights, deeper)
    assert "needs model=" in refusal(weights, None, ConfigurationError)
    assert "no checkpoint at" in refusal(tmp_path / "nothing.safetensors", on_meta(), ConfigurationError)
    assert "6 parameters of Sequential are on meta" in refusal(on_meta(), None, ConfigurationError)
    second = weights.parent / "part-2.safetensors"
    content = second.read_bytes()
    second.write_bytes(content[: len(content) // 2])
    assert f"{second} is damaged" in refusal(weights, on_meta())
    second.unlink()
    assert "1 are missing: part-2.safetensors" in refusal(weights, on_meta())


def test_keys_without_a_place_are_named(orchestrator: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_file({**network().state_dict(), "extra.head": torch.ones(3)}, tmp_path / "more.safetensors")
    with caplog.at_level("WARNING", logger="lightning_gpuorch"):
        orchestrator.load_distributed_model(tmp_path / "more.safetensors", on_meta())
    assert "1 keys of" in caplog.text
    assert "extra.head" in caplog.text


def test_a_model_larger_than_the_budget_is_refused_with_the_arithmetic() -> None:
    fraction = 100 / total_memory_bytes(torch.device("cpu"))
    one = lightning_gpuorch.MultiGPUOrchestrator(memory_fraction=fraction)
    one.initialize()
    with pytest.raises(
        ModelDoesNotFitError, match=r"Sequential needs .* too little; tensor_parallel_size=\d+ would do"
    ):
        one.load_distributed_model(network())
    one.cleanup()


def test_a_transformers_directory_says_what_to_build(orchestrator: Any, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=64, n_embd=16, n_layer=1, n_head=2, n_positions=32)
    whole = transformers.GPT2LMHeadModel(config).eval()
    whole.save_pretrained(tmp_path)
    model = orchestrator.load_distributed_model(tmp_path)
    ids = torch.arange(12).view(2, 6)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, whole(ids).logits)
    assert model.lm_head.weight is model.transformer.wte.weight


def test_wrong_settings_are_refused() -> None:
    make = lightning_gpuorch.GPUOrchStrategy
    plan = plan_tensor_parallel(nn.Sequential(nn.Linear(4, 4)), torch.ones(2, 4), 2)
    with pytest.raises(ConfigurationError, match="not both"):
        make(tensor_parallel_plan=plan, parallelize_fn=lambda module, mesh: module)
    with pytest.raises(ConfigurationError, match="is a str; expected a TensorParallelPlan"):
        make(tensor_parallel_plan="plan.json")
    with pytest.raises(TensorParallelError, match="format version None"):
        make(tensor_parallel_plan={"layers": {}})
    with pytest.raises(ConfigurationError, match="verify='always'"):
        make(verify="always")
    with pytest.raises(ConfigurationError, match="5 devices cannot be cut into replicas of tensor_parallel_size=2"):
        lightning_gpuorch.MultiGPUOrchestrator(tensor_parallel_size=2).initialize(0, 5)


def test_the_example_comes_from_the_first_source_that_has_one() -> None:
    model: Any = network()
    batch = torch.randn(9, 4)
    cut, source = find_example_input(model, batch)
    assert source == "batch"
    assert torch.equal(cut, batch[:2])
    model.dummy_inputs = {"input": torch.ones(3, 4)}
    assert find_example_input(model, batch)[1] == "dummy_inputs"
    model.main_input_name = "pixel_values"  # and the dummy is of something else
    assert find_example_input(model, batch)[1] == "batch"
    model.example_input_array = torch.zeros(2, 4)
    assert find_example_input(model, batch)[1] == "example_input_array"
    with pytest.raises(TensorParallelError, match="Nothing says what Linear is called with"):
        find_example_input(nn.Linear(2, 2))


class Stream(IterableDataset):
    def __iter__(self) -> Iterator[torch.Tensor]:
        return iter(torch.arange(6.0))


def test_the_first_batch_of_every_kind_of_loader() -> None:
    rows = torch.arange(12.0).view(6, 2)
    assert torch.equal(first_batch(DataLoader(rows, batch_size=4)), rows[:4])
    assert torch.equal(first_batch(DataLoader(rows, batch_size=4, shuffle=True)), rows[:4])
    assert torch.equal(first_batch(DataLoader(rows, batch_sampler=[[3, 1], [0]])), rows[[3, 1]])
    assert torch.equal(first_batch(DataLoader(rows, batch_size=None)), rows[0])
    assert torch.equal(first_batch(DataLoader(Stream(), batch_size=3)), torch.arange(3.0))
    assert torch.equal(first_batch([rows, rows]), rows)
    assert first_batch([]) is None
    assert first_batch(DataLoader(rows[:0], batch_size=4)) is None


def test_where_plans_are_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert plan_cache_directory("off") is None
    assert plan_cache_directory(str(tmp_path)) == tmp_path
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert plan_cache_directory("auto") == tmp_path / "lightning_gpuorch" / "plans"


def test_fingerprints_follow_the_weights_and_nothing_else(tmp_path: Path) -> None:
    model = network()
    assert fingerprint_weights(model) == fingerprint_tensors(model.state_dict())
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        save_file(model.state_dict(), tmp_path / name / "model.safetensors")
    first = fingerprint_files(tmp_path / "a")
    assert fingerprint_files(tmp_path / "b" / "model.safetensors") == first
    with torch.no_grad():
        model[0].weight[0, 0] += 1  # type: ignore[index,operator]
    save_file(model.state_dict(), tmp_path / "b" / "model.safetensors")
    assert fingerprint_files(tmp_path / "b") != first


class Steps(nn.Module):
    """Has a forward that is whole and a step that takes hidden channels out."""

    example_input_array = torch.ones(2, 64)

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(64, 128), nn.Linear(128, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.up(x).sigmoid())

    def predict_step(self, batch: torch.Tensor, batch_idx: int, dataloader_idx: int = 0) -> torch.Tensor:
        return self.up(batch).sigmoid() if dataloader_idx == 0 else self(batch)


def plan_of(model: nn.Module, calls: Calls) -> TensorParallelPlan:
    call, *also = calls
    return plan_tensor_parallel(model, call.args, 2, example_kwargs=call.kwargs, method=call.method, also=also)


def test_what_is_planned_is_what_will_be_called() -> None:
    model, batch = Steps(), torch.randn(5, 64)
    first = planned_calls(model, None, lambda: [batch], "predict_step")[0]
    assert {call.method for call in first} == {"predict_step"}
    assert [len(call.args[0]) for call in first] == [2, 5]  # cut small to plan with, whole to verify with
    gathered = plan_of(model, first)
    assert gathered.layers["up"].kind is LayerKind.COLUMN_GATHER
    # Without batches a step that takes the declared example is looked at as well.
    assert plan_of(model, planned_calls(model)[0]).layers["up"].kind is LayerKind.COLUMN_GATHER
    step = model.forward  # what a plain loop is given
    assert plan_of(model, planned_calls(model, None, lambda: [batch], step)[0]).layers["up"].kind is LayerKind.COLUMN


def test_every_loader_is_planned_for() -> None:
    model, batch = Steps(), torch.randn(5, 64)
    calls = planned_calls(model, None, lambda: [batch, 2 * batch], "predict_step")[0]
    assert [call.args[2] for call in calls] == [0, 1, 0, 1]
    assert plan_of(model, calls).layers["up"].kind is LayerKind.COLUMN_GATHER


def test_a_step_that_needs_more_samples_is_planned_with_the_whole_batch() -> None:
    class Many(Steps):
        def predict_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:  # type: ignore[override]
            if len(batch) < 4:
                raise ValueError("at least 4")
            return self(batch) @ batch.T

    cut, whole = planned_calls(Many(), None, lambda: [torch.randn(5, 64)], "predict_step")
    with pytest.raises(TensorParallelError, match="at least 4"):
        plan_of(Many(), cut)
    assert plan_of(Many(), whole).layers["down"].kind is LayerKind.ROW


def test_a_step_that_takes_the_iterator() -> None:
    class Pulls(Steps):
        def predict_step(self, dataloader_iter: Iterator[Any]) -> torch.Tensor:  # type: ignore[override]
            batch, _, _ = next(dataloader_iter)
            return self(batch)

    calls = planned_calls(Pulls(), None, lambda: [torch.randn(5, 64)], "predict_step")[0]
    assert plan_of(Pulls(), calls).layers["down"].kind is LayerKind.ROW
