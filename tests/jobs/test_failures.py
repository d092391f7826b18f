"""What a whole job makes of failures that a restart would only repeat, and of samples that fail."""

import pytest

from lightning_gpuorch import read_predictions
from tests.conftest import gpuorch_run

SCRIPT = "failing.py"


@pytest.mark.parametrize(("workers", "tp"), [(0, 1), (2, 1), (0, 2)])
def test_samples_that_cannot_be_read_cost_no_restart(runner, tmp_path, workers, tp):
    finished = runner.run(
        SCRIPT, "--output", "out", "--how", "read", "--workers", workers, "--tp", tp, code=65, launcher=gpuorch_run()
    )
    assert "no prediction for 2 samples: 3, 57" in finished.output
    assert "OSError: image 57 is damaged (failing.py:" in finished.output
    assert "restarting" not in finished.output
    found = read_predictions(tmp_path / "out", allow_missing=True)
    assert found.missing == [3, 57]
    assert [float(v) for batch in found for v in batch[:, 0]] == [2.0 * i for i in range(80) if i not in (3, 57)]


DAMAGED_ON_A_RANK = [5, 8, 9, 10, 11, 16, 17, 18, 19, 30]


@pytest.mark.parametrize(("workers", "dynamic"), [(0, ()), (1, ()), (0, ("--dynamic",))])
def test_the_ranks_of_a_group_agree_on_what_one_of_them_could_not_read(runner, tmp_path, workers, dynamic):
    finished = runner.run(
        SCRIPT, "--output", "out", "--how", "disks", "--workers", workers, "--tp", 2, *dynamic, code=65,
        launcher=gpuorch_run(),
    )  # fmt: skip
    assert "no prediction for 10 samples: 5, 8-11, 16-19, 30" in finished.output
    assert "rank 1 could not read it: OSError: image 30 is damaged" in finished.output
    assert "restarting" not in finished.output
    found = read_predictions(tmp_path / "out", allow_missing=True)
    assert found.missing == DAMAGED_ON_A_RANK
    values = [float(value) for batch in found if batch is not None for value in batch[:, 0]]
    assert values == [2.0 * i for i in range(80) if i not in DAMAGED_ON_A_RANK]


def test_raise_ends_the_job_at_the_first_one(runner):
    finished = runner.run(
        SCRIPT,
        "--output",
        "out",
        "--how",
        "read",
        code=1,
        launcher=gpuorch_run(),
        environment={"GPUORCH_ON_ERROR": "raise"},
    )
    assert "OSError: image 3 is damaged" in finished.output
    assert "restarting" not in finished.output


def test_more_than_max_errored_samples_end_the_job(runner):
    finished = runner.run(
        SCRIPT, "--output", "out", "--how", "read", code=65, launcher=gpuorch_run(),
        environment={"GPUORCH_MAX_ERRORED_SAMPLES": "0"},
    )  # fmt: skip
    assert "max_errored_samples=0" in finished.output


@pytest.mark.parametrize(("tp", "restarts"), [(1, 0), (2, 2)])
def test_a_sample_that_raises_in_the_step_is_given_up(runner, tmp_path, tp, restarts):
    finished = runner.run(SCRIPT, "--output", "out", "--how", "sample", "--tp", tp, code=65, launcher=gpuorch_run())
    assert "no prediction for 1 samples: 57 (ValueError: prompt is too long (failing.py:" in finished.output
    assert finished.output.count("restarting replica") == restarts
    assert finished.output.count("Traceback") == min(restarts, 1), "an equal traceback is counted, not shown again"
    found = read_predictions(tmp_path / "out", allow_missing=True)
    assert found.missing == [57]
    assert [float(v) for batch in found for v in batch[:, 0]] == [2.0 * i for i in range(80) if i != 57]


@pytest.mark.parametrize(
    ("how", "said"), [("setup", "rank 1: ValueError: label 17 is unknown"), ("bug", "KeyError: 'logits'")]
)
def test_what_a_restart_would_only_repeat_ends_the_job(runner, how, said):
    finished = runner.run(SCRIPT, "--output", "out", "--how", how, code=1, launcher=gpuorch_run())
    assert said in finished.output
    assert finished.output.count("restarting replica") == (how == "bug")
    assert finished.output.count("Traceback") == 1
    assert "lightning_gpuorch/" not in finished.output.replace("lightning_gpuorch/errors", "")


@pytest.mark.parametrize("code", [65, 75])
def test_an_exit_code_alone_is_a_death_like_any_other(runner, code):
    finished = runner.run(SCRIPT, "--output", "out", "--how", code, launcher=gpuorch_run(), timeout=60)
    assert finished.result == [2.0 * i for i in range(80)]
    assert f"exit code {code}" in finished.output


@pytest.mark.parametrize(("how", "code", "devices"), [("after", 1, 2), ("exit", 3, 2), ("after", 1, 1)])
def test_results_survive_a_script_that_fails_after_predict(runner, tmp_path, how, code, devices):
    finished = runner.run(SCRIPT, "--how", how, "--devices", devices, code=code, launcher=gpuorch_run(devices))
    assert "complete predictions are kept in" in finished.output
    assert "restarting" not in finished.output
    (kept,) = tmp_path.glob("gpuorch/*/predict-0")
    assert len(read_predictions(kept)) == 20
