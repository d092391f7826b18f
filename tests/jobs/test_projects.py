"""Known projects' own predict, with one word changed: what comes back is what one device gives."""

import importlib.util

import pytest
import torch

SCRIPTS = {
    "chemprop": "chemprop_predict.py",
    "pytorch_forecasting": "forecasting_predict.py",
    "neuralforecast": "neuralforecast_predict.py",
}


def same(one, other):
    """Equal in type and value, at any depth."""
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


@pytest.mark.job
@pytest.mark.timeout(400)
@pytest.mark.parametrize("project", SCRIPTS)
def test_predict_of_a_project_is_that_of_one_device(runner, project):
    if importlib.util.find_spec(project) is None:
        pytest.skip(f"{project} is not installed")
    found = []
    for strategy, workers in (("stock", 0), ("gpuorch", 0), ("gpuorch", 2)):
        path = runner.directory / f"{strategy}-{workers}.pt"
        process = runner.start(
            f"projects/{SCRIPTS[project]}", "--strategy", strategy, "--workers", workers, "--result", path
        )
        assert runner.wait(process, 120) == 0
        found.append(torch.load(path))
    stock, *ours = found
    assert all(same(stock, one) for one in ours)
