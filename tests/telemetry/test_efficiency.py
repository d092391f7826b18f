from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_gpuorch.errors import ConfigurationError
from lightning_gpuorch.telemetry.metrics.efficiency import Baseline, Calibration, ScalingEfficiency
from tests.telemetry.steps import step_record

FINGERPRINT = {"model": "ab12", "dtype": "torch.float32", "device": "cpu", "batch_size": 32}


def test_a_baseline_of_the_same_thing_is_read_back(tmp_path: Path) -> None:
    baseline = Baseline(812.5, FINGERPRINT, 20_000)
    baseline.save(tmp_path / "baseline.json")
    assert Baseline.load(tmp_path / "baseline.json", FINGERPRINT) == baseline
    assert [p.name for p in tmp_path.iterdir()] == ["baseline.json"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "cd34"}, "model was 'ab12' and is 'cd34'"),
        ({"batch_size": 64, "device": "H200"}, "batch_size was 32 and is 64; device was 'cpu' and is 'H200'"),
        ({"world": 2}, "world was None and is 2"),
    ],
)
def test_a_baseline_of_something_else_is_refused(tmp_path: Path, change: dict[str, object], message: str) -> None:
    Baseline(812.5, FINGERPRINT).save(tmp_path / "b")
    with pytest.raises(ConfigurationError, match=message):
        Baseline.load(tmp_path / "b", {**FINGERPRINT, **change})


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"samples_per_second": 1}', '{"samples_per_second": 0, "fingerprint": {}, "num_samples": 1}'],
)
def test_a_file_that_is_no_baseline_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "b").write_text(text)
    with pytest.raises(ConfigurationError):
        Baseline.load(tmp_path / "b", {})


@pytest.mark.parametrize("rate", [0.0, -1.0, float("nan")])
def test_a_baseline_must_be_positive(rate: float) -> None:
    with pytest.raises(ConfigurationError, match="must be positive"):
        Baseline(rate)


@given(st.floats(1, 1e4), st.integers(1, 64), st.integers(1, 200), st.floats(0.01, 1))
def test_a_steady_job_has_its_share_of_the_ideal(rate: float, devices: int, looks: int, share: float) -> None:
    efficiency = ScalingEfficiency(Baseline(rate), devices)
    found = None
    for i in range(looks + 1):
        found = efficiency.update(i * 1.0, round(1e6 * i * rate * devices * share))
    assert found == pytest.approx(100 * share * 1e6, rel=0.01)


def test_resumed_samples_and_the_first_moment_do_not_count_and_old_times_are_forgotten() -> None:
    efficiency = ScalingEfficiency(Baseline(100.0), num_devices=2, window_seconds=10)
    assert efficiency.update(0.0, 5000) is None  # resumed
    assert efficiency.update(0.5, 5100) is None
    assert efficiency.update(10.0, 7000) == pytest.approx(100.0)
    for second in range(11, 31):
        found = efficiency.update(float(second), 7000)
    assert found == 0.0  # a stalled job does not live on its past


@pytest.mark.parametrize(("steps", "done"), [(12, None), (13, False), (30, True)])
def test_a_calibration_counts_what_follows_the_warm_up_and_too_little_gives_no_baseline(
    tmp_path: Path, steps: int, done: bool | None
) -> None:
    calibration = Calibration(seconds=2.0, path=tmp_path / "baseline.json")
    enough = []
    for step in range(steps):
        calibration.observe_step(step_record(8, ended_seconds=200.0 + (0.1 * step if step > 2 else 50 * (step - 2))))
        enough.append(calibration.is_enough)
    if done is None:
        with pytest.raises(ConfigurationError, match="12 steps are too few"):
            calibration.finish({"model": "M"})
        assert not list(tmp_path.iterdir())
        return
    assert enough[-1] is done
    calibration.finish({"model": "M"})
    baseline = Baseline.load(tmp_path / "baseline.json", {"model": "M"})
    assert baseline.samples_per_second == pytest.approx((steps - 3) * 8 / (0.1 * (steps - 1)))
    assert baseline.num_samples == (steps - 3) * 8


def test_a_calibration_is_asked_for_by_the_environment(tmp_path: Path) -> None:
    assert Calibration.from_environment({}) is None
    asked = Calibration.from_environment({"_GPUORCH_CALIBRATION": f"2.5 {tmp_path}/a file"})
    assert asked is not None
    assert asked.path == tmp_path / "a file"


def test_a_file_that_is_too_large_is_no_baseline(tmp_path: Path) -> None:
    path = tmp_path / "baseline.json"
    with open(path, "wb") as file:
        file.truncate(2**30)
    with pytest.raises(ConfigurationError, match="holds no baseline"):
        Baseline.load(path, {})
