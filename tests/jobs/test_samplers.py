"""Samplers without a fixed order: each sample once whoever dies, or refused with both ranks named."""

import pytest

from lightning_gpuorch.errors import EXIT_CONFIGURATION
from tests.conftest import gpuorch_run

LENGTH = 60


@pytest.mark.parametrize("kind", ["subset", "own_generator", "numpy_batches"])
def test_a_death_neither_loses_nor_repeats_samples_of_a_sampler_that_draws(runner, tmp_path, kind):
    arguments = ("samplers.py", "--kind", kind, "--seed", 3)
    one = runner.run(*arguments, "--devices", 1, launcher=gpuorch_run(1)).result
    two = runner.run(*arguments, "--dies", tmp_path / "died", launcher=gpuorch_run()).result
    assert (tmp_path / "died").exists()
    assert sorted(row for batch in two for row in batch) == list(range(LENGTH))
    assert two == one


def test_a_later_run_goes_on_in_the_order_that_the_first_one_drew(runner, tmp_path):
    arguments = (
        "samplers.py", "--kind", "subset", "--devices", 1, "--output", tmp_path / "out", "--dies", tmp_path / "died",
    )  # fmt: skip
    runner.run(*arguments, launcher=gpuorch_run(1), code=-9)
    assert list((tmp_path / "out").rglob("part-*")), "nothing was kept, so nothing is shown"
    again = runner.run(*arguments, launcher=gpuorch_run(1))
    assert sorted(row for batch in again.result for row in batch) == list(range(LENGTH))
    assert "gives another order now than when the job began" in again.output


@pytest.mark.parametrize(
    ("kind", "sampler"), [("subset", "SubsetRandomSampler"), ("distributed", "DistributedSampler")]
)
def test_orders_that_differ_between_ranks_are_refused_with_both_ranks_and_the_sampler_named(runner, kind, sampler):
    seed = () if kind == "subset" else ("--seed", 3)
    output = runner.run("samplers.py", "--kind", kind, *seed, launcher=gpuorch_run(), code=EXIT_CONFIGURATION).output
    assert f"order given by {sampler}" in output
    assert "on rank 0" in output
    assert "on rank 1" in output
    assert "another job" not in output
    assert "pass output_dir" not in output
