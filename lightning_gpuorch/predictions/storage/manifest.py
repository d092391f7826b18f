"""The identity of the job in a directory, so that only the same job goes on in it.

::

    DIR/manifest.json                     identity and geometry, written once (only batch_size may be replaced)
    DIR/quarantine.jsonl                  units that were given up, one line each, appended
    DIR/mismatch.json                     replicas have read different input, so that no prediction here can be trusted
    DIR/dataloader_0/part-000000000.gpq   predictions, one file per chunk
    DIR/dataloader_0/end.json             where a stream was found to end, written once
    DIR/dataloader_0/stretch-0001.json    how large the next chunks are, in long jobs, each written once
    DIR/dataloader_0/order-....gpq        the order that a sampler gave when the job began, written once
    DIR/dataloader_0/shards-....json      names and lengths of a stream's shards when the job began, written once
    DIR/dataloader_0/shard-000000003-ends-at-25.json   where a shard was found to end, written once
    DIR/dataloader_1/...

``manifest.json``, ``end.json`` and stretches carry a CRC-32 of themselves: a flipped digit in ``chunk_size`` would put every
prediction in the wrong place.
"""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from lightning_gpuorch.checked_files import integer, is_number, parse_object
from lightning_gpuorch.errors import ConfigurationError, CorruptPartError, InputMismatchError, JobMismatchError
from lightning_gpuorch.paths import Location, ObjectPath, location
from lightning_gpuorch.predictions.storage.journal import OutputFormat, PartJournal, loader_directory
from lightning_gpuorch.predictions.storage.layout import LoaderLayout
from lightning_gpuorch.predictions.storage.sealed import read_sealed, sealed
from lightning_gpuorch.predictions.storage.shard_list import ShardList
from lightning_gpuorch.predictions.storage.stores import storage_error, store_of
from lightning_gpuorch.predictions.storage.stretches import with_stored_stretches

FORMAT_VERSION = 1
_MAX_LOADERS = 4096

_MANIFEST_NAME = "manifest.json"
_END_NAME = "end.json"
_QUARANTINE_NAME = "quarantine.jsonl"
_MISMATCH_NAME = "mismatch.json"

Life = Literal["first", "later", "resumed"]
"""Of a rank that is compared with the job in force: its first in this launch, a later one, or the first of a later launch."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Identity and geometry of a job.

    Attributes:
        loaders: One layout per dataloader.
        keep_outputs: Whether outputs are stored, or markers in their place.
        output_format: Of the parts.
        model_fingerprint: Identity of the weights; None if it is not to be compared.
        versions: Versions of the packages that began the job; for information.
        created: Unix time in seconds at which it began.
        extra: Further plain JSON; kept, not compared.
    """

    loaders: Sequence[LoaderLayout]
    keep_outputs: bool = True
    output_format: OutputFormat = "gpq"
    model_fingerprint: str | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    created: float = field(default_factory=time.time)
    extra: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return the manifest as plain JSON."""
        return {
            "format": FORMAT_VERSION,
            "created": self.created,
            "versions": dict(self.versions),
            "model_fingerprint": self.model_fingerprint,
            "keep_outputs": self.keep_outputs,
            "output_format": self.output_format,
            "loaders": [layout.to_dict() for layout in self.loaders],
            "extra": dict(self.extra),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Manifest:
        """Return the manifest that :meth:`to_dict` described.

        Raises:
            ConfigurationError: A value is out of range.
            KeyError: A field is missing.
        """
        loaders = data["loaders"]
        if not isinstance(loaders, list) or len(loaders) > _MAX_LOADERS:
            raise ConfigurationError(f"loaders must be a list of at most {_MAX_LOADERS} layouts")
        if not all(isinstance(data[name], dict) for name in ("versions", "extra")) or not is_number(data["created"]):
            raise ConfigurationError("versions and extra must be objects, created a number")
        output_format = data.get("output_format", "gpq")
        if output_format not in get_args(OutputFormat):
            raise ConfigurationError(
                f"output_format must be one of {get_args(OutputFormat)}, got {output_format!r:.40}"
            )
        return cls(
            loaders=[LoaderLayout.from_dict(layout) for layout in loaders],
            keep_outputs=data.get("keep_outputs", True),
            output_format=output_format,
            model_fingerprint=data["model_fingerprint"],
            versions=data["versions"],
            created=data["created"],
            extra=data["extra"],
        )


def load(directory: str | os.PathLike[str] | ObjectPath) -> Manifest | None:
    """Read the manifest of a directory.

    Returns:
        The manifest, with the ends of streams as far as they are known; None if there is none.

    Raises:
        CorruptPartError: It is damaged.
        InputMismatchError: Replicas have read different input when its parts were written.
        JobMismatchError: It has a format this version does not know.
        PredictionStorageError: It cannot be read.
    """
    root = location(directory, "directory")
    mismatch = read_sealed(root / _MISMATCH_NAME)
    if mismatch is not None:
        raise InputMismatchError(
            f"the predictions in {root} cannot be trusted. {mismatch.get('reason', '')} Remove the directory, "
            "or use another one."
        )
    data = read_sealed(root / _MANIFEST_NAME)
    if data is None:
        return None
    if data.get("format") != FORMAT_VERSION:
        raise JobMismatchError(
            f"{root / _MANIFEST_NAME} has format {data.get('format')!r}, and this version of lightning_gpuorch knows "
            f"format {FORMAT_VERSION}. Use the version that began the job, or another output directory."
        )
    try:
        manifest = Manifest.from_dict(data)
    except (ConfigurationError, KeyError, TypeError) as error:
        raise CorruptPartError(f"{root / _MANIFEST_NAME} does not describe a job: {error!r}.") from error
    return dataclasses.replace(
        manifest,
        loaders=[
            with_stored_stretches(loader_directory(root, loader), _with_end(root, loader, layout))
            for loader, layout in enumerate(manifest.loaders)
        ],
    )


def open_or_create(directory: str | os.PathLike[str] | ObjectPath, wanted: Manifest) -> Manifest:
    """Begin a job in a directory, or go on with it.

    Args:
        directory: Made if it does not exist.
        wanted: What the job is now.

    Returns:
        The manifest in force. An existing one keeps its chunk sizes, so that its parts stay valid, and takes the batch
        sizes of ``wanted``. Of several callers that begin at once, all get the same one.

    Raises:
        JobMismatchError: The directory holds another job; every difference is named.
        CorruptPartError: Its manifest is damaged.
        StorageFullError: There is no space left.
        PredictionStorageError: The directory cannot be made or written.
    """
    root = location(directory, "directory")
    existing = load(root)
    if existing is None and _holds_parts(root):
        raise JobMismatchError(
            f"{root} holds predictions and no {_MANIFEST_NAME}, so it cannot be told whose they are. "
            "Restore the file, or use another output directory."
        )
    if existing is not None:
        _refuse_another_job(root, existing, wanted)
    store = store_of(root)
    store.check_writable(root)
    try:
        if existing is None:
            if store.create_once(root / _MANIFEST_NAME, [sealed(wanted.to_dict())]):
                return wanted
            existing = load(root)
            assert existing is not None
            _refuse_another_job(root, existing, wanted)
        pairs = zip(existing.loaders, wanted.loaders, strict=True)
        loaders = [dataclasses.replace(old, batch_size=new.batch_size) for old, new in pairs]
        in_force = dataclasses.replace(existing, loaders=loaders)
        if in_force != existing:
            plain = [dataclasses.replace(layout, stretches=()) for layout in loaders]  # they have files of their own
            store.replace(root / _MANIFEST_NAME, sealed(dataclasses.replace(in_force, loaders=plain).to_dict()))
    except OSError as error:
        raise storage_error(error, root) from error
    return in_force


def record_mismatch(directory: str | os.PathLike[str] | ObjectPath, reason: str) -> None:
    """Note durably that replicas have read different input, so that nothing here is taken for a result.

    Raises:
        PredictionStorageError: It cannot be written.
    """
    root = location(directory, "directory")
    try:
        store_of(root).create_once(root / _MISMATCH_NAME, [sealed({"reason": reason})])
    except OSError as error:
        raise storage_error(error, root) from error


def compare(
    existing: Manifest, wanted: Manifest, there: str = "there", here: str = "here", life: Life = "resumed"
) -> list[str]:
    """Return what makes two jobs different, one line each.

    Chunk and batch sizes, versions and ``extra`` may differ, and a fingerprint counts only where both have one. The order
    of the same indices may differ in a later launch, and all of what a sampler gives in a later life: the order that the
    job began with stays in force.

    Args:
        existing: The job in force.
        wanted: What a rank has.
        there: Whose the one is, in words.
        here: Whose the other is.
        life: Of the rank.
    """
    if len(existing.loaders) != len(wanted.loaders):
        return [f"number of dataloaders: {len(existing.loaders)} {there}, {len(wanted.loaders)} {here}"]
    differences = []
    for number, (old, new) in enumerate(zip(existing.loaders, wanted.loaders, strict=True)):
        prefix = f"dataloader {number}: " if len(wanted.loaders) > 1 else ""
        sampled = life == "later" and "order" in old.identity and "order" in new.identity
        if old.unit != new.unit:
            differences.append(f"{prefix}work is counted by {old.unit} {there}, by {new.unit} {here}")
        elif (old.num_shards is None) != (new.num_shards is None):
            ways = ["as a whole" if layout.num_shards is None else "by shard" for layout in (old, new)]
            differences.append(
                f"{prefix}the stream is read {ways[0]} {there}, {ways[1]} {here} (sharding='off' reads it as a whole)"
            )
            continue
        elif None not in (old.num_units, new.num_units) and old.num_units != new.num_units and not sampled:
            noun = "batches" if old.unit == "batch" else "samples"
            differences.append(f"{prefix}number of {noun}: {old.num_units} {there}, {new.num_units} {here}")
        for key in sorted({*old.identity, *new.identity}):
            if (key in ("order", "indices", "fingerprint") and sampled) or (key == "order" and life == "resumed"):
                continue
            values = [layout.identity.get(key, "absent") for layout in (old, new)]
            if values[0] != values[1]:
                name = {"order": f"order given by {new.identity.get('sampler')}", "indices": "indices it gives"}.get(
                    key, key
                )
                differences.append(f"{prefix}{name}: {values[0]} {there}, {values[1]} {here}")
    if existing.keep_outputs != wanted.keep_outputs:
        kept, not_kept = (there, here) if existing.keep_outputs else (here, there)
        differences.append(f"outputs are kept {kept} and not kept {not_kept} (keep_outputs)")
    if existing.output_format != wanted.output_format:
        differences.append(f"output_format: {existing.output_format} {there}, {wanted.output_format} {here}")
    fingerprints = (existing.model_fingerprint, wanted.model_fingerprint)
    if None not in fingerprints and fingerprints[0] != fingerprints[1]:
        differences.append(
            f"model weights: fingerprint {fingerprints[0]} {there}, {fingerprints[1]} {here} (load the same weights on "
            "every rank, or seed them; model_fingerprint='off' skips this check)"
        )
    return differences


def set_num_units(directory: str | os.PathLike[str] | ObjectPath, loader: int, num_units: int) -> Manifest:
    """Record where a stream has ended. Safe to call from several processes, and again.

    Args:
        directory: The job's directory.
        loader: Which dataloader.
        num_units: Units (batches) in all.

    Returns:
        The manifest in force.

    Raises:
        JobMismatchError: Somebody has seen it end elsewhere.
        PredictionStorageError: It cannot be written.
    """
    root = location(directory, "directory")
    path = loader_directory(root, loader) / _END_NAME
    try:
        store_of(root).make_directory(path.parent)
        won = store_of(root).create_once(path, [sealed({"num_units": num_units})])
    except OSError as error:
        raise storage_error(error, root) from error
    manifest = load(root)
    if manifest is None:
        raise JobMismatchError(f"{root} holds no job: there is no {_MANIFEST_NAME} in it.")
    known = manifest.loaders[loader].num_units
    if not won and known != num_units:
        raise JobMismatchError(
            f"dataloader {loader} ended after {num_units} batches here and after {known} elsewhere. A stream must give "
            "the same batches on every rank and in every run."
        )
    return manifest


@dataclass(frozen=True)
class Quarantined:
    """Units that were given up.

    Attributes:
        loader: Index of the dataloader.
        start: First unit.
        stop: One past the last.
        reason: Why.
    """

    loader: int
    start: int
    stop: int
    reason: str


def record_quarantine(
    directory: str | os.PathLike[str] | ObjectPath, loader: int, start: int, stop: int, reason: str
) -> None:
    """Note durably that units ``start`` to ``stop`` of a loader were given up, and why.

    The note explains a gap; that there is one is seen from the parts alone.

    Raises:
        PredictionStorageError: It cannot be written.
    """
    line = json.dumps(dataclasses.asdict(Quarantined(loader, start, stop, reason))).encode()
    root = location(directory, "directory")
    try:
        store_of(root).append(root / _QUARANTINE_NAME, line)
    except OSError as error:
        raise storage_error(error, root, len(line)) from error


def read_quarantine(directory: str | os.PathLike[str] | ObjectPath) -> list[Quarantined]:
    """Return what :func:`record_quarantine` noted.

    A line that a killed writer left unfinished is passed over: that its units have no prediction is found without it.

    Raises:
        PredictionStorageError: The file cannot be read.
    """
    path = location(directory, "directory") / _QUARANTINE_NAME
    try:
        lines = store_of(path).read(path).splitlines()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise storage_error(error, path.parent) from error
    found = []
    for line in filter(None, lines):
        try:
            note = parse_object(line)
            start = integer(note["start"], "start")
            stop = integer(note["stop"], "stop", low=start)
            found.append(Quarantined(integer(note["loader"], "loader"), start, stop, str(note["reason"])))
        except (ValueError, KeyError, RecursionError):
            continue
    return found


def _refuse_another_job(root: Location, existing: Manifest, wanted: Manifest) -> None:
    differences = compare(existing, wanted)
    for loader, (old, new) in enumerate(zip(existing.loaders, wanted.loaders, strict=False)):
        differences += _changed_shards(loader_directory(root, loader), old, new)
    if differences:
        raise JobMismatchError(
            f"{root} holds the predictions of another job:\n  " + "\n  ".join(differences) + "\nUse another output "
            "directory, or remove this one to start afresh.",
            differences,
        )


def _changed_shards(directory: Location, old: LoaderLayout, new: LoaderLayout) -> list[str]:
    """What has become of the shards of a stream, in one line, where it can be told."""
    digests = [layout.identity.get("shards") for layout in (old, new)]
    if digests[0] == digests[1]:
        return []
    lists = [ShardList.load(directory, digest) for digest in digests if isinstance(digest, str)]
    if len(lists) < len(digests) or lists[0] is None or lists[1] is None:
        return []
    return [lists[0].differences(lists[1])]


def _holds_parts(root: Location) -> bool:
    try:
        loaders = store_of(root).folders(root, loader_directory(root, 0).name.rstrip("0"))
        return any(PartJournal(root / name).done() for name in loaders)
    except OSError as error:
        raise storage_error(error, root) from error


def _with_end(root: Location, loader: int, layout: LoaderLayout) -> LoaderLayout:
    if layout.num_shards is not None:
        return layout.with_ends(PartJournal(loader_directory(root, loader)).shard_ends())
    if layout.num_units is not None:
        return layout
    end = read_sealed(loader_directory(root, loader) / _END_NAME)
    if end is None:
        return layout
    try:
        return layout.with_num_units(integer(end.get("num_units"), "num_units"))
    except ValueError as error:
        raise CorruptPartError(
            f"{loader_directory(root, loader) / _END_NAME} does not tell an end: {error}."
        ) from error
