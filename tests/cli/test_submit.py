"""What ``gpuorch submit`` writes for the engines, and how a job is stopped from afar."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from lightning_gpuorch.cli.main import gpuorch
from lightning_gpuorch.control.coordinator import Coordinator
from lightning_gpuorch.control.server import ControlServer


def _written(*arguments: str, code: int = 0) -> str:
    result = CliRunner().invoke(gpuorch, ["submit", *arguments])
    assert result.exit_code == code, result.output
    return result.output


def test_options_after_the_script_are_the_scripts() -> None:
    text = _written(
        "slurm", "--num-nodes", "2", "--devices", "4", "Predict All.py", "--output", "out dir", "--devices", "1"
    )
    command = "gpuorch run --accelerator gpu --devices 4 'Predict All.py' --output 'out dir' --devices 1"
    assert f"srun --kill-on-bad-exit=0 --wait=0 {command}\n" in text
    for line in (
        "--job-name=predict-all",
        "--nodes=2",
        "--ntasks-per-node=1",
        "--gpus-per-node=4",
        "--signal=TERM@120",
        "--requeue",
    ):
        assert f"#SBATCH {line}\n" in text
    assert "--no-kill" not in text


def test_an_elastic_job_survives_the_loss_of_nodes_of_its_allocation() -> None:
    text = _written("slurm", "--num-nodes", "1:8", "--time", "1:00:00", "--partition", "spot", "predict.py")
    for line in ("--nodes=8", "--no-kill", "--time=1:00:00", "--partition=spot"):
        assert f"#SBATCH {line}\n" in text
    assert "--num-nodes 1:8 predict.py" in text


@pytest.mark.parametrize("queue", [(), ("--queue", "team")])
def test_a_manifest_is_what_kubernetes_takes(queue: tuple[str, ...], tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    _written(
        "kubernetes", "--num-nodes", "1:4", "--devices", "8", "--image", "r/x:1", "--volume-claim", "claim", *queue,
        "--grace-seconds", "90", "--output-dir", "/data/out", "--output", str(file), "predict.py", "--limit", "5",
    )  # fmt: skip
    service, job = yaml.safe_load_all(file.read_text())
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["command"] == [
        "gpuorch", "run", "--devices", "8", "--num-nodes", "1:4", "--node-rank", "$(JOB_COMPLETION_INDEX)",
        "--main-address", "predict-0.predict", "--main-port", "29400", "predict.py", "--limit", "5",
    ]  # fmt: skip
    assert (job["spec"]["completions"], job["spec"]["completionMode"]) == (4, "Indexed")
    assert {"name": "GPUORCH_LATE_NODE_OUTPUT_DIR", "value": "/data/out"} in container["env"]
    assert pod["terminationGracePeriodSeconds"] == 90
    assert pod["subdomain"] == service["metadata"]["name"]
    assert job["spec"].get("suspend", False) is bool(queue)
    _validate(service, job)


def _validate(*documents: dict[str, Any]) -> None:
    """Against the schemas that Kubernetes publishes, where a package has them."""
    validator = pytest.importorskip("kubernetes_validate", reason="needs kubernetes-validate")
    for document in documents:
        validator.validate(document, "1.31", strict=True)


@pytest.mark.parametrize(
    ("value", "said"), [("8:1", "the fewest nodes come first"), ("0", "at least 1"), ("many", "neither a number of nodes")]
)  # fmt: skip
def test_numbers_of_nodes_that_make_no_sense_are_refused(value: str, said: str) -> None:
    assert said in _written("slurm", "--num-nodes", value, "predict.py", code=2)


def test_stop_drains_a_job_and_needs_its_token(monkeypatch: pytest.MonkeyPatch) -> None:
    coordinator = Coordinator(1)
    server = ControlServer(coordinator, "127.0.0.1", 0, "ours")
    try:
        command = ["stop", "--main-address", "127.0.0.1", "--main-port", str(server.port)]
        monkeypatch.setenv("GPUORCH_TOKEN", "guess")
        refused = CliRunner().invoke(gpuorch, command)
        assert refused.exit_code == 1
        assert "must know the job's token" in refused.output
        assert not coordinator.draining
        monkeypatch.setenv("GPUORCH_TOKEN", "ours")
        assert CliRunner().invoke(gpuorch, command).exit_code == 0
        assert coordinator.draining
    finally:
        server.close()
