"""predict on real processes: every output kind, every loader kind, metrics, tensor parallelism, Fabric."""

import pytest

from tests.conftest import gpuorch_run


def test_every_output_kind_comes_back_complete_and_ordered_on_every_rank(runner):
    # With 2 devices, and by every launcher: test_launch.py.
    verdict = runner.run("output_types.py", "--devices", 4, timeout=170, launcher=gpuorch_run(4)).result
    assert verdict
    assert [kind for kind, right in verdict.items() if not right] == []


@pytest.mark.parametrize("devices", [1, 2])
def test_every_loader_kind_gives_what_one_device_gives(runner, devices):
    verdict = runner.run("loaders.py", "--devices", devices, timeout=170, launcher=gpuorch_run(devices)).result
    assert len(verdict) == 17
    assert [kind for kind, right in verdict.items() if not right] == []


@pytest.mark.parametrize(("devices", "tp"), [(2, 1), (2, 2), (4, 1), (4, 2)])
def test_metrics_and_synced_logs_give_the_numbers_of_one_device(runner, devices, tp):
    result = runner.run(
        "metrics.py", "--devices", devices, "--tp", tp, timeout=170, launcher=gpuorch_run(devices)
    ).result
    expected = result["expected"]
    assert result["predict"] == pytest.approx(expected["accuracy"], abs=1e-6)
    assert result["test"] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("devices", "tp"), [(2, 2), (4, 2)])
def test_tensor_parallel_trainer_equals_the_unsharded_model(runner, devices, tp):
    result = runner.run(
        "tp_trainer.py", "--devices", devices, "--tp", tp, timeout=170, launcher=gpuorch_run(devices)
    ).result
    assert max(result["differences"]) < 1e-5
    assert result["same_batches"]
    assert result["each_once"]
    assert (result["world"], result["torch_world"]) == (devices, tp)


def test_a_model_goes_tensor_parallel_without_a_plan_by_hand(runner):
    result = runner.run("tp_auto.py", "--devices", 4, "--tp", 2, timeout=170).result
    assert result["trainer"] < 1e-5
    assert result["fabric"] < 1e-5
    assert result["local_rows"] == 64 // 2


@pytest.mark.parametrize(("devices", "tp"), [(1, 1), (2, 1), (4, 2)])
def test_fabric_collectives_shares_and_orchestrator(runner, devices, tp):
    result = runner.run("fabric_job.py", "--devices", devices, "--tp", tp, timeout=170).result
    replicas = devices // tp
    assert result["world"] == devices
    assert result["broadcast"] == f"from {devices - 1}"
    assert result["gathered"] == list(range(devices))
    assert result["sum"] == sum(range(replicas))
    assert result["mean"] == sum(range(replicas)) / replicas
    assert result["shares"]
    assert result["difference"] < 1e-5
    assert result["hooks"]
    assert result["batches"] == 6
    assert result["samples_done"] == 23
    if tp > 1:
        assert "ranks [1] of replica 0 were given another batch" in result["mismatch"]


def test_memory_stays_flat_over_700_mib_of_predictions(runner):
    result = runner.run("flat_memory.py", "--devices", 1, timeout=170).result
    assert result["predicted_mib"] > 700
    assert result["growth_mib"] < 30, result


def test_fit_then_predict_in_one_script(runner):
    result = runner.run("fit.py", "--devices", 2, timeout=170).result
    assert result["weights_agree"]
    assert result["gradients_synced"]
    assert result["complete"]
