"""Which sockets a running job has open, found with psutil, and the table of them in docs/security.md.

``python -m tests.support.open_sockets`` runs the jobs of :data:`JOBS` and writes the table anew; tests/jobs/test_security.py
compares it with what it finds.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from lightning_gpuorch.control import addresses, handshake
from tests.conftest import Runner, free_port, gpuorch_run

DOCUMENT = Path(__file__).parents[2] / "docs" / "security.md"
BEGIN, END = "<!-- sockets: written by python -m tests.support.open_sockets -->\n", "<!-- /sockets -->\n"
SCRIPT = "slow_predict.py"

JOBS = ("one node", "one node, tensor-parallel", "two nodes", "torchrun, one host")

KINDS = {
    "control plane": (
        "requests of ranks and supervisors",
        "an HMAC of the token by both sides, within TLS where certificates are given",
    ),
    "metrics": ("`GET /metrics`", "nothing: every user of the host may read them; at most 32 clients, 10 s each"),
    "connections of a tensor-parallel group": ("tensors", "nothing: gloo and NCCL do not authenticate them"),
    "the launcher's store": ("keys of all ranks", "nothing; this package puts no secret into it"),
}
"""What a kind of socket takes, and how it is guarded."""
UNIX_GUARD = "a directory of mode 0700, the uid at the other end, and an HMAC of the token by both sides"


@dataclass(frozen=True, order=True)
class Socket:
    """A listening socket of a process of a job."""

    process: str
    address: str
    kind: str


@dataclass
class RunningJob:
    """A job that computes, and where it can be reached."""

    processes: list[psutil.Popen]
    directory: Path
    port: int

    def members(self) -> list[psutil.Process]:
        """All processes, workers included."""
        roots = [psutil.Process(process.pid) for process in self.processes]
        return [member for root in roots for member in (root, *root.children(recursive=True))]

    def listening(self) -> list[tuple[psutil.Process, str]]:
        """Processes and the addresses on which they listen, as :mod:`lightning_gpuorch.control.addresses` writes them."""
        found = []
        paths = _listening_paths()
        for member in self.members():
            for connection in member.net_connections(kind="inet"):
                if connection.status == psutil.CONN_LISTEN:
                    found.append((member, f"{connection.laddr.ip}:{connection.laddr.port}"))
            found += [(member, f"unix:{c.laddr}") for c in member.net_connections(kind="unix") if c.laddr in paths]
        return found

    def sockets(self) -> list[Socket]:
        """What listens, without numbers and names that differ from run to run."""
        return sorted({self._describe(member, address) for member, address in self.listening()})

    def _describe(self, member: psutil.Process, address: str) -> Socket:
        root = next((p for p in self.processes if p.pid == member.pid), None)
        role = "a rank" if root is None else "launcher" if "torchrun" in " ".join(root.args) else "supervisor"
        kind = kind_of(address) if role != "launcher" else "the launcher's store"
        if address.startswith("unix:"):
            return Socket(role, "a unix socket in the run's directory", kind)
        host, port = address.rsplit(":", 1)
        host = "all interfaces" if host in ("0.0.0.0", "::") else "127.0.0.1" if host == "::1" else host
        return Socket(role, f"{host}, the main port" if int(port) == self.port else f"{host}, a free port", kind)


SAMPLES = 40_000
"""For two minutes and more; a file ``hurry`` makes the rest take no time."""
SIZE = ("--samples", SAMPLES, "--batch", 40, "--chunk", 5, "--step", 0.25)


def start(job: str, runner: Runner, size: Sequence[object] = SIZE) -> RunningJob:
    """Start a job of :data:`JOBS`, and wait until it computes."""
    port = free_port()
    arguments = ["--output", "out", *size, "--notes", "notes.txt", "--metrics", "--hurry", "hurry"]
    token = {"GPUORCH_TOKEN": "a secret of all nodes"}
    if job == "torchrun, one host":
        torchrun = (
            str(Path(sys.executable).with_name("torchrun")),
            "--nproc-per-node",
            "2",
            "--master-port",
            str(port),
        )
        processes = [runner.start(SCRIPT, *arguments, launcher=torchrun)]
    elif job == "two nodes":
        nodes = ("--num-nodes", "2", "--main-port", str(port), "--node-rank")
        run = (sys.executable, "-m", "lightning_gpuorch", "run", "--accelerator", "cpu", "--devices", "1")
        processes = [
            runner.start(SCRIPT, "--devices", 1, *arguments, launcher=(*run, *nodes, str(node)), environment=token)
            for node in (0, 1)
        ]
    else:
        size = 2 if "tensor-parallel" in job else 1
        processes = [runner.start(SCRIPT, "--tp", size, *arguments, launcher=gpuorch_run())]
    running = RunningJob(processes, runner.directory, port)  # type: ignore[arg-type]
    notes = runner.directory / "notes.txt"
    deadline = time.monotonic() + 120
    ranks = {"0", "1"}
    while not (notes.exists() and {line[:1] for line in notes.read_text().splitlines()} >= ranks):
        assert time.monotonic() < deadline, runner.report()
        assert all(process.poll() is None for process in processes), runner.report()
        time.sleep(0.05)
    while not any(kind_of(address) == "metrics" for _, address in running.listening()):
        assert time.monotonic() < deadline, "no metrics are served"
        time.sleep(0.1)
    return running


def kind_of(address: str) -> str:
    """What answers at an address, by its first words."""
    old = handshake.frame(handshake.Introduction(peer=handshake.Peer("rank", 0), protocol=1))
    if _answer(address, old).startswith(handshake.MAGIC):
        return "control plane"
    if _answer(address, b"GET /metrics HTTP/1.0\r\n\r\n").startswith(b"HTTP/"):
        return "metrics"
    return "connections of a tensor-parallel group"


def _answer(address: str, words: bytes) -> bytes:
    try:
        with addresses.connect(address, 2.0) as connection:
            connection.sendall(words)
            connection.settimeout(1.0)
            return connection.recv(64)
    except OSError:
        return b""


def _listening_paths() -> set[str]:
    """Of unix sockets that listen: psutil does not tell."""
    accepts = 1 << 16  # __SO_ACCEPTCON, the flags of a socket that listens
    rows = [line.split() for line in Path("/proc/net/unix").read_text().splitlines()[1:]]
    return {row[7] for row in rows if len(row) > 7 and int(row[3], 16) & accepts}


def rows(job: str, found: list[Socket]) -> list[str]:
    """The rows of the table about a job."""
    table = []
    for one in found:
        takes, guard = KINDS[one.kind]
        guard = UNIX_GUARD if one.address.startswith("a unix socket") else guard
        table.append(f"| {job} | {one.process} | {one.address} | {one.kind} | {takes} | {guard} |")
    return table


def documented() -> list[str]:
    """The table as it is in the docs."""
    return DOCUMENT.read_text(encoding="utf-8").split(BEGIN)[1].split(END)[0].splitlines()


def main() -> None:
    """Run the jobs and rewrite the table."""
    table = ["| Job | Process | Address | What | Takes | Guarded by |", "|---|---|---|---|---|---|"]
    for job in JOBS:
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
            runner = Runner(Path(scratch))
            try:
                table += rows(job, start(job, runner).sockets())
            finally:
                runner.close()
    before, rest = DOCUMENT.read_text(encoding="utf-8").split(BEGIN)
    after = rest.split(END)[1]
    DOCUMENT.write_text(before + BEGIN + "\n".join(table) + "\n" + END + after, encoding="utf-8")
    print("\n".join(table))


if __name__ == "__main__":
    main()
