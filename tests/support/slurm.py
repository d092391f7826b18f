"""A SLURM of two nodes on this machine: munged, slurmctld and two slurmd in a scratch directory, as root."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

from lightning_gpuorch.control.bootstrap import die_with_parent

PROGRAMS = ("munged", "slurmctld", "slurmd", "srun", "sbatch", "scontrol")
START_SECONDS = 60.0


def missing() -> str | None:
    """Why no SLURM can be started here."""
    if os.geteuid() != 0:
        return "a SLURM on this machine is started by root"
    lacking = [name for name in PROGRAMS if shutil.which(name) is None]
    return f"SLURM is not installed: no {', '.join(lacking)}" if lacking else None


class Slurm:
    """Nodes ``n1`` and ``n2``, one processor each as far as SLURM knows.

    Args:
        directory: Scratch directory.
        ports: Five free ports.
    """

    def __init__(self, directory: Path, ports: list[int]):
        self.directory = directory
        directory.mkdir(parents=True)
        host = socket.gethostname()
        munge = directory / "munge.socket"
        key = directory / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        conf = directory / "slurm.conf"
        conf.write_text(
            "\n".join(
                (
                    "ClusterName=test",
                    f"SlurmctldHost={host}(127.0.0.1)",
                    "SlurmUser=root",
                    "SlurmdUser=root",
                    f"AuthInfo=socket={munge}",
                    f"SlurmctldPort={ports[0]}",
                    f"SlurmdPort={ports[1]}",
                    f"StateSaveLocation={directory}/state",
                    f"SlurmdSpoolDir={directory}/spool-%n",
                    f"SlurmctldPidFile={directory}/slurmctld.pid",
                    f"SlurmdPidFile={directory}/slurmd-%n.pid",
                    f"SlurmctldLogFile={directory}/slurmctld.log",
                    f"SlurmdLogFile={directory}/slurmd-%n.log",
                    "ProctrackType=proctrack/linuxproc",
                    "TaskPlugin=task/none",
                    "SwitchType=switch/none",
                    "MpiDefault=none",
                    "SelectType=select/cons_tres",
                    "SelectTypeParameters=CR_Core",
                    "JobAcctGatherType=jobacct_gather/none",
                    "ReturnToService=2",
                    "KillWait=60",
                    f"NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]}",
                    f"NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[3]}",
                    "PartitionName=all Nodes=ALL Default=YES State=UP",
                    "",
                )
            )
        )
        self.environment = {"SLURM_CONF": str(conf)}
        self._processes: list[subprocess.Popen[bytes]] = []
        self._start(
            "munged", "--foreground", "--force", f"--socket={munge}", f"--key-file={key}",
            f"--pid-file={directory}/munged.pid", f"--seed-file={directory}/munged.seed",
            f"--log-file={directory}/munged.log",
        )  # fmt: skip
        self._wait_for(munge.exists, "munged")
        self._start("slurmctld", "-D", "-f", str(conf))
        for node in ("n1", "n2"):
            self._start("slurmd", "-D", "-N", node, "-f", str(conf))
        self._wait_for(lambda: self.run("sinfo", "-h", "-o", "%t").stdout.split() == ["idle"], "idle nodes")

    def run(self, *command: str, timeout: float = 60.0) -> subprocess.CompletedProcess[str]:
        """Run one of SLURM's programs."""
        return subprocess.run(
            command, env={**os.environ, **self.environment}, cwd=self.directory, capture_output=True, text=True,
            timeout=timeout, check=False,
        )  # fmt: skip

    def state_of(self, job: str) -> str:
        """State of a job, such as RUNNING."""
        words = self.run("scontrol", "show", "job", job).stdout.split()
        return next((word.removeprefix("JobState=") for word in words if word.startswith("JobState=")), "")

    def close(self) -> None:
        """End all jobs, and the daemons."""
        self.run("scancel", "--signal=KILL", "--user=root")
        for process in reversed(self._processes):
            process.send_signal(signal.SIGTERM)
        for process in self._processes:
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(10)

    def _start(self, *command: str) -> None:
        with open(self.directory / f"{Path(command[0]).name}-{len(self._processes)}.out", "wb") as log:
            self._processes.append(
                subprocess.Popen(
                    command, env={**os.environ, **self.environment}, stdout=log, stderr=subprocess.STDOUT,
                    start_new_session=True, preexec_fn=die_with_parent,
                )
            )  # fmt: skip

    def _wait_for(self, condition, what: str) -> None:
        deadline = time.monotonic() + START_SECONDS
        while not condition():
            if time.monotonic() > deadline:
                self.close()
                logs = "\n".join(f"{path.name}:\n{path.read_text()[-2000:]}" for path in self.directory.glob("*.[lo]*"))
                raise TimeoutError(f"no {what} within {START_SECONDS:g} s\n{logs}")
            time.sleep(0.1)
