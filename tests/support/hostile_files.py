"""Files of every kind that is read from an output directory, a run's records or a cache, and everything that reads them."""

from __future__ import annotations

import json
import logging
import os
import random
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch

from lightning_gpuorch.cli.predictions import show, verify
from lightning_gpuorch.cli.report import report
from lightning_gpuorch.cli.top import top
from lightning_gpuorch.control.coordinator import Coordinator
from lightning_gpuorch.control.error_record import ErrorRecord
from lightning_gpuorch.control.messages.base import Sender
from lightning_gpuorch.control.messages.leases import OpenJob
from lightning_gpuorch.errors import GPUOrchError
from lightning_gpuorch.parallel.tensor_parallel.plan_cache import PlanCache
from lightning_gpuorch.predictions import LoaderLayout, Manifest, PartStore, StoredBatch, read_predictions
from lightning_gpuorch.predictions.loading.order import Order
from lightning_gpuorch.predictions.storage.fragments import FragmentReader, FragmentWriter, numbers_of
from lightning_gpuorch.predictions.storage.journal import loader_directory
from lightning_gpuorch.predictions.storage.manifest import (
    load,
    open_or_create,
    read_quarantine,
    record_mismatch,
    record_quarantine,
    set_num_units,
)
from lightning_gpuorch.telemetry.metrics.efficiency import Baseline
from lightning_gpuorch.telemetry.metrics.exporter import ENDPOINT_FILE, read_endpoint
from lightning_gpuorch.telemetry.metrics.exposition import merge_directory
from lightning_gpuorch.telemetry.run_directory import OWNER_FILE, find_runs, sweep
from tests.support import mutations
from tests.telemetry.synthetic_run import write_run

_BATCH = 4
_PARTS = 5
"""Of a job: a job is opened for each change."""
_INPUT = torch.arange(12.0).reshape(4, 3)

Change = Callable[[random.Random, bytes], bytes]


@dataclass(frozen=True)
class Target:
    """A file to be changed, how, and what reads it."""

    name: str
    path: str
    change: Change
    readers: Sequence[Callable[[Path, str], object]]


class TinyModel(torch.nn.Module):
    """Something a plan can be made for in milliseconds."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = torch.nn.Linear(3, 16), torch.nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.relu(self.up(x)))


# --- The files --------------------------------------------------------------------------------------------------------


def write_files(root: Path, values: Sequence[Any]) -> None:
    """Write all files below a directory.

    Args:
        root: An empty directory.
        values: Outputs of every type.
    """
    per_job = _BATCH * _PARTS
    for number, start in enumerate(range(0, len(values), per_job)):
        some = [*values[start : start + per_job], *[None] * per_job][:per_job]
        _write_job(root / f"job{number}", some)
    write_run(root / "job0" / "runs" / "run-1", seconds=30)
    _write_other_files(root)


def _write_job(job: Path, values: Sequence[Any]) -> None:
    groups = [list(values[start : start + _BATCH]) for start in range(0, len(values), _BATCH)]
    open_or_create(job, manifest_of())
    sampled = PartStore(loader_directory(job, 0))
    for chunk, group in enumerate(groups):
        start = chunk * _BATCH
        sampled.commit(chunk, [StoredBatch(start, list(range(start, start + _BATCH)), _BATCH, group)], {"read": "x"})
    stream = PartStore(loader_directory(job, 1))
    for chunk in range(2):
        units = range(2 * chunk, 2 * chunk + 2)
        stream.commit(chunk, [StoredBatch(unit, None, None, {"y": torch.ones(3, 2)}) for unit in units], {})
    set_num_units(job, 1, 4)
    scattered = PartStore(loader_directory(job, 2))
    for rank in range(2):
        rows = [StoredBatch(i, [4 * i + rank, 4 * i + 2 + rank], 2, torch.ones(2, 3)) for i in range(2)]
        scattered.commit(rank, rows, {})
    record_quarantine(job, 0, 2, 3, "died three times")
    record_quarantine(job, 1, 0, 1, "out of memory")
    for loader in range(2):
        fragments = FragmentWriter(job, loader, "samples")
        for units in ([1, 2, 5], [6, 7], [9]):
            fragments.add(
                StoredBatch(units[0], list(units), len(units), torch.ones(len(units), 2), list(units)),
                {unit // _BATCH for unit in units},
            )
            fragments.write()
    Order(torch.randperm(20, generator=torch.Generator().manual_seed(0)).numpy()).store(loader_directory(job, 0))
    ends = torch.tensor([2, 5]).numpy()
    Order(torch.arange(5).numpy(), ends).store(loader_directory(job, 0))
    Order(["a", ("b", 1), "c"]).store(loader_directory(job, 0))


def _write_other_files(root: Path) -> None:
    distrusted = root / "distrusted"
    open_or_create(distrusted, manifest_of())
    record_mismatch(distrusted, "rank 1 has read another stream")
    running = root / "tmp" / f"gpuorch-{os.getuid()}" / "run-2"
    write_run(running, seconds=20)
    owner = {"run_id": "run-2", "pid": 1, "began": 1.7e9, "command": "gpuorch run x.py"}
    (running / OWNER_FILE).write_text(json.dumps(owner))
    (running / "errors").mkdir()
    ErrorRecord(type="ValueError", message="no", units=(3, 4), traceback="Traceback").write(
        running / "errors" / "r.json"
    )
    metrics = running / "metrics"
    metrics.mkdir()
    (metrics / "rank0.0.prom").write_text(
        '# HELP a_total A\n# TYPE a_total counter\na_total{rank="0"} 3.0\n# HELP b B\n# TYPE b gauge\nb 1.5\n'
    )
    (metrics / ENDPOINT_FILE).write_text(json.dumps({"host": "127.0.0.1", "port": 9, "pid": 3}))
    (root / "plans").mkdir()
    PlanCache(root / "plans").plan(TinyModel(), _INPUT, 2)
    Baseline(12.5, {"model": "tiny", "batch_size": 4}, 100).save(root / "baseline.json")


def manifest_of() -> Manifest:
    """Of every job."""
    identity: dict[str, str | int | None] = {"dataset": "a.Dataset", "length": _PARTS * _BATCH, "batch_size": _BATCH}
    sampled = LoaderLayout(
        unit="sample", num_units=_PARTS * _BATCH, batch_size=_BATCH, chunk_size=_BATCH, identity=identity
    )
    stream = LoaderLayout(unit="batch", num_units=None, batch_size=None, chunk_size=2, identity={"batch_size": 3})
    scattered = LoaderLayout(unit="scattered", num_units=8, batch_size=_BATCH, chunk_size=_BATCH, identity={})
    return Manifest(
        loaders=[sampled, stream, scattered],
        model_fingerprint="abc",
        versions={"torch": "2"},
        created=1.7e9,
        extra={"n": [1]},
    )


def targets(root: Path) -> list[Target]:
    """Every file, by how often it is to be chosen."""
    found: list[Target] = []

    def add(pattern: str, change: Change, readers: Sequence[Callable[[Path, str], object]], times: int = 1) -> None:
        paths = sorted(root.glob(pattern))
        assert paths, pattern
        for path in paths:
            relative = path.relative_to(root).as_posix()
            found.extend([Target(pattern, relative, change, readers)] * times)

    add("job*/dataloader_0/part-*.gpq", mutations.change_part, [read_part, read_part, verify_part, resume], 6)
    add("job*/dataloader_[12]/part-*.gpq", mutations.change_part, [read_all, verify_part, resume])
    add("job*/unfinished-*/part-*.gpq", mutations.change_part, [read_fragments, resume])
    add("job*/dataloader_0/order-*.gpq", mutations.change_part, [read_order], 2)
    add("job0/manifest.json", mutations.change_sealed, [read_all, resume, verify_command], 20)
    add("job0/dataloader_1/end.json", mutations.change_sealed, [read_all, resume], 8)
    add("distrusted/mismatch.json", mutations.change_sealed, [load_distrusted], 5)
    add("job0/quarantine.jsonl", mutations.change_lines, [notes, read_with_gaps], 10)
    add("job0/runs/run-1/events/*.jsonl", mutations.change_lines, [report_of_job, top_of_job], 1)
    add("tmp/*/*/run.json", mutations.change_object, [runs, top_of_runs], 10)
    add("tmp/*/*/events/*.jsonl", mutations.change_lines, [top_of_runs], 1)
    add("tmp/*/*/errors/r.json", mutations.change_object, [error_record], 8)
    add("tmp/*/*/metrics/*.prom", mutations.change_bytes, [metrics_of_run], 5)
    add(f"tmp/*/*/metrics/{ENDPOINT_FILE}", mutations.change_object, [metrics_of_run], 3)
    add("plans/*.json", mutations.change_object, [cached_plan], 20)
    add("baseline.json", mutations.change_object, [baseline], 5)
    return found


# --- What reads them --------------------------------------------------------------------------------------------------


def read_part(root: Path, path: str) -> None:
    """Everything a user does with predictions, around one part."""
    chunk = int(path[-13:-4])
    found = read_predictions(_job(root, path), allow_missing=True)[0]
    found[chunk]
    piece = found[chunk : chunk + 1]
    for number, _ in zip(range(9), piece.indexed_samples(), strict=False):
        assert number < 9
    list(zip(range(9), piece.indices, strict=False))


def read_all(root: Path, path: str) -> None:
    """Open the job and read a few batches of each loader."""
    found = read_predictions(_job(root, path), allow_missing=True)
    for predictions in found if isinstance(found, list) and type(found) is list else [found]:
        for position in range(min(len(predictions), 3)):
            predictions[position]
        len(predictions.indices) if predictions._layout.unit == "scattered" else None
        str(predictions.missing)


def read_with_gaps(root: Path, path: str) -> None:
    """A job that is not complete names what is missing, and why."""
    for chunk in (0, 2):
        (_job(root, path) / f"dataloader_0/part-{chunk:09d}.gpq").unlink()
    read_predictions(_job(root, path))


def verify_part(root: Path, path: str) -> None:
    """Check one part as ``gpuorch predictions verify`` does."""
    list(PartStore((root / path).parent).verify([int(path[-13:-4])]))


def verify_command(root: Path, _path: str) -> None:
    """The command, of a job whose parts are whole."""
    shutil.rmtree(root / "job0" / "dataloader_0")
    _command(verify, root / "job0")
    _command(show, root / "job0", "--count", "2")


def resume(root: Path, path: str) -> None:
    """What the coordinator does when a rank opens the job."""
    coordinator = Coordinator(1)
    request = OpenJob(
        sender=Sender(rank=0, replica=0, generation=0), job=0, directory=str(_job(root, path)), storage_options={},
        ephemeral=False,
        manifest=manifest_of().to_dict(), part_bytes=2**26, part_seconds=30.0, resume_check="all",
    )  # fmt: skip
    coordinator.handle(request).result(60)
    coordinator.verify()


def read_fragments(root: Path, path: str) -> None:
    """Take over what a killed rank has kept."""
    reader = FragmentReader(_job(root, path), int(path.split("unfinished-")[1][0]), "samples")
    if reader.has_any(look_again=True):
        for batch in reader.find(range(12)):
            positions = dict.fromkeys(range(12), 0)
            [positions.pop(number, -1) for number in numbers_of(batch)]


def read_order(root: Path, path: str) -> None:
    """A later life of a rank."""
    order = Order.load((root / path).parent, path.split("order-")[1][:-4])
    order.take(range(min(2, len(order))))
    assert order.extremes is not None
    assert order.digest_of_indices


def notes(root: Path, _path: str) -> None:
    """Units that were given up."""
    read_quarantine(root / "job0")


def load_distrusted(root: Path, _path: str) -> None:
    """A directory whose predictions cannot be trusted."""
    load(root / "distrusted")


def report_of_job(root: Path, _path: str) -> None:
    """The command."""
    _command(report, root / "job0")


def top_of_job(root: Path, _path: str) -> None:
    """The command, of a job that is over."""
    _command(top, root / "job0", "--once")


def runs(_root: Path, _path: str) -> None:
    """What runs on this node; the temporary directory is that of the files."""
    for run in find_runs():
        run.job_directories()
    sweep(older_than_seconds=1e12)


def top_of_runs(root: Path, _path: str) -> None:
    """The command, of a run that it has to look for."""
    _command(top, "run-2", "--once")
    _command(top, root / "job0", "--once")
    _command(top, "--once")


def error_record(root: Path, path: str) -> None:
    """What a worker has left."""
    record = ErrorRecord.read(root / path)
    if record is not None:
        assert record.headline
        assert record.signature is not None


def metrics_of_run(root: Path, path: str) -> None:
    """A scrape."""
    directory = (root / path).parent
    merge_directory(directory)
    read_endpoint(directory)


def cached_plan(root: Path, _path: str) -> None:
    """A later run of the same model."""
    plan = PlanCache(root / "plans").plan(TinyModel(), _INPUT, 2)
    assert plan.tensor_parallel_size == 2
    plan.describe()


def baseline(root: Path, _path: str) -> None:
    """The throughput of one device."""
    Baseline.load(root / "baseline.json", {"model": "tiny", "batch_size": 4})


def _job(root: Path, path: str) -> Path:
    return root / path.split("/")[0]


def _command(command: click.Command, *arguments: object) -> None:
    try:
        command.main([str(argument) for argument in arguments], standalone_mode=False)
    except (click.ClickException, SystemExit):
        return


DISTURBING = {"resume", "read_with_gaps", "verify_command", "cached_plan", "runs"}
"""Readers that change other files than the one that was changed."""
ALLOWED = (GPUOrchError,)
"""What a reader may raise."""


def quiet() -> None:
    """No log lines and no output: thousands of files are refused."""
    logging.disable(logging.CRITICAL)
