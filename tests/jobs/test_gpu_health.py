"""A whole job, in processes of its own, one of whose GPUs fails while it runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_gpuorch import read_predictions
from lightning_gpuorch.telemetry import check_event, read_events
from tests.conftest import Runner
from tests.support.gpus import eventually
from tests.support.nvml import FakeNVML

SCRIPT = Path(__file__).with_name("job_with_gpus.py")


@pytest.mark.parametrize(
    ("xid", "found", "evidence"),
    [
        (79, "failed", "xid_79: GPU has fallen off the bus"),
        (145, "drain", "xid_145: NVLink RLW error"),
    ],
)
def test_a_sick_gpu_retires_its_replica_and_every_prediction_is_there(
    runner: Runner, tmp_path: Path, fake_library: Path, xid: int, found: str, evidence: str
) -> None:
    gpus = FakeNVML(tmp_path, num_gpus=4, library=fake_library)
    output = tmp_path / "out"
    process = runner.start(str(SCRIPT), gpus.library, gpus.state_file, output)
    eventually(lambda: len(list(output.glob("dataloader_0/*.gpq"))) >= 4 or process.poll() is not None, 90)
    gpus.send_xid(1, xid)
    assert runner.wait(process, 90) == 0, runner.log_of(process)
    predictions = read_predictions(output)
    assert [float(sample) for sample in predictions.samples()] == [2.0 * i for i in range(2000)]
    (records,) = (output / "runs").iterdir()
    events, _ = read_events(records / "events")
    assert [line for event in events for line in check_event(event)] == []
    (verdict,) = (event for event in events if event["kind"] == "verdict")
    assert (verdict["rank"], verdict["verdict"], verdict["device"]) == (1, found, gpus.uuid(1))
    assert verdict["evidence"][0] == evidence
    assert evidence in (records / "report.html").read_text(encoding="utf-8")
    (retired,) = (event for event in events if event["kind"] == "retire")
    assert (retired["replica"], evidence in retired["reason"]) == (1, True)
    late = [e for e in events if e["kind"] == "chunk" and e["rank"] == 1 and e["ts"] > retired["ts"]]
    assert not late, "the replica of the sick GPU goes on"
    assert not [event for event in events if event["kind"] == "restart"]
    if found == "drain":
        chunks = [event["chunk"] for event in events if event["kind"] == "chunk"]
        assert len(chunks) == len(set(chunks)), "what the replica held was finished, not computed again"
    temperatures = {e["rank"] for e in events if e["kind"] == "device" and e.get("temperature_celsius") == 45}
    assert temperatures == {0, 1}


def test_a_replica_that_does_not_leave_a_gpu_about_to_fail_is_ended(
    runner: Runner, tmp_path: Path, fake_library: Path
) -> None:
    gpus = FakeNVML(tmp_path, num_gpus=4, library=fake_library)
    output, hold = tmp_path / "out", tmp_path / "out.hold"
    environment = {"GPUORCH_EXIT_TIMEOUT_SEC": "1"}
    process = runner.start(str(SCRIPT), gpus.library, gpus.state_file, output, environment=environment)
    eventually(lambda: len(list(output.glob("dataloader_0/*.gpq"))) >= 4 or process.poll() is not None, 90)
    hold.touch()
    gpus.send_xid(1, 145)
    assert runner.wait(process, 90) == 0, runner.log_of(process)
    assert [float(sample) for sample in read_predictions(output).samples()] == [2.0 * i for i in range(2000)]
    (records,) = (output / "runs").iterdir()
    events, _ = read_events(records / "events")
    (retired,) = (event for event in events if event["kind"] == "retire")
    assert retired["replica"] == 1
    assert "xid_145" in retired["reason"]
    assert "did not leave in time" in retired["reason"]
