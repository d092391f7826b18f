"""A whole job, in processes of its own, one of whose GPUs fails while it runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_gpuorch import read_predictions
from lightning_gpuorch.telemetry import check_event, read_events
from lightning_gpuorch.testing.nvml import FakeNVML
from tests.conftest import Runner
from tests.health.conftest import eventually

SCRIPT = Path(__file__).with_name("job_with_gpus.py")


@pytest.mark.parametrize("xid", [79])
def test_a_gpu_that_falls_off_the_bus_retires_its_replica_and_every_prediction_is_there(
    runner: Runner, tmp_path: Path, fake_library: Path, xid: int
) -> None:
    gpus = FakeNVML(tmp_path, num_gpus=4, library=fake_library)
    output = tmp_path / "out"
    process = runner.start(str(SCRIPT), gpus.library, gpus.state_file, output)
    eventually(lambda: len(list(output.glob("dataloader_0/*.gpq"))) >= 4 or process.poll() is not None, 90)
    gpus.send_xid(1, xid)
    assert runner.wait(process, 90) == 0, runner.log_of(process)
    predictions = read_predictions(output)
    assert [float(sample) for sample in predictions.samples()] == [2.0 * i for i in range(4000)]
    (records,) = (output / "runs").iterdir()
    events, _ = read_events(records / "events")
    assert [line for event in events for line in check_event(event)] == []
    (verdict,) = (event for event in events if event["kind"] == "verdict")
    assert (verdict["rank"], verdict["verdict"], verdict["device"]) == (1, "failed", gpus.uuid(1))
    assert verdict["evidence"][0] == "xid_79: GPU has fallen off the bus"
    (retired,) = (event for event in events if event["kind"] == "retire")
    assert (retired["replica"], retired["ranks"]) == (1, [1])
    assert "xid_79" in retired["reason"]
    chunks_of_1 = [event["ts"] for event in events if event["kind"] == "chunk" and event["rank"] == 1]
    chunks_of_0 = [event["ts"] for event in events if event["kind"] == "chunk" and event["rank"] == 0]
    assert chunks_of_1, "both have worked before"
    assert max(chunks_of_1) < retired["ts"] < max(chunks_of_0), "the other has done the rest"
    assert not [event for event in events if event["kind"] == "restart"]
    assert "xid_79: GPU has fallen off the bus" in (records / "report.html").read_text(encoding="utf-8")
    temperatures = {e["rank"] for e in events if e["kind"] == "device" and e.get("temperature_celsius") == 45}
    assert temperatures == {0, 1}
