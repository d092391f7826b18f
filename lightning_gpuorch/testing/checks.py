"""What a run must have left behind, and what it must not: the same predictions to the bit, and nothing else."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from lightning_gpuorch.errors import GPUOrchError, format_indices
from lightning_gpuorch.paths import Location
from lightning_gpuorch.predictions.storage.files import TEMPORARY_PREFIX
from lightning_gpuorch.predictions.storage.stores import store_of

_MOST_DIFFERENCES = 5


def job_directories(output: Location) -> list[str]:
    """Directories of predictions under a run's output directory, relative to it (``.`` is itself), in a fixed order."""
    return sorted(_job_directories(output, "."))


def _job_directories(directory: Location, shown: str) -> Iterator[str]:
    store = store_of(directory)
    if not store.holds_anything(directory):
        return
    if "manifest.json" in store.names(directory):
        yield shown
    for name in store.folders(directory, ""):
        yield from _job_directories(directory / name, name if shown == "." else f"{shown}/{name}")


def _inside(output: Location, job: str) -> Location:
    return output if job == "." else output / job


def compare_outputs(calm: Location, harmed: Location) -> list[str]:
    """Compare the predictions of two runs, batch by batch and bit by bit.

    Args:
        calm: Output directory of the undisturbed run.
        harmed: Output directory of the other.

    Returns:
        One line per difference, none if they are identical; only the first few differences of a job are spelled out.
    """
    from lightning_gpuorch.predictions.reading.reader import read_predictions

    jobs, found = job_directories(calm), job_directories(harmed)
    if jobs != found:
        return [f"the calm run has predictions in {_names(jobs)}, this one in {_names(found)}"]
    problems = []
    for job in jobs:
        try:
            pair = [_as_list(read_predictions(_inside(root, job))) for root in (calm, harmed)]
            if len(pair[0]) != len(pair[1]):
                problems.append(f"{job}: {len(pair[0])} dataloaders in the calm run, {len(pair[1])} here")
            for loader, (expected, got) in enumerate(zip(*pair, strict=False)):
                where = f"{job}, dataloader {loader}" if len(pair[0]) > 1 else str(job)
                problems += itertools.islice(_differences(where, expected, got), _MOST_DIFFERENCES)
        except GPUOrchError as error:
            problems.append(f"{job}: {type(error).__name__}: {error}")
    return problems


def missing_samples(output: Location) -> dict[str, Sequence[int]]:
    """Samples without a prediction, per job directory and dataloader."""
    from lightning_gpuorch.predictions.reading.reader import read_predictions

    missing: dict[str, Sequence[int]] = {}
    for job in job_directories(output):
        for loader, predictions in enumerate(_as_list(read_predictions(_inside(output, job), allow_missing=True))):
            if predictions.missing:
                missing[f"{job}/dataloader_{loader}"] = list(predictions.missing)
    return missing


def unnamed_samples(output: Location, log: str) -> list[str]:
    """What is missing in ``output`` and not named in ``log``, one line per dataloader."""
    return [
        f"{where} lacks {len(indices)} samples, {format_indices(indices)}, and the messages do not name them"
        for where, indices in missing_samples(output).items()
        if format_indices(indices) not in log
    ]


def processes_with(variable: str, value: str) -> list[int]:
    """Processes that were started with an environment variable, in this process's view; not this process."""
    wanted = f"{variable}={value}".encode()
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            variables = (entry / "environ").read_bytes().split(b"\0")
        except OSError:  # gone, or somebody else's
            continue
        if wanted in variables and int(entry.name) != os.getpid():
            found.append(int(entry.name))
    return found


def run_names(temporary: Path) -> set[str]:
    """Runs that have their folder in a temporary directory now."""
    return {path.name for path in temporary.glob("gpuorch-*/run-*")}


def leftovers(output: Location, temporary: Path, seen: Iterable[str], killed: Iterable[str] = ()) -> list[str]:
    """Files that should be gone once a job has ended.

    Args:
        output: Its output directory.
        temporary: The temporary directory it was given.
        seen: Runs that had a folder there at some time.
        killed: Runs whose supervisor was killed: their records stay for the diagnosis.
    """
    # What a killed writer leaves in an object store cannot be told from what a living one needs; later runs sweep it.
    half = [str(path) for path in output.rglob(f"{TEMPORARY_PREFIX}*")] if isinstance(output, Path) else []
    folders = [str(path) for path in temporary.glob("gpuorch-*/run-*") if path.name not in set(killed)]
    tables = [str(path) for name in seen for path in Path("/dev/shm").glob(f"gpuorch-{name}*")]
    return [f"left behind: {path}" for path in (*half, *folders, *tables)]


def _as_list(found: Any) -> list[Any]:
    from lightning_gpuorch.predictions.reading.reader import Predictions

    return [found] if isinstance(found, Predictions) else found


def _names(jobs: Sequence[str]) -> str:
    return ", ".join(jobs) or "no directory"


def _differences(where: str, expected: Any, got: Any) -> Iterator[str]:
    if len(expected) != len(got):
        yield f"{where}: {len(expected)} batches in the calm run, {len(got)} here"
        return
    for number, (wanted, found) in enumerate(zip(expected, got, strict=True)):
        if _bits(wanted) != _bits(found):
            yield f"{where}: batch {number} differs: {_short(wanted)} in the calm run, {_short(found)} here"


def _bits(output: Any) -> bytes:
    """An output in its durable form, which is the same for the same types, shapes and bits."""
    from lightning_gpuorch.predictions.storage.part_file import encode_envelope

    return b"".join(bytes(buffer) for buffer in encode_envelope({}, [output]).buffers)


def _short(output: Any) -> str:
    text = " ".join(repr(output).split())
    return text if len(text) <= 80 else text[:77] + "..."
