"""Jobs of a real SLURM of two nodes, which this machine plays both of."""

from __future__ import annotations

import shlex
import shutil
import sys
import time
from pathlib import Path

import pytest

from lightning_gpuorch import read_predictions
from tests.conftest import SCRIPTS, free_port
from tests.support import slurm

pytestmark = [
    pytest.mark.root,
    pytest.mark.timeout(400),
    pytest.mark.skipif(slurm.missing() is not None, reason=str(slurm.missing())),
]
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """A SLURM of nodes n1 and n2."""
    running = slurm.Slurm(tmp_path_factory.mktemp("slurm") / "cluster", [free_port() for _ in range(4)])
    yield running
    running.close()


def _wait_until(condition, what, log: Path, seconds=180):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"no {what} within {seconds} s:\n{log.read_text() if log.exists() else ''}"
        time.sleep(0.1)


def test_the_script_that_submit_writes_runs_on_two_nodes_stops_on_a_notice_and_is_requeued(
    cluster, tmp_path, monkeypatch
):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    gpuorch = str(Path(sys.executable).with_name("gpuorch"))
    notes, log = tmp_path / "notes.txt", tmp_path / "log.txt"
    script = shutil.copy(SCRIPTS / "slow_predict.py", tmp_path)
    shutil.copy(SCRIPTS / "common.py", tmp_path)
    arguments = ("--devices", "1", "--samples", "4000", "--output", "out", "--notes", str(notes), "--hurry", "hurry")
    batch = tmp_path / "job.sh"
    written = cluster.run(
        gpuorch, "submit", "slurm", "--num-nodes", "2", "--accelerator", "cpu", "--output", str(batch), script,
        *arguments,
    )  # fmt: skip
    assert written.returncode == 0, written.stderr
    # A fresh shell of SLURM's does not have this environment's programs.
    batch.write_text(
        batch.read_text().replace(
            "srun ", f"cd {shlex.quote(str(tmp_path))}\nPATH={Path(gpuorch).parent}:$PATH srun ", 1
        )
    )
    submitted = cluster.run("sbatch", f"--output={log}", str(batch))
    assert submitted.returncode == 0, submitted.stderr
    job = submitted.stdout.split()[-1]

    def ranks():
        lines = notes.read_text().splitlines() if notes.exists() else []
        return {line.split()[0] for line in lines if line.count(" ") == 3}

    _wait_until(lambda: ranks() == {"0", "1"}, "work on both nodes", log)
    assert [path.name for path in (tmp_path / ".gpuorch").iterdir()] == [f"slurm-{job}-0-0.token"]
    assert cluster.run("scancel", "--signal=TERM", job).returncode == 0  # as --signal does before the time limit
    _wait_until(lambda: "Restarts=1" in cluster.run("scontrol", "show", "job", job).stdout, "requeue", log)
    (tmp_path / "hurry").touch()
    # SLURM would wait two minutes, for nodes that still clean up.
    assert cluster.run("scontrol", "update", f"JobId={job}", "StartTime=now+5").returncode == 0
    _wait_until(lambda: cluster.state_of(job) in ENDED, "end", log)
    told = log.read_text()
    assert cluster.state_of(job) == "COMPLETED", told
    assert "SIGTERM: this node leaves the job" in told
    assert "DUE TO JOB REQUEUE" in told
    values = [float(value) for batch in read_predictions(tmp_path / "out") for value in batch[:, 0]]
    assert values == [2.0 * index for index in range(4000)]
    assert not list((tmp_path / ".gpuorch").iterdir())


def test_several_tasks_on_a_node_are_refused_before_work_starts(cluster, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    ended = cluster.run(
        "srun", "--nodes=1", "--ntasks=2", "--overcommit", sys.executable, "-m", "lightning_gpuorch", "run", "--accelerator",
        "cpu", str(SCRIPTS / "slow_predict.py"), timeout=120,
    )  # fmt: skip
    assert ended.returncode == 78, ended.stderr
    assert "--ntasks-per-node=1" in ended.stderr
