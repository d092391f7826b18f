import ast
import dataclasses
import inspect
import itertools
from pathlib import Path

import pytest

import lightning_gpuorch
from lightning_gpuorch import OrchestratorConfig
from lightning_gpuorch.errors import ConfigurationError


def test_argument_beats_environment_beats_default(monkeypatch):
    assert OrchestratorConfig.resolve().batch_size == 32
    monkeypatch.setenv("GPUORCH_BATCH_SIZE", "8")
    assert OrchestratorConfig.resolve().batch_size == 8
    assert OrchestratorConfig.resolve(OrchestratorConfig(batch_size=16)).batch_size == 16
    assert OrchestratorConfig.resolve(OrchestratorConfig(batch_size=16), batch_size=4).batch_size == 4


@pytest.mark.parametrize(
    ("variable", "text", "field", "value"),
    [
        ("GPUORCH_ENABLE_AUTO_RESTART", "off", "enable_auto_restart", False),
        ("GPUORCH_TENSOR_PARALLEL_SIZE", "auto", "tensor_parallel_size", "auto"),
        ("GPUORCH_TENSOR_PARALLEL_SIZE", "4", "tensor_parallel_size", 4),
        ("GPUORCH_LOG_LEVEL", "debug", "log_level", "DEBUG"),
        ("GPUORCH_TIMEOUT_SEC", "1.5", "timeout_sec", 1.5),
    ],
)
def test_every_kind_of_field_is_read_from_the_environment(monkeypatch, variable, text, field, value):
    monkeypatch.setenv(variable, text)
    assert getattr(OrchestratorConfig.resolve(), field) == value


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"batch_size": 0}, "batch_size=0 is out of range: it must be 1 or more"),
        ({"batch_size": "8"}, "batch_size='8' is a str; expected an integer"),
        ({"batch_size": True}, "expected an integer"),
        ({"memory_fraction": 1.5}, "greater than 0 and at most 1"),
        ({"backend": "mpi"}, "expected one of 'auto', 'nccl', 'gloo'"),
        ({"tensor_parallel_size": "many"}, "an integer or one of 'auto'"),
        ({"metrics_port": 70000}, "between 0 and 65535"),
        ({"timeout_sec": 0}, "greater than 0"),
    ],
)
def test_bad_values_are_named(fields, message):
    with pytest.raises(ConfigurationError, match=message):
        OrchestratorConfig(**fields)


def test_unknown_names_suggest_the_nearest(monkeypatch):
    with pytest.raises(ConfigurationError, match="did you mean 'timeout_sec'"):
        OrchestratorConfig.resolve(timeout_secs=3)
    monkeypatch.setenv("GPUORCH_BATCHSIZE", "3")
    with pytest.raises(ConfigurationError, match="did you mean 'GPUORCH_BATCH_SIZE'"):
        OrchestratorConfig.resolve()


def test_unreadable_environment_value(monkeypatch):
    monkeypatch.setenv("GPUORCH_BATCH_SIZE", "lots")
    with pytest.raises(ConfigurationError, match="GPUORCH_BATCH_SIZE='lots' cannot be read as an integer"):
        OrchestratorConfig.resolve()


def test_it_is_frozen_and_keyword_only():
    with pytest.raises(AttributeError):
        OrchestratorConfig().batch_size = 3
    with pytest.raises(TypeError):
        OrchestratorConfig("auto")


def test_every_field_is_read_somewhere():
    package = Path(lightning_gpuorch.__file__).parent
    trees = [ast.parse(path.read_text()) for path in package.rglob("*.py") if path.name != "config.py"]
    attributes = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    configurations = ("config", "_config", "resolved")  # what variables that hold one are called
    read = {node.attr for node in attributes if ast.unparse(node.value).split(".")[-1] in configurations}
    assert {field.name for field in dataclasses.fields(OrchestratorConfig)} - read == set()


def test_every_field_is_documented():
    """docs/configuration.md shows the docstring under each field."""
    tree = ast.parse(inspect.getsource(OrchestratorConfig))
    body = tree.body[0].body
    documented = {
        field.target.id
        for field, text in itertools.pairwise(body)
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)
    }
    assert documented == {field.name for field in dataclasses.fields(OrchestratorConfig)}
