"""The report about a model: from an import path or a configuration, without weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from tp_models import build

from lightning_gpuorch.errors import ConfigurationError, ModelDoesNotFitError, TensorParallelError
from lightning_gpuorch.parallel.tensor_parallel import model_report


def grouped() -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    return build("grouped")


def without_example() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))


not_callable = 3


def test_a_factory_and_a_size() -> None:
    report = model_report("test_model_report:grouped", 2)
    assert "Example input (the factory's): (float32" in report
    assert "Tensor-parallel plan for 2 ranks" in report
    assert "on each of 2 ranks" in report


def test_without_size_or_budget_several_are_compared() -> None:
    report = model_report("test_model_report:grouped")
    assert all(f"{ranks}: " in report for ranks in ("1 rank", "2 ranks", "4 ranks", "8 ranks"))


def test_the_budget_decides_or_refuses() -> None:
    model, _ = grouped()
    weights = sum(parameter.numel() * 4 for parameter in model.parameters())
    report = model_report("test_model_report:grouped", budget_bytes=int(weights * 0.7))
    assert "1 rank: " in report
    assert "too much" in report
    assert "The smallest degree that fits is 2." in report
    assert "Tensor-parallel plan for 2 ranks" in report
    assert "1 rank" in model_report("test_model_report:grouped", budget_bytes=2 * weights)
    with pytest.raises(ModelDoesNotFitError, match=r"(?s)no tensor_parallel_size was found .*stay on every rank"):
        model_report("test_model_report:grouped", budget_bytes=int(weights / 500))
    with pytest.raises(ModelDoesNotFitError, match="does not fit 2 devices; tensor_parallel_size=4 could do") as caught:
        model_report("test_model_report:grouped", 2, int(weights * 0.45))
    assert caught.value.fitting_tensor_parallel_size == 4


def test_a_transformers_configuration(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "intermediate_size": 128,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512,
        "dtype": "bfloat16",
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    for spec in (str(tmp_path), str(tmp_path / "config.json")):
        report = model_report(spec, 2)
        assert "parameters in bfloat16" in report
        assert "model.layers.*.self_attn.o_proj  row" in report
        assert "Collectives per forward: 6" in report


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("no_such_thing", "neither a directory"),
        ("no_such_module:f", "cannot be imported"),
        ("test_model_report:missing", "has no 'missing'"),
        ("test_model_report:not_callable", "is a int; expected a callable"),
        ("builtins:dict", "returned a dict"),
        ("config.json", "holds no config.json"),
    ],
)
def test_bad_specifications_are_named(spec: str, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        model_report(spec)


def test_a_model_nobody_describes_needs_an_example() -> None:
    with pytest.raises(TensorParallelError, match="Nothing says what Sequential is called with"):
        model_report("test_model_report:without_example", 2)
