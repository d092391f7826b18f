"""Hundreds of faults on real processes: every kind, moment and rank, on 2 and 4 processes, TP 1 and 2.

``python -m tests.benchmarks.chaos_campaign --record campaign.jsonl`` goes on where the record ends, until every cell
has happened often enough, and prints the counts; ``--report`` only prints them. Several processes may share the work
with ``--setup``, each with a record of its own.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import sys
import time
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lightning_gpuorch.testing.chaos import Chaos, ChaosRun
from lightning_gpuorch.testing.faults import LAST_PERCENT, Fault, FaultKind, FaultPlan, Moment, When

SCRIPT = Path(__file__).parents[1] / "jobs" / "scripts" / "chaos_predict.py"
SETUPS = {
    "2x1": (2, 1),
    "2x2": (2, 2),
    "4x1": (4, 1),
    "4x2": (4, 2),
    "2x1-dynamic": (2, 1),
    "2x2-dynamic": (2, 2),
    "2x1-stream": (2, 1),
    "2x1-dynamic-stream": (2, 1),
}
"""Processes and tensor-parallel size; with dynamic batching in windows that take longer than a fragment, and on streams whose
last chunk is full, so that their end is found by whoever is handed the next one."""
KINDS = ("kill", "stop", "exception", "exit0", "hang", "gil-hang", "collective")
MOMENTS = ("start", "middle", "last", "commit")
LIMITS = {
    "GPUORCH_HEARTBEAT_TIMEOUT_SEC": "2.5",
    "GPUORCH_STEP_TIMEOUT_SEC": "4",
    "GPUORCH_COMMIT_TIMEOUT_SEC": "4",
    "GPUORCH_START_TIMEOUT_SEC": "6",
    "GPUORCH_EXIT_TIMEOUT_SEC": "10",
    "GPUORCH_MAX_RESTART_ATTEMPTS": "50",
}
RUN_LIMIT_SECONDS = 180.0


@dataclass(frozen=True)
class Cell:
    """What has to happen: a kind of fault, at a kind of moment, to rank 0 or to another."""

    kind: str
    moment: str
    other: bool

    def fault(self, rng: random.Random, processes: int, tp: int) -> Fault:
        """One fault of this cell."""
        kinds = {"collective": [FaultKind.SKIP_COLLECTIVE, FaultKind.BLOCK_COLLECTIVE]}
        kind = rng.choice(kinds[self.kind]) if self.kind in kinds else FaultKind(self.kind)
        if self.moment == "commit":
            kind = FaultKind.BLOCK_COLLECTIVE if self.kind == "collective" else kind
            return Fault(kind, Moment(When.COMMIT, rng.randrange(0, 70)), self._rank(rng, range(0, processes, tp)))
        rank = self._rank(rng, range(processes))
        if self.moment == "start":
            return Fault(kind, Moment(rng.choice((When.START, When.RESTART))), rank)
        percent = LAST_PERCENT if self.moment == "last" else rng.randrange(5, 70)
        return Fault(kind, Moment(When.SHARE, percent), rank)

    def _rank(self, rng: random.Random, ranks: range) -> int:
        return rng.choice(ranks[1:]) if self.other else ranks[0]


def cells(processes: int, tp: int) -> list[Cell]:
    """All cells of a setup. With one replica only rank 0 commits, so there is no other rank to harm then."""
    every = (Cell(*cell) for cell in itertools.product(KINDS, MOMENTS, (False, True)))
    return [cell for cell in every if not (cell.moment == "commit" and cell.other and processes == tp)]


def plans(
    processes: int, tp: int, wanted: list[Cell], faults: int, rng: random.Random
) -> Iterator[tuple[list[Cell], FaultPlan]]:
    """Cut cells into plans. Cells put back on the list ``wanted`` are taken again.

    A replica gets at most one fault of a kind of moment that comes once: the first step, and the last chunks.
    """
    queue = deque(wanted)
    wanted.clear()
    while queue or wanted:
        queue.extend(wanted)
        wanted.clear()
        chosen: list[tuple[Cell, Fault]] = []
        taken: set[tuple[str, int]] = set()
        for _ in range(len(queue)):
            if len(chosen) == faults:
                break
            cell = queue.popleft()
            fault = cell.fault(rng, processes, tp)
            place = (cell.moment, fault.rank // tp)
            if cell.moment in ("start", "last") and place in taken:
                queue.append(cell)
                continue
            taken.add(place)
            chosen.append((cell, fault))
        yield [cell for cell, _ in chosen], FaultPlan(tuple(fault for _, fault in chosen))


def chaos_for(setup: str) -> Chaos:
    """The undisturbed run of a setup."""
    processes, tp = SETUPS[setup]
    # Several replicas need work for some seconds, or the others are done before a stuck one is found and comes back.
    samples, step = (480, 0.01) if processes == tp else (1600, 0.02 if processes // tp > 2 else 0.01)
    gpuorch = [
        sys.executable,
        "-m",
        "lightning_gpuorch.cli.main",
        "run",
        "--devices",
        str(processes),
        "--accelerator",
        "cpu",
    ]
    script = [str(SCRIPT), "--devices", str(processes), "--tp", str(tp), "--output", "{output}"]
    size = ["--samples", str(samples), "--chunk", str(samples // 400 * 2 or 2), "--step", str(step)]
    if "dynamic" in setup:
        size = ["--samples", "1600", "--chunk", "2", "--step", "0.05", "--dynamic"]
    if "stream" in setup:
        size.append("--stream")
    return Chaos([*gpuorch, *script, *size], limit_seconds=RUN_LIMIT_SECONDS)


def run_setup(setup: str, times: int, faults: int, seed: int, record: Path, deadline: float) -> None:
    """Run plans of a setup until each of its cells has happened ``times`` times, as the record counts."""
    processes, tp = SETUPS[setup]
    counts = Counter(cell for entry in read_record(record) if entry["setup"] == setup for cell in happened(entry))
    wanted = [cell for cell in cells(processes, tp) for _ in range(times - counts[cell])]
    if not wanted:
        return
    rng = random.Random(f"{setup}-{seed}-{sum(counts.values())}")
    rng.shuffle(wanted)
    chaos = chaos_for(setup)
    chances = Counter(wanted)
    for chosen, plan in plans(processes, tp, wanted, faults, rng):
        if time.monotonic() > deadline:
            return
        outcome = chaos.run(plan)
        print(f"{setup} {outcome}", *(f"\n    WRONG: {p}" for p in outcome.problems), flush=True)
        if outcome.problems:
            print(f"    plan: {plan}\n    kept: {outcome.directory}", flush=True)
        with open(record, "a", encoding="utf-8") as file:
            file.write(json.dumps(entry_of(setup, chosen, outcome)) + "\n")
        for cell, fired in zip(chosen, outcome.fired, strict=True):
            chances[cell] += not fired
            if not fired and chances[cell] < 4 * times:  # it never had its moment: once more
                wanted.append(cell)
    chaos.close()


def entry_of(setup: str, chosen: list[Cell], outcome: ChaosRun) -> dict[str, object]:
    """What is recorded of a run."""
    return {
        "setup": setup, "plan": str(outcome.plan), "cells": [[c.kind, c.moment, c.other] for c in chosen],
        "fired": list(outcome.fired), "exit_code": outcome.exit_code, "seconds": round(outcome.seconds, 1),
        "restarts": outcome.restarts, "problems": list(outcome.problems), "time": time.strftime("%Y-%m-%d %H:%M:%S"),
    }  # fmt: skip


def happened(entry: dict[str, list[object]]) -> list[Cell]:
    """The cells of a recorded run whose faults have happened."""
    return [Cell(*cell) for cell, fired in zip(entry["cells"], entry["fired"], strict=True) if fired]  # type: ignore[misc]


def read_record(path: Path) -> list[dict[str, list[object]]]:
    """All recorded runs."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def report(entries: list[dict[str, list[object]]]) -> str:
    """Counts per setup, kind, moment and rank, as Markdown."""
    lines = ["| Setup | Runs | Faults | Restarts | Seconds | Not as they should be |", "|---|---|---|---|---|---|"]
    for setup in [*SETUPS, "all"]:
        mine = [e for e in entries if setup in (e["setup"], "all")]
        sums = [sum(e[key] for e in mine) for key in ("restarts", "seconds")]  # type: ignore[misc]
        fired = sum(len(happened(e)) for e in mine)
        wrong = sum(bool(e["problems"]) for e in mine)
        lines.append(f"| {setup} | {len(mine)} | {fired} | {sums[0]} | {sums[1]:.0f} | {wrong} |")
    counts = Counter((c.kind, c.moment, c.other) for entry in entries for c in happened(entry))
    columns = list(itertools.product(MOMENTS, (False, True)))
    heads = [f"{moment}, {'another' if other else 'rank 0'}" for moment, other in columns]
    lines += ["", f"| Kind | {' | '.join(heads)} | all |", "|---" * (len(heads) + 2) + "|"]
    for kind in KINDS:
        row = [counts[(kind, *column)] for column in columns]
        lines.append(f"| {kind} | {' | '.join(map(str, row))} | {sum(row)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", type=Path, nargs="+", required=True, help="the first one is written")
    parser.add_argument("--setup", choices=SETUPS, nargs="*", default=list(SETUPS))
    parser.add_argument("--times", type=int, default=3, help="how often each cell must happen")
    parser.add_argument("--faults", type=int, default=6, help="per run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=60.0, help="begin no run after that")
    parser.add_argument("--report", action="store_true")
    options = parser.parse_args()
    os.environ.update({"OMP_NUM_THREADS": "1", **LIMITS})
    if not options.report:
        deadline = time.monotonic() + 60 * options.minutes
        for setup in options.setup:
            run_setup(setup, options.times, options.faults, options.seed, options.record[0], deadline)
    entries = [entry for path in options.record for entry in read_record(path)]
    print(report(entries))
    sys.exit(any(entry["problems"] for entry in entries))


if __name__ == "__main__":
    main()
