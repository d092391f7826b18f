"""The events of a run that did not happen, with everything in them that a report can show."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

BEGIN = 1_790_000_000.0


def write_run(directory: Path, *, num_ranks: int = 4, tensor_parallel_size: int = 2, seconds: float = 180.0) -> Path:
    """Write the events of a run with OOMs, a restart, a retirement, a straggler, a hot GPU and lost samples.

    Returns:
        The run directory.
    """
    chance = random.Random(7)
    events: dict[str, list[dict[str, Any]]] = {"supervisor": []}

    def add(source: str, at: float, kind: str, **fields: Any) -> None:
        lines = events.setdefault(source, [])
        lines.append({"ts": BEGIN + at, "kind": kind, "source": source, "seq": len(lines) + 1, **fields})

    add("supervisor", 0, "run", world_size=num_ranks, tensor_parallel_size=tensor_parallel_size,
        command="gpuorch run embed_text.py --devices 4", versions={"lightning_gpuorch": "0.1.0", "torch": "2.13.0"},
        output_dir="/data/predictions", host="node-1")  # fmt: skip
    add(
        "supervisor",
        4,
        "job",
        job=1,
        directory="/data/predictions",
        num_samples=64_500 * num_ranks,
        num_chunks=200,
        resumed_chunks=0,
    )
    num_replicas = num_ranks // tensor_parallel_size
    restarted, retired = 1 % num_replicas, num_replicas - 1
    for rank in range(num_ranks):
        replica = rank // tensor_parallel_size
        source = f"rank-{rank:05d}.attempt-0"
        who = {"rank": rank, "replica": replica, "generation": 0}
        add(source, 4 + chance.random(), "start", **who, pid=100 + rank, device=f"cuda:{rank}")
        memory = 30e9
        at = 6.0 + chance.random()
        chunk = replica
        while at < seconds - 6:
            if replica == restarted and seconds * 0.4 < at < seconds * 0.47:
                at += 1.0
                continue
            if replica == retired and num_replicas > 2 and at > seconds * 0.75:
                break
            straggles = rank == 1
            communication = 0.06 if straggles else chance.uniform(0.3, 0.6 if at < seconds / 2 else 0.62)
            leads = rank % tensor_parallel_size == 0
            add(source, at + 1, "steps", **who, steps=25, samples=800 if leads else 0, busy_seconds=0.95,
                begin=BEGIN + at, comm_seconds=communication, slowest_seconds=chance.uniform(0.04, 0.09),
                slowest_step=3, batch_size=32, step=25)  # fmt: skip
            memory = min(76e9, memory + chance.uniform(0, 6e8))
            heat = 25 * max(0.0, at / seconds - 0.5) * 2 if rank == 3 % num_ranks else 0
            if int(at) % 3 == 0:
                add(source, at + 0.5, "device", **who, memory_used_bytes=memory, memory_total_bytes=85e9,
                    temperature_celsius=60 + heat + chance.uniform(-2, 2), power_watts=400.0)  # fmt: skip
            if leads and int(at) % 5 == 0:
                add(source, at + 0.8, "chunk", **who, job=1, loader=0, chunk=chunk, samples=200,
                    seconds=chance.uniform(3.5, 5.5), nbytes=1 << 20, won=True)  # fmt: skip
                chunk += num_replicas
            at += 1.0
        if rank == 0:
            add(source, seconds * 0.2, "oom", **who, batch_size=64, retry_batch_size=32, step=210)
            add(source, seconds * 0.3, "oom", **who, batch_size=48, retry_batch_size=24, step=390)
            add(source, seconds * 0.6, "retry", **who, reason="rank 0: CollectiveError: all_reduce failed", attempt=1,
                ranks=[0], recovery_seconds=0.02)  # fmt: skip
        if rank == 3 % num_ranks:
            add(source, seconds * 0.8, "verdict", **who, verdict="degraded", previous="healthy", device="GPU-3",
                evidence=["temperature: 87 degrees Celsius, slowdown at 87"])  # fmt: skip
    ranks = list(range(restarted * tensor_parallel_size, (restarted + 1) * tensor_parallel_size))
    add("supervisor", seconds * 0.4, "failure", rank=ranks[0], reason="killed by SIGKILL", signal="SIGKILL")
    add("supervisor", seconds * 0.401, "restart", replica=restarted, ranks=ranks, attempt=1, max_attempts=3,
        reason="rank death")  # fmt: skip
    if num_replicas > 2:
        gone = list(range(retired * tensor_parallel_size, num_ranks))
        add(
            "supervisor",
            seconds * 0.75,
            "retire",
            replica=retired,
            ranks=gone,
            reason="xid_79: GPU has fallen off the bus",
        )
    add("supervisor", seconds * 0.9, "quarantine", job=1, loader=0, start=1234, stop=1236,
        reason="the process died three times on this chunk")  # fmt: skip
    add("supervisor", seconds, "end", exit_code=65, missing_samples="1234-1235", num_missing=2,
        observer_failures={"metrics": 2})  # fmt: skip
    target = directory / "events"
    target.mkdir(parents=True)
    for source, lines in events.items():
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (target / f"{source}.jsonl").write_text(text, encoding="utf-8")
    with open(target / "rank-00001.attempt-0.jsonl", "a", encoding="utf-8") as file:
        file.write('{"ts": 1790000')  # the rank was killed while it wrote
    return directory
