"""Signals from outside to every process of a job: ranks, workers of loaders, the fork server, the supervisor, all at once.

Faults of :mod:`tests.benchmarks.chaos_campaign` happen inside of workers at chosen moments. This finds the processes of
a running job in ``/proc`` and signals them at random ones. ``python -m tests.benchmarks.signal_campaign --record
signals.jsonl --seed 1 --runs 20`` adds to a record, ``--report`` prints its counts. A run is as it should be if, after
as many launches of one command as its supervisor was ended, the predictions are those of an undisturbed run to the bit,
and neither processes nor files are left.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil

from lightning_gpuorch.errors import EXIT_RESUMABLE
from lightning_gpuorch.testing import checks

SCRIPT = Path(__file__).parents[1] / "jobs" / "scripts" / "chaos_predict.py"
SETUPS = {
    "trainer": ("--devices", 2, "--samples", 1200),
    "trainer-tp2": ("--devices", 2, "--tp", 2, "--samples", 480),
    "trainer-4x2": ("--devices", 4, "--tp", 2, "--samples", 800),
    "trainer-loaders": ("--devices", 2, "--workers", 2, "--samples", 1200),
    "trainer-stream": ("--devices", 2, "--stream", "--samples", 1200),
    "fabric": ("--devices", 2, "--fabric", "--samples", 1200),
    "fabric-tp2-loaders": ("--devices", 2, "--tp", 2, "--fabric", "--workers", 2, "--samples", 480),
    "fabric-stream-loaders": ("--devices", 2, "--fabric", "--stream", "--workers", 1, "--samples", 1200),
}
VICTIMS = ("rank", "rank", "two ranks", "loader", "fork server", "supervisor", "everything")
SIGNALS = ("KILL", "KILL", "STOP", "PAUSE", "TERM")
"""PAUSE is SIGSTOP, and SIGCONT some seconds later."""
LIMITS = {
    "GPUORCH_HEARTBEAT_TIMEOUT_SEC": "5",
    "GPUORCH_STEP_TIMEOUT_SEC": "8",
    "GPUORCH_COMMIT_TIMEOUT_SEC": "8",
    "GPUORCH_START_TIMEOUT_SEC": "40",
    "GPUORCH_EXIT_TIMEOUT_SEC": "15",
    "GPUORCH_MAX_RESTART_ATTEMPTS": "50",
    "GPUORCH_MAX_CHUNK_FAILURES": "50",
}
MARK = "GPUORCHTEST_SIGNAL_CAMPAIGN"
RUN_LIMIT_SECONDS = 240.0
MOMENT_LIMIT_SECONDS = 40.0
ORPHAN_SECONDS = 3.0


@dataclass(frozen=True)
class Fault:
    """A signal to a victim when a share of the parts is there; before the first part, after a delay."""

    share: float
    victim: str
    signal: str


@dataclass
class Job:
    """One command, launched until it has ended by itself."""

    setup: str
    directory: Path
    process: subprocess.Popen[bytes] | None = None
    launches: int = 0
    names: set[str] = field(default_factory=set)
    killed: set[str] = field(default_factory=set)
    problems: list[str] = field(default_factory=list)
    codes: list[int] = field(default_factory=list)

    @property
    def output(self) -> Path:
        return self.directory / "output"

    def launch(self) -> None:
        (self.directory / "tmp").mkdir(parents=True, exist_ok=True)
        devices = SETUPS[self.setup][1]
        words = [
            sys.executable, "-m", "lightning_gpuorch", "run", "--devices", devices, "--accelerator", "cpu", SCRIPT,
            *SETUPS[self.setup], "--output", self.output,
        ]  # fmt: skip
        environment = {**os.environ, **LIMITS, MARK: str(self.directory), "TMPDIR": str(self.directory / "tmp")}
        with open(self.directory / "log.txt", "ab") as log:
            self.process = subprocess.Popen(
                [str(word) for word in words], env=environment, stdin=subprocess.DEVNULL, stdout=log,
                stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        self.launches += 1

    def parts(self) -> int:
        return sum(1 for _ in self.output.glob("dataloader_0/part-*"))

    def victims(self, kind: str, rng: random.Random) -> list[psutil.Process]:
        """Living processes of a kind; none if there is none at this moment."""
        assert self.process is not None
        self.names |= checks.run_names(self.directory / "tmp")
        try:
            supervisor = psutil.Process(self.process.pid)
            children = supervisor.children()
        except psutil.NoSuchProcess:
            return []
        servers = [child for child in children if "lightning_gpuorch.supervisor.fork_server" in _words(child)]
        ranks = [rank for server in servers for rank in _children(server)]
        found = {
            "rank": ranks,
            "two ranks": ranks,
            "loader": [loader for rank in ranks for loader in _children(rank)],
            "fork server": servers,
            "supervisor": [supervisor],
            "everything": [supervisor, *supervisor.children(recursive=True)],
        }[kind]
        count = {"two ranks": 2, "everything": len(found)}.get(kind, 1)
        return rng.sample(found, min(count, len(found)))

    def wait_for(self, share: float, total: int, rng: random.Random) -> bool:
        """Wait for the moment of a fault; False if the job ends before."""
        assert self.process is not None
        delay = rng.uniform(0.0, 5.0) if share <= 0 else 0.0
        begun = time.monotonic()
        while self.process.poll() is None and time.monotonic() - begun < MOMENT_LIMIT_SECONDS:
            if time.monotonic() - begun >= delay and self.parts() >= share * total:
                return True
            time.sleep(0.01)
        return False

    def end(self, deadline: float) -> int | None:
        """Wait for the end, and launch again what was stopped or killed."""
        assert self.process is not None
        while True:
            while self.process.poll() is None and time.monotonic() < deadline:
                self.names |= checks.run_names(self.directory / "tmp")
                time.sleep(0.02)
            code = self.process.poll()
            if code is None:
                self.problems.append(f"it did not end within {RUN_LIMIT_SECONDS:g} s")
                self._kill_all()
                return None
            if code == -signal.SIGKILL:
                self.killed |= checks.run_names(self.directory / "tmp")
            self.codes.append(code)
            if code not in (EXIT_RESUMABLE, -signal.SIGKILL, -signal.SIGTERM):
                return code
            if len(self.codes) > 8:
                self.problems.append("it does not come to an end")
                return code
            self.see_that_all_are_gone()
            self.launch()

    def see_that_all_are_gone(self) -> None:
        deadline = time.monotonic() + ORPHAN_SECONDS
        while left := checks.processes_with(MARK, str(self.directory)):
            if time.monotonic() > deadline:
                self.problems.append(f"processes {left} were left behind")
                self._kill_all()
                return
            time.sleep(0.05)

    def _kill_all(self) -> None:
        for pid in checks.processes_with(MARK, str(self.directory)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def _children(process: psutil.Process) -> list[psutil.Process]:
    try:
        return [
            child for child in process.children() if "multiprocessing.resource_tracker" not in " ".join(_words(child))
        ]
    except psutil.NoSuchProcess:
        return []


def _words(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def harm(fault: Fault, victims: list[psutil.Process], rng: random.Random) -> bool:
    """Signal the victims; False if none of them lived."""
    number = {"KILL": signal.SIGKILL, "TERM": signal.SIGTERM}.get(fault.signal, signal.SIGSTOP)
    reached = []
    for victim in victims:
        with contextlib.suppress(psutil.NoSuchProcess):
            victim.send_signal(number)
            reached.append(victim)
    # A stopped supervisor is stopped for ever: nobody watches it.
    if fault.signal == "PAUSE" or (number == signal.SIGSTOP and fault.victim in ("supervisor", "everything")):
        time.sleep(rng.uniform(0.2, 7.0))
        for victim in reached:
            with contextlib.suppress(psutil.NoSuchProcess):
                victim.send_signal(signal.SIGCONT)
    return bool(reached)


def draw(rng: random.Random, loaders: bool) -> list[Fault]:
    """Some faults, in the order of their moments; a third of them while the job starts or when all parts are there."""
    faults = []
    victims = [victim for victim in VICTIMS if loaders or victim != "loader"]
    for _ in range(rng.randint(4, 8)):
        share = rng.choice((0.0, rng.uniform(0.01, 0.95), rng.uniform(0.01, 0.95), rng.uniform(0.01, 0.95), 1.0))
        faults.append(Fault(round(share, 2), rng.choice(victims), rng.choice(SIGNALS)))
    return sorted(faults, key=lambda fault: fault.share)


def run_one(seed: int, setup: str, calm: Path, directory: Path) -> dict[str, Any]:
    """One job under faults; returns what is recorded of it."""
    rng = random.Random(f"{setup}-{seed}")
    total = sum(1 for _ in calm.glob("dataloader_0/part-*"))
    job = Job(setup, directory)
    job.launch()
    begun = time.monotonic()
    happened = []
    for fault in draw(rng, "--workers" in SETUPS[setup]):
        assert job.process is not None
        if time.monotonic() - begun > RUN_LIMIT_SECONDS / 2:
            break
        if job.process.poll() is not None and job.process.returncode in (EXIT_RESUMABLE, -signal.SIGKILL):
            if job.process.returncode == -signal.SIGKILL:
                job.killed |= checks.run_names(directory / "tmp")
            job.launch()  # at once: what it was may still be dying
        if job.wait_for(fault.share, total, rng) and harm(fault, job.victims(fault.victim, rng), rng):
            happened.append(asdict(fault))
    code = job.end(begun + RUN_LIMIT_SECONDS)
    if code == 0:
        job.problems += checks.compare_outputs(calm, job.output)
    elif code is not None:
        job.problems.append(f"it ended with exit code {code}")
    job.see_that_all_are_gone()
    job.problems += checks.leftovers(job.output, directory / "tmp", job.names, job.killed)
    return {
        "setup": setup, "seed": seed, "happened": happened, "exit_codes": job.codes, "launches": job.launches,
        "seconds": round(time.monotonic() - begun, 1), "problems": job.problems,
    }  # fmt: skip


def run_setup(setup: str, seeds: range, record: Path, deadline: float) -> None:
    """Run a setup undisturbed, then once for each seed that the record does not have."""
    done = {entry["seed"] for entry in read_record(record) if entry["setup"] == setup}
    seeds_left = [seed for seed in seeds if seed not in done]
    if not seeds_left or time.monotonic() > deadline:
        return
    with tempfile.TemporaryDirectory(prefix="signals-") as scratch:
        calm = Job(setup, Path(scratch) / "calm")
        calm.launch()
        if calm.end(time.monotonic() + RUN_LIMIT_SECONDS) != 0:
            sys.exit(f"{setup}: the undisturbed run failed:\n{(calm.directory / 'log.txt').read_text()[-3000:]}")
        for seed in seeds_left:
            if time.monotonic() > deadline:
                return
            directory = Path(scratch) / f"run-{seed}"
            entry = run_one(seed, setup, calm.output, directory)
            print(json.dumps(entry), flush=True)
            with open(record, "a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")
            if entry["problems"]:
                kept = record.parent / f"{setup}-{seed}"
                shutil.copytree(directory, kept, ignore_dangling_symlinks=True, dirs_exist_ok=True)
                print(f"WRONG, kept in {kept}: {entry['problems']}", flush=True)


def read_record(path: Path) -> list[dict[str, Any]]:
    """All recorded runs."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def report(entries: list[dict[str, Any]]) -> str:
    """Counts per setup, and per victim and signal, as Markdown."""
    lines = ["| Setup | Runs | Faults | Launches | Not as they should be |", "|---|---|---|---|---|"]
    for setup in [*SETUPS, "all"]:
        mine = [entry for entry in entries if setup in (entry["setup"], "all")]
        counts = (
            sum(len(e["happened"]) for e in mine),
            sum(e["launches"] for e in mine),
            sum(bool(e["problems"]) for e in mine),
        )
        lines.append(f"| {setup} | {len(mine)} | {' | '.join(map(str, counts))} |")
    faults = Counter((fault["victim"], fault["signal"]) for entry in entries for fault in entry["happened"])
    names = sorted(set(SIGNALS))
    lines += ["", f"| Victim | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    lines += [f"| {v} | {' | '.join(str(faults[v, name]) for name in names)} |" for v in dict.fromkeys(VICTIMS)]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", type=Path, nargs="+", required=True, help="the first one is written")
    parser.add_argument("--setup", choices=SETUPS, nargs="*", default=list(SETUPS))
    parser.add_argument("--seed", type=int, default=0, help="of the first run of each setup")
    parser.add_argument("--runs", type=int, default=8, help="of each setup")
    parser.add_argument("--minutes", type=float, default=60.0, help="begin no run after that")
    parser.add_argument("--report", action="store_true")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    if not options.report:
        deadline = time.monotonic() + 60 * options.minutes
        for setup in options.setup:
            run_setup(setup, range(options.seed, options.seed + options.runs), options.record[0], deadline)
    entries = [entry for path in options.record for entry in read_record(path)]
    print(report(entries))
    sys.exit(any(entry["problems"] for entry in entries))


if __name__ == "__main__":
    main()
