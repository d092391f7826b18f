"""What a task of a SLURM step finds out by itself."""

from __future__ import annotations

import os
import stat
import threading
from pathlib import Path

import pytest

from lightning_gpuorch.control.client import NodePlace
from lightning_gpuorch.errors import ConfigurationError
from lightning_gpuorch.supervisor.slurm import SlurmStep, first_host

STEP = {
    "SLURM_JOB_ID": "1234", "SLURM_STEP_ID": "2", "SLURM_PROCID": "1", "SLURM_NODEID": "1", "SLURM_STEP_NUM_NODES": "3",
    "SLURM_STEP_NUM_TASKS": "3", "SLURM_STEP_NODELIST": "localhost,n[01-02]", "SLURM_RESTART_COUNT": "4",
}  # fmt: skip


@pytest.mark.parametrize(
    ("node_list", "host"),
    [
        ("", ""), ("n1", "n1"), ("n1,n2", "n1"), ("n[1-4]", "n1"), ("gpu[007,009-012],login", "gpu007"),
        ("rack[2-3]-n[01-16]-ib,x", "rack2-n01-ib"), ("c-1-[5,7]", "c-1-5"),
    ],
)  # fmt: skip
def test_the_first_host_of_a_node_list(node_list: str, host: str) -> None:
    assert first_host(node_list) == host


def test_a_step_tells_which_node_this_is() -> None:
    step = SlurmStep.read(STEP)
    assert step is not None
    assert step.key == "1234-2-4"
    assert step.place == NodePlace(3, 1, "localhost", 20_000 + (31 * 1234 + 2) % 10_000)
    other = SlurmStep.read({**STEP, "SLURM_STEP_ID": "3"})
    assert other is not None
    assert other.place.main_port != step.place.main_port, "steps of one job may run at the same time"


@pytest.mark.parametrize("lacking", ["SLURM_STEP_ID", "SLURM_PROCID"])
def test_outside_of_a_step_nothing_is_read(lacking: str) -> None:
    assert SlurmStep.read({name: value for name, value in STEP.items() if name != lacking}) is None
    assert SlurmStep.read({**STEP, "SLURM_JOB_NAME": "bash"}) is None


def test_several_tasks_on_a_node_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="12 tasks on 3 nodes.*--ntasks-per-node=1"):
        SlurmStep.read({**STEP, "SLURM_STEP_NUM_TASKS": "12"})


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path / ".gpuorch" / "slurm-1234-2-4.token"


def _step(node: int) -> SlurmStep:
    step = SlurmStep.read({**STEP, "SLURM_NODEID": str(node)})
    assert step is not None
    return step


def test_tasks_share_a_secret_that_is_gone_when_node_0_has_ended(home: Path) -> None:
    found: list[str] = []

    def other() -> None:
        with _step(1).shared_token(30.0) as token:
            found.append(token)

    waiting = threading.Thread(target=other)
    waiting.start()
    with _step(0).shared_token(0.0) as token:
        assert stat.S_IMODE(home.stat().st_mode) == 0o600
        assert stat.S_IMODE(home.parent.stat().st_mode) == 0o700
        waiting.join(60)
        assert found == [token]
        assert len(token) == 32
    assert not home.exists()


def test_a_secret_that_others_can_read_or_that_never_comes_is_refused(home: Path) -> None:
    with pytest.raises(ConfigurationError, match="share no secret.*set GPUORCH_TOKEN"), _step(1).shared_token(0.0):
        pass
    home.parent.mkdir()
    home.write_text("guess")
    os.chmod(home, 0o644)
    with pytest.raises(ConfigurationError, match="open to other users"), _step(1).shared_token(0.0):
        pass
    home.unlink()
    home.symlink_to(home.parent / "elsewhere")
    (home.parent / "elsewhere").write_text("guess")
    with pytest.raises(ConfigurationError, match="share no secret"), _step(1).shared_token(0.0):
        pass
