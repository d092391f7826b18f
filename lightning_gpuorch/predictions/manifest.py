"""What a job is: the file that fixes its identity, so that only the same job goes on in its directory."""

from __future__ import annotations

import dataclasses
import json
import os
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_gpuorch.errors import CorruptPartError, JobMismatchError
from lightning_gpuorch.predictions.layout import LoaderLayout
from lightning_gpuorch.predictions.parts import first_writer_wins, storage_error, write_durably

FORMAT = 1
NAME = "manifest.json"
_QUARANTINE = "quarantine.jsonl"


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Identity and geometry of a job.

    Attributes:
        loaders: One layout per dataloader.
        model_fingerprint: Identity of the weights; None if it is not to be compared.
        versions: Versions of the packages that began the job; for information.
        created: Unix time at which it began.
    """

    loaders: Sequence[LoaderLayout]
    model_fingerprint: str | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    created: float = field(default_factory=time.time)

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "format": FORMAT,
            "created": self.created,
            "versions": dict(self.versions),
            "model_fingerprint": self.model_fingerprint,
            "loaders": [layout.to_dict() for layout in self.loaders],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Manifest:
        """The manifest that :meth:`to_dict` wrote."""
        return cls(
            loaders=[LoaderLayout.from_dict(layout) for layout in data["loaders"]],
            model_fingerprint=data["model_fingerprint"],
            versions=data["versions"],
            created=data["created"],
        )


def load(directory: str | os.PathLike[str]) -> Manifest | None:
    """The manifest in a directory; None if there is none.

    Raises:
        CorruptPartError: It cannot be read.
        JobMismatchError: It was written in a format this version does not know.
    """
    path = Path(directory) / NAME
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["format"] != FORMAT:
            raise JobMismatchError(f"{path} has format {data['format']}, this version reads {FORMAT}.")
        return Manifest.from_dict(data)
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise CorruptPartError(f"{path} is damaged ({error}); restore it, or use another directory.") from error


def open_or_create(directory: str | os.PathLike[str], wanted: Manifest) -> Manifest:
    """Begin a job in a directory, or go on with it.

    Args:
        directory: Made if it does not exist.
        wanted: What the job is now.

    Returns:
        The manifest in force: an existing one keeps its chunk size, so that its parts stay valid.

    Raises:
        JobMismatchError: The directory holds another job; every difference is named.
        CorruptPartError: Its manifest is damaged.
        PredictionStorageError: It cannot be written.
    """
    root = Path(directory)
    existing = load(root)
    if existing is None:
        if root.is_dir() and any(root.glob("dataloader_*/part-*")):
            raise JobMismatchError(f"{root} holds parts without a {NAME}; use another directory, or restore the file.")
        try:
            root.mkdir(parents=True, exist_ok=True)
            if first_writer_wins(root / NAME, _serialise(wanted)):
                return wanted
        except OSError as error:
            raise storage_error(error, root) from error
        existing = load(root)
        assert existing is not None
    differences = compare(existing, wanted)
    if differences:
        raise JobMismatchError(
            f"{root} holds the predictions of another job:\n  "
            + "\n  ".join(differences)
            + "\nUse another output_dir, or "
            "remove this one to start afresh.",
            differences,
        )
    in_force = dataclasses.replace(
        existing,
        loaders=[
            dataclasses.replace(old, batch_size=new.batch_size)
            for old, new in zip(existing.loaders, wanted.loaders, strict=True)
        ],
    )
    if in_force != existing:
        _replace(root, in_force)
    return in_force


def compare(existing: Manifest, wanted: Manifest) -> list[str]:
    """Differences that make two jobs different, one line each."""
    if len(existing.loaders) != len(wanted.loaders):
        return [f"number of dataloaders: {len(existing.loaders)} there, {len(wanted.loaders)} here"]
    differences = []
    for number, (old, new) in enumerate(zip(existing.loaders, wanted.loaders, strict=True)):
        prefix = f"dataloader {number}: " if len(wanted.loaders) > 1 else ""
        if old.unit != new.unit:
            differences.append(f"{prefix}work counted by {old.unit} there, by {new.unit} here")
        if None not in (old.num_units, new.num_units) and old.num_units != new.num_units:
            differences.append(f"{prefix}{old.unit} count: {old.num_units} there, {new.num_units} here")
        for key in sorted({*old.identity, *new.identity}):
            if old.identity.get(key) != new.identity.get(key):
                differences.append(f"{prefix}{key}: {old.identity.get(key)} there, {new.identity.get(key)} here")
    fingerprints = (existing.model_fingerprint, wanted.model_fingerprint)
    if None not in fingerprints and fingerprints[0] != fingerprints[1]:
        differences.append(
            f"model weights: fingerprint {fingerprints[0]} there, {fingerprints[1]} here (load the same weights on every "
            "rank, or seed them; model_fingerprint='off' skips this check)"
        )
    return differences


def set_num_units(directory: str | os.PathLike[str], loader: int, num_units: int) -> Manifest:
    """Record where a stream has ended; returns the manifest in force."""
    manifest = load(directory)
    assert manifest is not None
    loaders = list(manifest.loaders)
    loaders[loader] = dataclasses.replace(loaders[loader], num_units=num_units)
    manifest = dataclasses.replace(manifest, loaders=loaders)
    _replace(Path(directory), manifest)
    return manifest


def record_quarantine(directory: str | os.PathLike[str], loader: int, start: int, stop: int, reason: str) -> None:
    """Note units that were given up, for whoever reads the directory later."""
    line = json.dumps({"loader": loader, "start": start, "stop": stop, "reason": reason}) + "\n"
    with open(Path(directory) / _QUARANTINE, "a", encoding="utf-8") as file:
        file.write(line)
        file.flush()
        os.fsync(file.fileno())


def read_quarantine(directory: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """What :func:`record_quarantine` noted."""
    try:
        lines = (Path(directory) / _QUARANTINE).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in lines if line]


def _replace(root: Path, manifest: Manifest) -> None:
    temporary = root / f".tmp-{NAME}-{os.getpid()}-{secrets.token_hex(4)}"
    try:
        write_durably(temporary, _serialise(manifest))
        os.replace(temporary, root / NAME)
    except OSError as error:
        raise storage_error(error, root) from error
    finally:
        temporary.unlink(missing_ok=True)


def _serialise(manifest: Manifest) -> bytes:
    return json.dumps(manifest.to_dict(), indent=1).encode()
