"""Runs a script undisturbed, then under a plan of faults, and checks that nothing is lost.

``python -m lightning_gpuorch.testing.chaos --help`` is the command; :class:`Chaos` is the same for programs.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import click

from lightning_gpuorch.config import storage_options_in_force
from lightning_gpuorch.control.bootstrap import INJECT
from lightning_gpuorch.errors import EXIT_RESUMABLE, ConfigurationError
from lightning_gpuorch.paths import Location, local_path, location
from lightning_gpuorch.predictions.storage.stores import store_of
from lightning_gpuorch.testing import checks
from lightning_gpuorch.testing.faults import SUPERVISOR_KINDS, Fault, FaultKind, FaultPlan
from lightning_gpuorch.testing.injection import CHAOS_DIRECTORY, ENTRY_POINT, PLAN_NAME, TOPOLOGY_NAME, marker

OUTPUT = "{output}"
"""Stands for a run's output directory in the arguments of the script."""
POLL_SECONDS = 0.02
ORPHAN_SECONDS = 2.0
"""How long workers may outlive their supervisor."""


@dataclass(frozen=True)
class ChaosRun:
    """How a run under faults went.

    Attributes:
        plan: The faults.
        fired: Which of them have happened; the others never got their moment.
        exit_code: Of the last launch; None if it did not end in time.
        seconds: The whole run.
        launches: How often the command was run: once, and once more per death of the supervisor.
        restarts: Restarts of replicas.
        problems: What was wrong; empty if nothing was.
        directory: Where its output and log are, if they were kept.
    """

    plan: FaultPlan
    fired: tuple[bool, ...]
    exit_code: int | None
    seconds: float
    launches: int
    restarts: int
    problems: tuple[str, ...]
    directory: Path | None

    @property
    def happened(self) -> list[Fault]:
        """The faults that have happened."""
        return [fault for fault, fired in zip(self.plan, self.fired, strict=True) if fired]

    def __str__(self) -> str:
        verdict = "FAILED" if self.problems else "identical" if self.exit_code == 0 else "failed openly"
        return (
            f"{verdict}: {len(self.happened)} of {len(self.plan)} faults happened, exit code {self.exit_code} after "
            f"{self.seconds:.1f} s, {self.launches} launches, {self.restarts} restarts"
        )


@dataclass
class _Launch:
    """One process of the user's command, watched."""

    code: int | None = None
    run_names: set[str] = field(default_factory=set)


class Chaos:
    """A script and its undisturbed result, to be run under faults.

    Args:
        command: The script and its arguments, ``{output}`` among them; a first word that ends with ``.py`` is run with
            this interpreter, anything else (``gpuorch run ...``) as it stands.
        directory: Where runs are kept; a temporary one by default.
        limit_seconds: Longest time one run may take, all launches together.
        allow_failure: Accept a run that ends with another exit code than 0 and names what is missing.
        keep: Keep the output of runs in which nothing was wrong.
        output_root: Where outputs go, if not beside the logs of the runs: the URL of a prefix in an object store.

    Raises:
        ConfigurationError: The command has no ``{output}``, or its undisturbed run fails.
    """

    def __init__(
        self,
        command: Sequence[str],
        directory: str | os.PathLike[str] | None = None,
        *,
        limit_seconds: float = 600.0,
        allow_failure: bool = False,
        keep: bool = False,
        output_root: str | None = None,
    ):
        if not any(OUTPUT in word for word in command):
            raise ConfigurationError(
                f"no argument contains {OUTPUT}; it stands for the output directory of each run, as in "
                f"`predict.py --devices 2 --output {OUTPUT}`."
            )
        self._command = [*([sys.executable] if command[0].endswith(".py") else []), *command]
        self._directory = local_path(directory, "directory") if directory else Path(tempfile.mkdtemp(prefix="chaos-"))
        self._directory.mkdir(parents=True, exist_ok=True)
        self._output_root: Location | None = None
        if output_root is not None:
            place = location(output_root, "output_root", storage_options_in_force(None))
            self._output_root = place / f"chaos-{secrets.token_hex(6)}"  # nothing of earlier runs is in it
        self._limit_seconds, self._allow_failure, self._keep = limit_seconds, allow_failure, keep
        self._runs = 0
        self.world_size, self.tensor_parallel_size = 1, 1
        calm = self._new_directory("calm")
        began = time.monotonic()
        launch = self._launch(calm, FaultPlan(), began + limit_seconds)
        self.calm_seconds = time.monotonic() - began
        self.calm_output = self._output_of(calm)
        problems = [] if launch.code == 0 else [f"it ended with exit code {launch.code}"]
        if not problems and not checks.job_directories(self.calm_output):
            problems.append(f"it left no predictions in {self.calm_output}; does it use {OUTPUT} as output_dir?")
        problems += self._left_behind(calm, launch.run_names)
        if problems:
            raise ConfigurationError(
                f"the undisturbed run of {' '.join(self._command)} is not in order: {'; '.join(problems)}. Its messages:\n"
                + _tail(calm / "log.txt")
            )
        self.world_size, self.tensor_parallel_size = json.loads((calm / TOPOLOGY_NAME).read_text(encoding="utf-8"))

    def draw(self, seed: int, count: int, kinds: Sequence[FaultKind] = tuple(FaultKind)) -> FaultPlan:
        """Draw a plan of ``count`` faults that fits this script's ranks."""
        return FaultPlan.draw(seed, count, self.world_size, self.tensor_parallel_size, kinds)

    def run(self, plan: FaultPlan) -> ChaosRun:
        """Run the script under a plan, again after each death of its supervisor, and check what it has left."""
        directory = self._new_directory(f"run-{self._runs}")
        self._runs += 1
        began = time.monotonic()
        deadline = began + self._limit_seconds
        names: set[str] = set()
        killed: set[str] = set()
        launches, expected_launches, restarts = 0, 1, 0
        problems: list[str] = []
        while True:
            launch = self._launch(directory, plan, deadline)
            launches += 1
            if launch.code == -signal.SIGKILL:
                killed |= launch.run_names - names
            names |= launch.run_names
            if launch.code is None:
                problems.append(f"it did not end within {self._limit_seconds:g} s")
                break
            orphans = self._orphans(directory)
            if orphans:
                problems.append(f"processes {orphans} outlived their supervisor by {ORPHAN_SECONDS:g} s")
                _kill(orphans)
            stopped = [f for i, f in enumerate(plan) if f.kind in SUPERVISOR_KINDS and marker(directory, i).exists()]
            expected_launches = 1 + len(stopped)
            if launch.code not in (EXIT_RESUMABLE, -signal.SIGKILL) or launches >= expected_launches:
                break
        log = (directory / "log.txt").read_text(encoding="utf-8", errors="replace")
        restarts = log.count("restarting replica")
        output = self._output_of(directory)
        if launch.code == 0:
            problems += checks.compare_outputs(self.calm_output, output)
        elif launch.code is not None:
            problems += checks.unnamed_samples(output, log)
            if not self._allow_failure:
                problems.append(f"it ended with exit code {launch.code}")
        problems += self._left_behind(directory, names, killed)
        fired = tuple(marker(directory, index).exists() for index in range(len(plan)))
        kept = bool(problems) or self._keep
        if not kept:
            store_of(output).remove_directory(output)
            shutil.rmtree(directory)
        return ChaosRun(
            plan, fired, launch.code, time.monotonic() - began, launches, restarts, tuple(problems),
            directory if kept else None,
        )  # fmt: skip

    def close(self) -> None:
        """Remove the directory of the runs, unless something in it was kept."""
        store_of(self.calm_output).remove_directory(self.calm_output)
        shutil.rmtree(self._directory / "calm", ignore_errors=True)
        with contextlib.suppress(OSError):  # not empty: runs were kept
            self._directory.rmdir()

    def _new_directory(self, name: str) -> Path:
        directory = self._directory / name
        (directory / "tmp").mkdir(parents=True)
        (directory / "output").mkdir()
        return directory

    def _output_of(self, directory: Path) -> Location:
        return directory / "output" if self._output_root is None else self._output_root / directory.name

    def _launch(self, directory: Path, plan: FaultPlan, deadline: float) -> _Launch:
        """Run the command once and do to its supervisor what the plan wants."""
        (directory / PLAN_NAME).write_text(str(plan), encoding="utf-8")
        temporary = directory / "tmp"
        environment = {
            **os.environ, INJECT: ENTRY_POINT, CHAOS_DIRECTORY: str(directory), "TMPDIR": str(temporary),
        }  # fmt: skip
        words = [word.replace(OUTPUT, str(self._output_of(directory))) for word in self._command]
        to_supervisor = {index: fault for index, fault in enumerate(plan) if fault.kind in SUPERVISOR_KINDS}
        done = {index for index in to_supervisor if marker(directory, index).exists()}
        launch = _Launch()
        with open(directory / "log.txt", "ab") as log:
            process = subprocess.Popen(
                words, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip
            try:
                while process.poll() is None and time.monotonic() < deadline:
                    time.sleep(POLL_SECONDS)
                    launch.run_names |= checks.run_names(temporary)
                    for index, fault in to_supervisor.items():
                        if index not in done and marker(directory, index).exists():
                            done.add(index)
                            kill = fault.kind is FaultKind.KILL_SUPERVISOR
                            process.send_signal(signal.SIGKILL if kill else signal.SIGTERM)
                launch.code = process.poll()
            finally:
                if process.poll() is None:
                    process.kill()
                    process.wait()
        return launch

    def _left_behind(self, directory: Path, run_names: set[str], killed: set[str] | None = None) -> list[str]:
        orphans = self._orphans(directory)
        _kill(orphans)
        problems = [f"processes {orphans} were left behind"] if orphans else []
        return problems + checks.leftovers(self._output_of(directory), directory / "tmp", run_names, killed or ())

    @staticmethod
    def _orphans(directory: Path) -> list[int]:
        deadline = time.monotonic() + ORPHAN_SECONDS
        while True:
            found = checks.processes_with(CHAOS_DIRECTORY, str(directory))
            if not found or time.monotonic() > deadline:
                return found
            time.sleep(POLL_SECONDS)


def summary(outcomes: Sequence[ChaosRun]) -> str:
    """A table of how many faults of each kind have happened at each kind of moment."""
    counts = Counter((fault.kind.value, fault.moment.label) for outcome in outcomes for fault in outcome.happened)
    moments = [m for m in ("start", "restart", "middle", "last", "commit", "end") if any(m == key[1] for key in counts)]
    kinds = [kind.value for kind in FaultKind if any(kind.value == key[0] for key in counts)]
    rows = [["", *moments, "all"]]
    rows += [
        [kind, *(str(counts[kind, m]) for m in moments), str(sum(counts[kind, m] for m in moments))] for kind in kinds
    ]
    rows.append(["all", *(str(sum(counts[k, m] for k in kinds)) for m in moments), str(sum(counts.values()))])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(widths[0]) if c == 0 else cell.rjust(widths[c]) for c, cell in enumerate(row)).rstrip()
        for row in rows
    )


def _kill(pids: Sequence[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _tail(path: Path, lines: int = 30) -> str:
    return "\n".join(path.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])


def _plans(chaos: Chaos, plan: str | None, faults: int, seed: int, runs: int) -> Iterator[FaultPlan]:
    for number in range(runs):
        yield FaultPlan.parse(plan) if plan is not None else chaos.draw(seed + number, faults)


@click.command(name="chaos", context_settings={"ignore_unknown_options": True})
@click.option("--faults", default=5, show_default=True, help="Faults per run, drawn at random.")
@click.option("--seed", default=0, show_default=True, help="Of the first run; each further run takes the next one.")
@click.option("--runs", default=1, show_default=True, help="Runs under faults; the undisturbed one is made once.")
@click.option("--plan", default=None, help="These faults, instead of random ones: 'kill@40%/rank1; exit0@end/rank0'.")
@click.option("--limit", default=600.0, show_default=True, help="Seconds that one run may take.")
@click.option("--allow-failure", is_flag=True, help="Accept an exit code other than 0 if all that is missing is named.")
@click.option("--keep", is_flag=True, help="Keep the output of good runs as well.")
@click.option("--output-root", default=None, metavar="URL", help="Keep the outputs there, for example in a bucket.")
@click.option("--directory", type=click.Path(), default=None, help="Where; default: temporary.")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
def chaos(
    command: tuple[str, ...], faults: int, seed: int, runs: int, plan: str | None, limit: float, allow_failure: bool,
    keep: bool, output_root: str | None, directory: str | None,
) -> None:  # fmt: skip
    """Run COMMAND undisturbed, then under faults, and compare the predictions bit by bit.

    COMMAND is a script with its arguments. {output} in them is replaced by a fresh directory in each run; the script
    must use it as its output_dir.
    """
    try:
        if plan is not None:
            FaultPlan.parse(plan)
        tested = Chaos(
            command, directory, limit_seconds=limit, allow_failure=allow_failure, keep=keep, output_root=output_root
        )
        click.echo(
            f"undisturbed: {tested.calm_seconds:.1f} s, {tested.world_size} ranks, "
            f"tensor-parallel size {tested.tensor_parallel_size}"
        )
        outcomes = []
        for drawn in _plans(tested, plan, faults, seed, runs):
            click.echo(f"plan: {drawn}")
            outcomes.append(tested.run(drawn))
            click.echo(f"  {outcomes[-1]}")
            for fault, fired in zip(drawn, outcomes[-1].fired, strict=True):
                if not fired:
                    click.echo(f"  never had its moment: {fault}")
            for problem in outcomes[-1].problems:
                click.echo(f"  wrong: {problem}")
        tested.close()
    except ConfigurationError as error:
        raise click.ClickException(str(error)) from None
    failed = [outcome for outcome in outcomes if outcome.problems]
    click.echo(f"\nfaults that have happened:\n{summary(outcomes)}")
    click.echo(f"{len(outcomes) - len(failed)} of {len(outcomes)} runs as they should be")
    for outcome in failed:
        click.echo(f"\nto see it again: --plan '{outcome.plan}' (kept in {outcome.directory})")
        click.echo(_tail(outcome.directory / "log.txt") if outcome.directory else "")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    chaos()
