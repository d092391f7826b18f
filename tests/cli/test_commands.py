"""``gpuorch doctor``, ``top`` and ``calibrate``, as a user runs them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from lightning_gpuorch.cli import gpuorch
from lightning_gpuorch.cli.doctor import parse_bytes
from lightning_gpuorch.telemetry import read_endpoint
from lightning_gpuorch.telemetry.run_directory import create_run_directory, find_runs, sweep
from tests.conftest import SCRIPTS, Runner
from tests.support.nvml import FakeNVML, build_library, find_compiler

TOOL = str(Path(sys.executable).with_name("gpuorch"))


def eventually(condition: Any, timeout_seconds: float = 90.0) -> Any:
    deadline = time.monotonic() + timeout_seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "did not come true in time"
        time.sleep(0.05)
    return found


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("24GiB", 24 * 2**30),
        ("80GB", 80 * 10**9),
        ("1.5 gib", 3 * 2**29),
        ("1000", 1000),
        ("512M", 512 * 10**6),
        ("8kib", 8192),
    ],
)
def test_sizes_are_read(text: str, count: int) -> None:
    assert parse_bytes(text) == count


@pytest.mark.parametrize("text", ["", "GiB", "-1GB", "24 apples", "0", "1e9"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="no size"):
        parse_bytes(text)
    refused = CliRunner().invoke(gpuorch, ["doctor", "--model", "m:f", "--memory-budget", text])
    assert refused.exit_code == 2
    assert "no size" in refused.output


def test_doctor_names_a_sick_gpu_and_says_so_with_its_exit_code(tmp_path: Path) -> None:
    if find_compiler() is None:
        pytest.skip("no C compiler")
    gpus = FakeNVML(tmp_path, num_gpus=3, library=build_library(tmp_path))
    gpus.attach()
    try:
        well = CliRunner().invoke(gpuorch, ["doctor", "--output-dir", str(tmp_path)])
        gpus.set(2, lost=1)
        gpus.set(1, p2p=5, topology=50)
        sick = CliRunner().invoke(gpuorch, ["doctor", "--output-dir", str(tmp_path)])
    finally:
        gpus.detach()
    assert well.exit_code == 0, well.output
    assert "0-1, 0-2, 1-2 behind one PCIe switch; all pairs can read each other's memory" in well.output
    assert sick.exit_code == os.EX_CONFIG
    assert "BAD   GPU 2" in sick.output
    assert "0-1 across CPU sockets; no peer access: 0-1" in " ".join(sick.output.split())


def test_doctor_says_how_a_model_would_be_cut(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "import torch\ndef make():\n"
        "    torch.manual_seed(0)\n"
        "    layers = torch.nn.Linear(64, 256), torch.nn.ReLU(), torch.nn.Linear(256, 64)\n"
        "    return torch.nn.Sequential(*layers), torch.ones(2, 64)\n"
    )
    done = subprocess.run(
        [TOOL, "doctor", "--model", "mine:make", "--tensor-parallel-size", "2", "--memory-budget", "1GiB"],
        cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Sequential: 33,088 parameters" in done.stdout
    small = CliRunner().invoke(gpuorch, ["doctor", "--tensor-parallel-size", "2"])
    assert small.exit_code == 2
    assert "--model" in small.output
    unknown = CliRunner().invoke(gpuorch, ["doctor", "--model", "no.such.module:f"])
    assert unknown.exit_code == os.EX_CONFIG, unknown.output


def test_top_finds_a_running_job_by_itself_by_its_output_and_by_its_id(runner: Runner, tmp_path: Path) -> None:
    output = tmp_path / "out"
    environment = {"TMPDIR": str(tmp_path)}
    process = runner.start(
        "observed.py", "--devices", 2, "--output", output, "--samples", 20000, "--step", 0.05, environment=environment
    )

    def top(*arguments: Any, code: int | None = 0) -> str:
        done = subprocess.run(
            [TOOL, "top", *map(str, arguments)], env={**os.environ, **environment, "COLUMNS": "150"}, capture_output=True,
            text=True, timeout=60, check=False,
        )  # fmt: skip
        assert code is None or done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

    eventually(lambda: "2 of 2 ranks at work" in top("--once", code=None) or process.poll() is not None)
    seen = top("--once")
    assert "of 20,000 samples" in seen, runner.log_of(process)
    (run_id,) = (path.name for path in (tmp_path / f"gpuorch-{os.getuid()}").iterdir())
    assert "of 20,000 samples" in top(output, "--once")
    assert "of 20,000 samples" in top(run_id, "--once")
    assert "is no run's id" in top(tmp_path / "elsewhere", code=1)
    watching = subprocess.Popen(
        [TOOL, "top", "--refresh", "0.2"], env={**os.environ, **environment}, stdout=subprocess.PIPE, text=True
    )
    try:
        time.sleep(1.0)  # so that it looks at least once while the job runs
        process.send_signal(signal.SIGTERM)
        assert runner.wait(process, 60) == 75
        shown, _ = watching.communicate(timeout=60)
    finally:
        watching.kill()
    assert f"{run_id} is over" in shown
    assert "exit code 75" in top(output, "--once"), "as it ended, from the records beside the predictions"
    assert "no job of yours is running" in top(code=1)


def test_a_killed_run_is_known_as_dead_and_swept_away_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    mine = create_run_directory("run-a")
    code = "from lightning_gpuorch.telemetry.run_directory import create_run_directory as c; c('run-b')"
    subprocess.run([sys.executable, "-c", code], env={**os.environ, "TMPDIR": str(tmp_path)}, check=True, timeout=60)
    assert {run.run_id: run.alive for run in find_runs()} == {"run-a": True, "run-b": False}
    sweep(3600)
    assert len(find_runs()) == 2
    sweep(0)
    assert [run.directory for run in find_runs()] == [mine]


def test_a_run_lives_while_its_lock_is_held_whatever_its_process_is_called(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A container that shares the temporary directory has process numbers of its own, and a clock may jump."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    owner = create_run_directory("run-a") / "run.json"
    told = json.loads(owner.read_text())
    owner.write_text(json.dumps({**told, "pid": 2**22 + 1, "began": told["began"] - 30 * 86400}))
    sweep(0)
    assert [(run.run_id, run.alive) for run in find_runs()] == [("run-a", True)]


IN_A_CONTAINER = """
import sys
from lightning_gpuorch.telemetry.run_directory import create_run_directory, find_runs, sweep
create_run_directory("run-b")
sweep(0)
print(sorted((run.run_id, run.alive) for run in find_runs()), flush=True)
sys.stdin.read()
"""


def test_containers_that_share_the_temporary_directory_take_each_other_s_runs_for_alive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    enter = ["unshare", "--pid", "--fork", "--mount-proc"]
    if shutil.which("unshare") is None or subprocess.run([*enter, "true"], capture_output=True, timeout=60).returncode:
        pytest.skip("namespaces are not permitted here")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    create_run_directory("run-a")
    both = [("run-a", True), ("run-b", True)]
    with subprocess.Popen(
        [*enter, sys.executable, "-c", IN_A_CONTAINER], env={**os.environ, "TMPDIR": str(tmp_path)},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as container:  # fmt: skip
        assert container.stdout is not None
        assert container.stdout.readline().strip() == str(both)
        sweep(0)
        assert sorted((run.run_id, run.alive) for run in find_runs()) == both
        container.communicate(timeout=60)
    assert sorted((run.run_id, run.alive) for run in find_runs()) == [("run-a", True), ("run-b", False)]


def test_a_directory_that_somebody_else_may_write_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    foreign = tmp_path / f"gpuorch-{os.getuid()}"
    foreign.mkdir()
    foreign.chmod(0o777)
    assert create_run_directory("run-a").parent == tmp_path


def test_calibrate_measures_one_device_and_a_job_shows_its_efficiency(runner: Runner, tmp_path: Path) -> None:
    baseline, output = tmp_path / "baseline.json", tmp_path / "out"
    script = [str(SCRIPTS / "observed.py"), "--step", "0.02", "--samples", "4000", "--output", str(output)]
    done = subprocess.run(
        [TOOL, "calibrate", "--seconds", "2", "--output", str(baseline), *script, "--devices", "2"],
        cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "samples per second on one device" in done.stdout
    assert not output.exists(), "calibrating must not leave predictions that a run would take for its own"
    found = json.loads(baseline.read_text())
    assert 20 < found["samples_per_second"] < 200, "4 samples per 20 ms at best"
    assert (found["fingerprint"]["model"], found["fingerprint"]["batch_sizes"]) == ("Model", [4])

    environment = {"GPUORCH_BASELINE_FILE": str(baseline), "TMPDIR": str(tmp_path)}
    process = runner.start(*script, "--devices", 1, environment=environment)

    def efficiency() -> float | None:
        assert process.poll() is None, runner.log_of(process)
        for directory in tmp_path.glob("gpuorch-*/run-*/metrics"):
            endpoint = read_endpoint(directory)
            if endpoint is not None:
                with urllib.request.urlopen(f"http://127.0.0.1:{endpoint['port']}/metrics", timeout=5) as answer:
                    text = answer.read().decode()
                for line in text.splitlines():
                    if line.startswith("distributed_scaling_efficiency_percent"):
                        return float(line.split()[-1])
        return None

    assert 50 < eventually(efficiency) < 200, "one device, as it was measured; the machine may be busy"


def test_run_takes_the_options_of_fabric_run() -> None:
    # They are restated, not imported: importing Fabric's would cost the supervisor torch.
    from lightning.fabric.cli import _run as fabric_run

    ours = {option.name: option for option in gpuorch.commands["run"].params}
    assert [name for name in ours if name not in ("cluster", "address")] == [o.name for o in fabric_run.params]
    for option in fabric_run.params:
        mine = ours[option.name]
        assert set(option.opts) <= set(mine.opts)
        assert mine.nargs == option.nargs
        if option.name != "strategy":
            assert str(mine.default) == str(option.default)
    assert list(ours["precision"].type.choices) == list(
        next(option for option in fabric_run.params if option.name == "precision").type.choices
    )
    accelerators = next(option for option in fabric_run.params if option.name == "accelerator").type.choices
    assert set(ours["accelerator"].type.choices) - {"auto"} == set(accelerators) - {"auto", "mps", "tpu"}
