"""What the supervisor of ``gpuorch run`` costs: CPU time, memory, and the time until the job's first line.

    python tests/benchmarks/supervisor.py [--tree CHECKOUT]... [--rounds 5]

Each round runs one small job on 2 CPU ranks from each checkout in turn (by default from this one), and reads from
``/proc`` what the supervisor process alone has taken.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parents[2]
TICKS = os.sysconf("SC_CLK_TCK")


def run_job(tree: Path, timeout_seconds: float = 240) -> tuple[float, float, float]:
    """CPU seconds and peak MB of the supervisor, and seconds until the job says where its results go."""
    command = [
        str(Path(sys.executable).with_name("gpuorch")), "run", "--devices", "2", "--accelerator", "cpu",
        str(tree / "tests/jobs/scripts/slow_predict.py"), "--samples", "80", "--output", "out",
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as directory, open(Path(directory) / "log", "wb") as log:
        began = time.perf_counter()
        job = subprocess.Popen(command, cwd=directory, env=environment, stdout=log, stderr=subprocess.STDOUT)
        cpu_seconds = peak_mb = first_line = 0.0
        while job.poll() is None:
            time.sleep(0.01)
            if time.perf_counter() - began > timeout_seconds:
                job.kill()
                raise TimeoutError(f"{command} did not end within {timeout_seconds:g} s")
            stat = Path(f"/proc/{job.pid}/stat").read_text().rsplit(")", 1)[1].split()
            cpu_seconds = (int(stat[11]) + int(stat[12])) / TICKS
            for line in Path(f"/proc/{job.pid}/status").read_text().splitlines():
                if line.startswith("VmHWM"):
                    peak_mb = int(line.split()[1]) / 1024
            if not first_line and b"results in" in Path(log.name).read_bytes():
                first_line = time.perf_counter() - began
        if job.returncode or not first_line:
            raise RuntimeError(f"exit code {job.returncode}: {Path(log.name).read_text()}")
    return cpu_seconds, peak_mb, first_line


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tree", action="append", type=Path, help="a checkout; may be repeated")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    trees = options.tree or [HERE]
    figures: dict[Path, list[tuple[float, float, float]]] = {tree: [] for tree in trees}
    for tree in trees:
        run_job(tree)  # warms the disk cache
    for _ in range(options.rounds):
        for tree in trees:
            figures[tree].append(run_job(tree))
    for tree, rows in figures.items():
        for what, column in zip(("CPU s", "peak MB", "s to first line"), zip(*rows, strict=True), strict=True):
            print(f"{tree}: {what} {statistics.median(column):.2f} ({' '.join(f'{v:.2f}' for v in column)})")


if __name__ == "__main__":
    main()
