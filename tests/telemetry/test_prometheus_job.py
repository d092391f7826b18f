"""A real Prometheus server watches a real job whose ranks share a model: every metric, no resets, and alerts that fire."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from lightning_gpuorch.cli import gpuorch
from lightning_gpuorch.telemetry import read_endpoint
from tests.conftest import Runner
from tests.support.nvml import FakeNVML, build_library, find_compiler
from tests.telemetry.test_exporter import eventually, free_port
from tests.telemetry.test_monitoring_files import DIRECTORY, Server

pytestmark = pytest.mark.skipif(shutil.which("prometheus") is None, reason="prometheus is not installed")

NOT_HERE = {
    "distributed_scaling_efficiency_percent",  # needs a baseline; shown in tests/test_commands.py
    "gpuorch_observer_failures_total",  # nothing has failed
}


def hurried(rules: str) -> str:
    """The alert rules with shorter times, so that a test sees in seconds what takes minutes."""
    rules = re.sub(r"\[\d+m\]", "[5s]", rules)
    rules = re.sub(r"for: \d+[sm]", "for: 1s", rules)
    return rules.replace("> 120", "> 3")


@pytest.fixture
def port() -> int:
    return free_port()


@pytest.fixture
def prometheus(tmp_path: Path, port: int) -> Iterator[Server]:
    rules = tmp_path / "alerts.yml"
    rules.write_text(hurried((DIRECTORY / "alerts.yml").read_text(encoding="utf-8")))
    server = Server(tmp_path / "prometheus", port, rules)
    yield server
    server.process.kill()
    server.process.wait(10)


def firing(server: Server, alert: str) -> set[str]:
    """Ranks for which an alert fires."""
    alerts = server.ask("alerts")["alerts"]
    return {a["labels"]["rank"] for a in alerts if a["labels"]["alertname"] == alert and a["state"] == "firing"}


def documented() -> set[str]:
    text = (DIRECTORY / "index.md").read_text(encoding="utf-8")
    return set(re.findall(r"`(\w+)`", text[text.index("| metric |") : text.index("A gauge whose value")]))


@pytest.mark.skipif(find_compiler() is None, reason="no C compiler")
def test_a_real_server_watches_a_job_through_a_straggler_a_killed_rank_and_a_stall(
    runner: Runner, tmp_path: Path, prometheus: Server, port: int
) -> None:
    gpus = FakeNVML(tmp_path, num_gpus=2, library=build_library(tmp_path))
    stall = tmp_path / "stall"
    process = runner.start(
        "observed.py", "--devices", 2, "--tp", 2, "--samples", 10**6, "--step", 0.02, "--slow-rank", 1, "--slow-seconds",
        0.1, "--stall-file", stall, "--metrics-port", port, "--output", tmp_path / "out", "--nvml", gpus.library,
        gpus.state_file,
        environment={"TMPDIR": str(tmp_path), "GPUORCH_STEP_TIMEOUT_SEC": "600", "GPUORCH_HEARTBEAT_TIMEOUT_SEC": "600"},
    )  # fmt: skip

    def steps() -> dict[str, float]:
        assert process.poll() is None, runner.log_of(process)
        return prometheus.query("distributed_inference_steps_total")

    # 1. Every metric of the documentation is there, with the labels that say whose it is.
    eventually(lambda: min(steps().get(rank, 0) for rank in "01") > 10, 90)
    series = prometheus.ask("series?match[]={job=%22gpuorch%22}")
    names = {re.sub(r"_(bucket|sum|count)$", "", one["__name__"]) for one in series}
    assert documented() - names == NOT_HERE
    about_a_rank = [one for one in series if one["__name__"].startswith(("distributed_", "gpu_"))]
    assert {one["rank"] for one in about_a_rank} == {"0", "1"}
    collectives = [one for one in series if one["__name__"] == "distributed_communication_latency_seconds_count"]
    assert {"all_reduce"} <= {one["op"].lower() for one in collectives}

    # 2. Rank 1 is slower: rank 0 spends its time waiting, and the alert names the one it waits for.
    eventually(lambda: firing(prometheus, "InferenceStraggler") == {"1"}, 60)

    (records,) = (tmp_path / f"gpuorch-{os.getuid()}").glob("run-*")
    shown = CliRunner().invoke(gpuorch, ["top", str(records), "--once"], env={"COLUMNS": "160"}).output
    (line,) = (line for line in shown.splitlines() if "the others wait for it" in line)
    assert line.split()[0] == "1"

    # 3. The serving rank is killed; its replica comes back, serves on the same port, and no counter begins anew.
    metrics = records / "metrics"
    endpoint = read_endpoint(metrics)
    assert endpoint is not None
    before = steps()
    os.kill(endpoint["pid"], signal.SIGKILL)
    eventually(lambda: prometheus.query("distributed_inference_rank_restarts_total") == {"0": 1, "1": 1}, 60)
    eventually(lambda: all(steps().get(rank, 0) > before[rank] for rank in "01"), 60)
    again = read_endpoint(metrics)
    assert again is not None
    assert (again["port"], again["pid"] != endpoint["pid"]) == (port, True)
    for counter in ("distributed_inference_steps_total", "distributed_inference_step_seconds_count"):
        assert set(prometheus.query(f"resets({counter}[2m])").values()) == {0}

    # 4. Rank 0 does nothing any more, so nobody completes a step.
    Path(f"{stall}.0").touch()
    eventually(lambda: firing(prometheus, "InferenceStalled") == {"0", "1"}, 60)
    Path(f"{stall}.0").unlink()
    eventually(lambda: not firing(prometheus, "InferenceStalled"), 60)
    print(json.dumps({"steps": steps(), "series": len(series)}))
