"""Every way to start a job."""

import shutil
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
from torch.distributed import TCPStore

from lightning_gpuorch.control.handshake import Peer
from lightning_gpuorch.control.messages.leases import GetProgress
from lightning_gpuorch.control.shared_secret import CoordinatorPlace
from lightning_gpuorch.control.transport import RemoteChannel
from lightning_gpuorch.errors import AuthenticationError
from tests.conftest import free_port


def _tool(name):
    path = shutil.which(name, path=sys.exec_prefix + "/bin") or shutil.which(name)
    assert path, f"{name} is not installed"
    return path


LAUNCHERS = {
    "gpuorch run": lambda: (_tool("gpuorch"), "run", "--devices", "2", "--accelerator", "cpu"),
    "lightning run": lambda: (_tool("lightning"), "run", "--devices", "2", "--strategy", "gpuorch"),
    "lightning run model": lambda: (_tool("lightning"), "run", "model", "--devices", "2"),
    "fabric run": lambda: (_tool("fabric"), "run", "--devices", "2", "--main-port", str(free_port())),
    "torchrun": lambda: (_tool("torchrun"), "--nproc-per-node", "2", "--master-port", "0", "--standalone"),
}


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_launcher_runs_a_fabric_script(runner, launcher, tmp_path):
    finished = runner.run("launched_fabric.py", launcher=LAUNCHERS[launcher](), timeout=120)
    assert finished.result == {"world": 2, "complete": True, "ranks": [0, 1]}
    assert not list(tmp_path.glob("gpuorch/*")), "results nobody asked to keep were left behind"


@pytest.mark.parametrize("launcher", ["gpuorch run", "torchrun"])
def test_launcher_runs_a_trainer_script(runner, launcher):
    verdict = runner.run("output_types.py", "--devices", 2, launcher=LAUNCHERS[launcher](), timeout=170).result
    assert verdict
    assert all(verdict.values())


def test_a_stranger_finds_no_secret_in_the_store_of_torchrun(runner, tmp_path):
    port = free_port()
    torchrun = (_tool("torchrun"), "--nproc-per-node", "2", "--master-port", str(port))
    process = runner.start("slow_predict.py", "--output", "out", "--samples", 400, launcher=torchrun)
    deadline = time.monotonic() + 90
    while not list(tmp_path.glob("out/dataloader_0/part-*.gpq")):
        assert time.monotonic() < deadline, runner.log_of(process)
        time.sleep(0.05)
    store = TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=10))
    place = CoordinatorPlace.read(store.get("gpuorch/attempt-0/coordinator"))
    token = (Path(place.secret_directory) / "token").read_text()  # which another user could not read
    assert len(token) == 32
    for key in store.list_keys():
        assert token.encode() not in store.get(key)
    with pytest.raises(AuthenticationError):
        RemoteChannel(f"127.0.0.1:{place.port}", Peer("rank", 1), "").call(GetProgress(job=0), timeout_seconds=10)
    assert runner.wait(process, 120) == 0, runner.log_of(process)
    assert not Path(place.secret_directory).exists()


def test_notebook_cells(runner):
    result = runner.run("notebook.py", timeout=150).result
    assert result.pop("fabric") == [21.0, 2]
    assert len(result) == 4
    assert all(result.values())


def test_the_launching_process_runs_no_user_code_after_predict(runner):
    finished = runner.run("output_types.py", "--devices", 2, timeout=170)
    assert finished.result
    assert all(finished.result.values())
    assert finished.output.count("results in") == 8, "each job is announced once, by rank 0"


def test_device_count_that_does_not_divide_is_refused_before_start(runner):
    finished = runner.run("tp_trainer.py", "--devices", 3, "--tp", 2, code=78)
    assert "3 devices cannot be cut into replicas of tensor_parallel_size=2" in finished.output


def test_unknown_environment_variable_is_refused(runner):
    finished = runner.run("tp_trainer.py", code=78, environment={"GPUORCH_TIMEOUT_SECS": "5"})
    assert "did you mean 'GPUORCH_TIMEOUT_SEC'" in finished.output
