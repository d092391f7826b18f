"""A job of a billion rows, as its coordinator sees it: how many files, how long a resume takes, how much memory it needs.

    python -m tests.benchmarks.billion_rows [--rows 1000000000] [--replicas 8] [--row-bytes 1024] [--rows-per-second 5000]

The coordinator, its leases, the directory and its files are the real ones; the rows are simulated. Replicas are told of in
requests, and each chunk's part has the header of a part with all of its rows (runs of batches of 32) and 4 KiB in place of
their predictions, so that the disk holds megabytes and not a terabyte. Prints one JSON object: files, chunks, stretches, the
coordinator's resident memory after a tenth of the job and at its end, and what a resume takes of the complete journal and of
one that lacks one part in a hundred.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
import time
from pathlib import Path

from lightning_gpuorch.control.coordinator import Coordinator
from lightning_gpuorch.control.messages.base import Sender
from lightning_gpuorch.control.messages.leases import ChunkDone, Lease, NextChunk, OpenJob
from lightning_gpuorch.predictions.loading.describe import default_first_chunks
from lightning_gpuorch.predictions.storage.journal import loader_directory
from lightning_gpuorch.predictions.storage.layout import LoaderLayout, StoredBatch
from lightning_gpuorch.predictions.storage.manifest import Manifest
from lightning_gpuorch.predictions.storage.parts import PartStore

_BATCH = 32
_PAYLOAD = bytes(4096)


def resident_mib() -> float:
    """Resident memory of this process."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmRSS"].split()[0]) / 1024


class Job:
    """One run of the job: a coordinator, and its replicas as requests."""

    def __init__(self, directory: Path, options: argparse.Namespace):
        self._options = options
        self.coordinator = Coordinator(options.replicas)
        batches = -(-options.rows // _BATCH)
        first = default_first_chunks(batches, options.replicas)
        self.layout = LoaderLayout(
            unit="sample", num_units=options.rows, batch_size=_BATCH, chunk_size=32 * _BATCH, first_chunks=first
        )
        self._store = PartStore(loader_directory(directory, 0), fsync=False)
        self._senders = [Sender(rank=rank, replica=rank, generation=0) for rank in range(options.replicas)]
        self._sequences = [0] * options.replicas
        request = OpenJob(
            sender=self._senders[0], job=0, directory=str(directory), storage_options={}, ephemeral=False,
            manifest=Manifest(loaders=[self.layout]).to_dict(), part_bytes=64 * 2**20, part_seconds=30.0,
            resume_check="sampled",
        )  # fmt: skip
        began = time.monotonic()
        self.opened = self.coordinator.handle(request).result(3600)
        self.open_seconds = time.monotonic() - began

    def step(self, replica: int) -> int:
        """Compute one chunk; returns its rows, 0 at the end."""
        place = {"sender": self._senders[replica], "job": 0, "loader": 0}
        request = NextChunk(**place, sequence=self._sequences[replica], block=True)
        lease = self.coordinator.handle(request).result(60)
        self._sequences[replica] += 1
        if not isinstance(lease, Lease):
            return 0
        units = self.layout.with_stretches(lease.stretches).chunk_range(lease.chunk)
        starts = range(units.start, units.stop, _BATCH)
        batches = [StoredBatch(i, range(i, min(i + _BATCH, units.stop)), None, None) for i in starts]
        batches[0].output = _PAYLOAD
        won = self._store.commit(lease.chunk, batches, {"run": "drill", "replica": replica, "generation": 0})
        done = ChunkDone(
            **place, chunk=lease.chunk, won=won, samples=len(units), num_bytes=len(units) * self._options.row_bytes,
            seconds=len(units) / self._options.rows_per_second,
        )  # fmt: skip
        self.coordinator.handle(done).result(60)
        return len(units)


def compute(directory: Path, options: argparse.Namespace) -> dict[str, float]:
    """Do the whole job; returns the coordinator's memory on the way."""
    job, done, memory = Job(directory, options), 0, {}
    while True:
        rows = sum(job.step(replica) for replica in range(options.replicas))
        done += rows
        if "at_a_tenth" not in memory and done >= options.rows / 10:
            memory["at_a_tenth"] = resident_mib()
        if not rows:
            break
    job.coordinator.verify()
    memory["at_the_end"] = resident_mib()
    return memory


def in_a_process(what: str, directory: Path, options: argparse.Namespace) -> dict[str, float]:
    """Run a part of the drill in a process of its own, whose memory is only that of a coordinator."""
    receive, send = os.pipe()
    child = os.fork()
    if not child:
        os.close(receive)
        if what == "compute":
            answer = compute(directory, options)
        else:
            before = resident_mib()
            job = Job(directory, options)
            answer = {"seconds": job.open_seconds, "mib": resident_mib() - before, "chunks": job.opened.resumed_chunks}
        with open(send, "w") as pipe:
            json.dump(answer, pipe)
        os._exit(0)
    os.close(send)
    with open(receive) as pipe:
        answer = json.load(pipe)
    os.waitpid(child, 0)
    return {name: round(value, 2) for name, value in answer.items()}


def main() -> None:
    """Run the drill."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rows", type=int, default=10**9)
    parser.add_argument("--replicas", type=int, default=8)
    parser.add_argument("--row-bytes", type=int, default=1024)
    parser.add_argument("--rows-per-second", type=float, default=5000.0, help="of each replica")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name) / "out"
        began = time.monotonic()
        memory = in_a_process("compute", directory, options)
        took = time.monotonic() - began
        parts = sorted(loader_directory(directory, 0).glob("part-*"))
        print(
            json.dumps(
                {
                    "rows": options.rows,
                    "parts": len(parts),
                    "stretches": len(list(loader_directory(directory, 0).glob("stretch-*"))),
                    "files": sum(path.is_file() for path in directory.rglob("*")),
                    "drill_seconds": round(took, 1),
                    "coordinator_mib": memory,
                    "resume_complete": in_a_process("resume", directory, options),
                    "resume_with_gaps": _with_gaps(directory, parts, options),
                }
            )
        )
    sys.stdout.flush()


def _with_gaps(directory: Path, parts: list[Path], options: argparse.Namespace) -> dict[str, float]:
    for path in random.Random(0).sample(parts, len(parts) // 100):
        path.unlink()
    return in_a_process("resume", directory, options)


if __name__ == "__main__":
    main()
