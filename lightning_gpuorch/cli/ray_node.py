"""A node of a Ray cluster: an actor that reserves its devices, and runs the supervisor as a process of its own.

Ray imports this module on the node; it stays light, and knows nothing of the job but a command line.
"""

from __future__ import annotations

import asyncio
import os
import socket
import sys
from collections import deque
from dataclasses import dataclass

_SUPERVISOR = (
    "from lightning_gpuorch.control.bootstrap import die_with_parent; die_with_parent(); "
    "from lightning_gpuorch.cli import gpuorch; gpuorch(prog_name='gpuorch')"
)
"""The kernel ends the supervisor with the actor: Ray then believes that the node's devices are free."""
_OF_ANOTHER_LAUNCH = ("SLURM_STEP_ID",)
"""The step of SLURM in which Ray itself runs, where it does: its tasks are none of the job's nodes."""
_REPORT_SECONDS = 0.5
_LAST_LINES_SECONDS = 1.0
_MAX_LINES = 10_000
_MAX_LINE_BYTES = 65_536


@dataclass(frozen=True)
class Offer:
    """A node whose devices are reserved.

    Attributes:
        address: Where other nodes reach it.
        port: A port that is free there.
        problem: Why it can run nothing; "" if it can.
    """

    address: str
    port: int
    problem: str


@dataclass(frozen=True)
class Progress:
    """What has become of a supervisor since the last time.

    Attributes:
        lines: What it has printed, each with 1 for standard output or 2 for standard error.
        num_dropped: Lines that are lost, because nobody asked for too long.
        code: Its exit code, once it has ended.
    """

    lines: list[tuple[int, str]]
    num_dropped: int
    code: int | None


class RayNode:
    """The actor. All methods run in one event loop, whose thread is the supervisor's parent.

    Args:
        script: Absolute path of the script.
        directory: Working directory of the supervisor.
    """

    def __init__(self, script: str, directory: str):
        self._script, self._directory = script, directory
        self._process: asyncio.subprocess.Process | None = None
        self._printed: list[asyncio.Task[None]] = []
        self._lines: deque[tuple[int, str]] = deque()
        self._num_dropped = 0
        self._starting = asyncio.Lock()

    async def offer(self) -> Offer:
        """What the node has to offer, now that it is reserved."""
        import ray

        with socket.socket() as probe:
            probe.bind(("", 0))
            port = int(probe.getsockname()[1])
        lacking = [path for path in (self._script, self._directory) if not os.path.exists(path)]
        return Offer(ray.util.get_node_ip_address(), port, f"{lacking[0]} does not exist there" if lacking else "")

    async def start(self, arguments: list[str], environment: dict[str, str]) -> Progress:
        """Start the supervisor, if that is not done yet, and begin to follow it.

        Args:
            arguments: Of ``gpuorch``.
            environment: Added to the environment of this process; holds the job's secret.
        """
        async with self._starting:
            if self._process is None:
                await self._start(arguments, environment)
        return await self.follow()

    async def _start(self, arguments: list[str], environment: dict[str, str]) -> None:
        inherited = {name: value for name, value in os.environ.items() if name not in _OF_ANOTHER_LAUNCH}
        self._process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", _SUPERVISOR, *arguments, cwd=self._directory, env={**inherited, **environment},
            stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        streams = enumerate((self._process.stdout, self._process.stderr), 1)
        self._printed = [asyncio.ensure_future(self._read(number, stream)) for number, stream in streams]

    async def follow(self) -> Progress:
        """What has happened since the last call; waits a moment for it."""
        assert self._process is not None
        await asyncio.wait(self._printed, timeout=_REPORT_SECONDS)
        code = self._process.returncode
        if code is not None:  # what it has started may keep its standard output open
            await asyncio.wait(self._printed, timeout=_LAST_LINES_SECONDS)
        return self._take(code)

    async def terminate(self) -> None:
        """Send SIGTERM to the supervisor."""
        async with self._starting:
            if self._process is not None and self._process.returncode is None:
                self._process.terminate()

    async def _read(self, number: int, stream: asyncio.StreamReader) -> None:
        rest = b""
        while read := await stream.read(_MAX_LINE_BYTES):
            *lines, rest = (rest + read).split(b"\n")
            if len(rest) >= _MAX_LINE_BYTES:
                lines, rest = [*lines, rest], b""
            for line in lines:
                self._keep(number, line)
        if rest:
            self._keep(number, rest)

    def _take(self, code: int | None) -> Progress:
        lines, self._lines = list(self._lines), deque()
        num_dropped, self._num_dropped = self._num_dropped, 0
        return Progress(lines, num_dropped, code)

    def _keep(self, number: int, line: bytes) -> None:
        if len(self._lines) >= _MAX_LINES:
            self._lines.popleft()
            self._num_dropped += 1
        self._lines.append((number, line.decode(errors="replace")))
