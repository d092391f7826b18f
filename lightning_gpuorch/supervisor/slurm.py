"""A step of SLURM with one task per node: what its environment says of nodes, and the secret that its tasks share.

The variables are those of srun: https://slurm.schedmd.com/srun.html, section OUTPUT ENVIRONMENT VARIABLES.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from lightning_gpuorch.control.client import NodePlace
from lightning_gpuorch.control.shared_secret import read_private_file
from lightning_gpuorch.errors import ConfigurationError, ControlPlaneError

_FIRST_PORT, _NUM_PORTS = 20_000, 10_000
"""Below the range that Linux gives to outgoing connections."""
_POLL_SECONDS = 0.2
_ASK_SECONDS = 30.0


@dataclass(frozen=True)
class SlurmStep:
    """A step of a SLURM job.

    Attributes:
        key: Names the step and the restart of its job, among all of the cluster.
        place: Which of its nodes this is.
    """

    key: str
    place: NodePlace

    @classmethod
    def read(cls, environment: Mapping[str, str] = os.environ) -> SlurmStep | None:
        """The step that this process is a task of; None outside of srun, and in an interactive allocation.

        Raises:
            ConfigurationError: It has several tasks on a node.
        """
        if "SLURM_STEP_ID" not in environment or "SLURM_PROCID" not in environment:
            return None
        if environment.get("SLURM_JOB_NAME") in ("bash", "interactive"):
            return None
        num_nodes = int(environment.get("SLURM_STEP_NUM_NODES", "1"))
        num_tasks = int(environment.get("SLURM_STEP_NUM_TASKS", "1"))
        if num_tasks != num_nodes:
            raise ConfigurationError(
                f"srun has started {num_tasks} tasks on {num_nodes} nodes; gpuorch run is started once per node and starts "
                "one process per device itself: use --ntasks-per-node=1 and --devices."
            )
        job, step = environment["SLURM_JOB_ID"], environment["SLURM_STEP_ID"]
        key = f"{job}-{step}-{environment.get('SLURM_RESTART_COUNT', '0')}"
        port = _FIRST_PORT + (31 * int(job) + int(step)) % _NUM_PORTS
        main = address_of(first_host(environment.get("SLURM_STEP_NODELIST", "")))
        return cls(key, NodePlace(num_nodes, int(environment.get("SLURM_NODEID", "0")), main, port))

    @contextlib.contextmanager
    def shared_token(self, timeout_seconds: float) -> Iterator[str]:
        """A secret of the step's tasks, in a file of this user's home directory, which SLURM's nodes share.

        Args:
            timeout_seconds: Longest wait for that of node 0.

        Yields:
            The secret; node 0 removes the file when the context ends.

        Raises:
            ConfigurationError: There is no such file, or others than this user could have written it.
        """
        path = Path.home() / ".gpuorch" / f"slurm-{self.key}.token"
        advice = "set GPUORCH_TOKEN to the same secret for all tasks, in the batch script"
        try:
            if self.place.node_rank == 0:
                token = secrets.token_hex(16)
                path.parent.mkdir(mode=0o700, exist_ok=True)
                new = path.with_suffix(f".{os.getpid()}")
                with open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600), "w") as file:
                    file.write(token)
                new.replace(path)
            else:
                deadline = time.monotonic() + timeout_seconds
                while not path.exists() and time.monotonic() < deadline:
                    time.sleep(_POLL_SECONDS)
                token = read_private_file(str(path))
        except (OSError, ValueError, ControlPlaneError) as error:
            raise ConfigurationError(f"the tasks of step {self.key} share no secret: {error}; {advice}.") from error
        try:
            yield token
        finally:
            if self.place.node_rank == 0:
                path.unlink(missing_ok=True)


def address_of(host: str) -> str:
    """Where a node of SLURM's is reached: by its name if that resolves, else as SLURM itself does."""
    if not host:
        return "127.0.0.1"
    try:
        socket.getaddrinfo(host, None)
    except OSError:
        command = ("scontrol", "--oneliner", "show", "node", host)
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            shown = subprocess.run(command, capture_output=True, text=True, timeout=_ASK_SECONDS, check=True).stdout
            return next((word.partition("=")[2] for word in shown.split() if word.startswith("NodeAddr=")), host)
    return host


def first_host(node_list: str) -> str:
    """The first host of a list in SLURM's notation, such as ``rack[2-3]-n[01-16],login``; "" if there is none."""
    first = re.match(r"(?:\[[^\]]*\]|[^,\[])*", node_list)
    assert first is not None
    return re.sub(r"\[(\d+)[^\]]*\]", r"\1", first.group())
