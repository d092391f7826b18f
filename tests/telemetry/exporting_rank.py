"""A rank that steps and exports, in a process of its own: ``exporting_rank.py DIRECTORY RANK GENERATION PORT``.

It prints a line when it has begun, and after that takes orders, one per line: ``step N``, ``end``.
"""

from __future__ import annotations

import sys

from lightning_gpuorch.telemetry.metrics.exporter import MetricsExporter
from lightning_gpuorch.telemetry.metrics.rank_metrics import RankMetrics


def main() -> None:
    directory, rank, generation, port = sys.argv[1], *map(int, sys.argv[2:5])
    metrics = RankMetrics(rank, generation=generation)
    metrics.memory_usage.set(1000.0 + generation)
    exporter = MetricsExporter(
        metrics.registry, directory, rank=rank, generation=generation, port=port, address="127.0.0.1",
        interval_seconds=0.1, stale_after_seconds=1.0,
    )  # fmt: skip
    print("begun", flush=True)
    for line in sys.stdin:
        order, *arguments = line.split()
        if order == "end":
            break
        for _ in range(int(arguments[0])):
            metrics.observe_step(0.02, 4)
            metrics.observe_collective("all_reduce", 0.001)
        print("done", flush=True)
    exporter.close()


if __name__ == "__main__":
    main()
