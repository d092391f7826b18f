"""Tensor parallelism through the strategies, on real processes: degree, loading, plans, generation, compilation."""

import pytest


@pytest.fixture
def places(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    return {"CHECKPOINTS": str(tmp_path / "checkpoints"), "XDG_CACHE_HOME": str(tmp_path / "cache")}


def test_degree_from_the_budget_and_weights_read_by_part(runner, places, tmp_path):
    done = runner.run("tp_strategies.py", "--devices", 2, timeout=170, environment=places)
    result = done.result
    ways = ("trainer", "ckpt", "safetensors", "load_distributed_model", "load_raw", "load", "bare", "right")
    for way in ways:
        assert result[way]["difference"] < 1e-5, way
        assert result[way]["size"] == 2, way
        assert result[way]["bytes"] == result[way]["planned"], way
    assert result["rest"] == {"step": 3}
    assert "blocks.0.qkv.weight is not planned for" in result["wrong"]
    assert "2 ranks: 41.38 KiB each: fits" in done.output  # the arithmetic is logged
    assert done.output.count("agrees with the unsharded block") >= len(ways)
    assert list((tmp_path / "cache/lightning_gpuorch/plans").glob("*.json"))


def test_a_model_that_fits_no_degree_is_refused_with_the_arithmetic(runner, places):
    done = runner.run("tp_strategies.py", "--devices", 2, "--budget", 0.3, timeout=170, code=78, environment=places)
    assert "Model does not fit 1 or 2 devices; tensor_parallel_size=4 could do." in done.output
    assert "at least 41.12 KiB each: too much" in done.output


def test_generation_bfloat16_and_compilation_of_a_wrapped_model(runner, places):
    """A transformers model inside a LightningModule, built on meta, its weights from a transformers directory."""
    pytest.importorskip("transformers")
    environment = {**places, "BACKEND": "inductor"}
    result = runner.run("tp_generate.py", "--devices", 2, "--tp", 2, timeout=170, environment=environment).result
    assert result["greedy"]
    assert result["sampling"]  # the same tokens on both ranks, whose own seeds differ
    assert result["beam"]
    dtype, error = result["bfloat16"]
    assert dtype == "torch.bfloat16"
    assert error < 0.03
    assert result["compiled"] < 1e-5
    assert result["sharded"]
    assert result["graphs"] == 1


def test_a_replica_that_dies_comes_back_with_the_size_that_was_decided(runner, places, tmp_path):
    done = runner.run("tp_restart.py", "--devices", 4, "--output", "out", timeout=170, environment=places)
    assert done.result["layout"] == [2, 2]
    assert done.result["difference"] < 1e-5
    assert "restarting replica 0" in done.output
    (report,) = tmp_path.glob("out/runs/*/report.html")
    assert "4 ranks, tensor-parallel size 2" in report.read_text()


def test_ranks_with_different_weights_are_found_on_the_first_batch(runner, places):
    done = runner.run("tp_restart.py", "--devices", 2, "--damaged", timeout=170, code=78, environment=places)
    assert "On the first batch, blocks.0" in done.output
    assert "differs from the unsharded block" in done.output
    assert "restarting" not in done.output
