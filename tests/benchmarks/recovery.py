"""What does ``kill -9`` of one of two ranks cost: for it, and for the other?

Runs the same script again and again, killing rank 1 after some batches: under ``gpuorch`` with workers forked from a warm
process, with workers started from nothing, and under ``torchrun --max-restarts``, which restarts both. Rounds are
interleaved; medians are printed.

    python tests/benchmarks/recovery.py --rounds 5
"""

from __future__ import annotations

import argparse
import collections
import itertools
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "jobs" / "scripts" / "slow_predict.py"
STEP_SECONDS = 0.02
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "3")
PEERS: dict[str, tuple[tuple[str, ...], dict[str, str]]] = {
    "gpuorch, warm start": ((), {}),
    "gpuorch, cold start": ((), {"GPUORCH_ENABLE_WARM_START": "false"}),
    "torchrun": (TORCHRUN, {}),
}


def run(
    launcher: tuple[str, ...], environment: dict[str, str], samples: int, timeout_seconds: float
) -> dict[str, float]:
    """One run; all figures in milliseconds, but for counts and ``wall_s``."""
    with tempfile.TemporaryDirectory() as directory:
        began = time.monotonic()
        command = [
            sys.executable, *launcher, str(SCRIPT), "--output", "out", "--samples", str(samples), "--step",
            str(STEP_SECONDS), "--harm", "kill", "--victim", "1", "--at", "40", "--result", "result.json",
        ]  # fmt: skip
        subprocess.run(
            command, cwd=directory, env={**os.environ, "OMP_NUM_THREADS": "1", **environment}, check=True,
            timeout=timeout_seconds, capture_output=True,
        )  # fmt: skip
        lines = [line.split() for line in (Path(directory) / "notes.txt").read_text().splitlines()]
        wall = time.monotonic() - began
    notes = sorted((float(when), int(rank), int(pid), int(batch)) for rank, pid, when, batch in lines)
    victim = [note for note in notes if note[1] == 1]
    died = max(when for when, _, pid, _ in victim if pid == victim[0][2])
    back = [when for when, _, pid, _ in victim if pid != victim[0][2]]
    other = [note for note in notes if note[1] == 0]
    pauses = [b[0] - a[0] for a, b in itertools.pairwise(other) if a[0] > died - 1]
    counts = collections.Counter(batch for _, _, _, batch in notes)
    return {
        "victim's next batch after": 1e3 * (min(back) - died) if back else float("nan"),
        "other's longest pause": 1e3 * max(pauses),
        "other's median step": 1e3 * statistics.median(pauses),
        "other restarted": float(len({pid for _, _, pid, _ in other}) - 1),
        "batches computed twice": float(sum(count - 1 for count in counts.values())),
        "wall_s": wall,
    }


def main() -> None:
    """Run all peers in turn and print medians."""
    options = argparse.ArgumentParser()
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--samples", type=int, default=4000)
    options.add_argument("--timeout", type=float, default=300.0)
    options = options.parse_args()
    found: dict[str, list[dict[str, float]]] = collections.defaultdict(list)
    for _ in range(options.rounds):
        for name, (launcher, environment) in PEERS.items():
            found[name].append(run(launcher, environment, options.samples, options.timeout))
    for name, rounds in found.items():
        print(name)
        for figure in rounds[0]:
            values = sorted(round_[figure] for round_ in rounds)
            print(f"  {figure:28} median {statistics.median(values):9.1f}   {values[0]:9.1f} .. {values[-1]:.1f}")


if __name__ == "__main__":
    main()
