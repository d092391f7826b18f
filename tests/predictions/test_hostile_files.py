"""Files that another program has made, checksums right: read or refused with the project's own error, in bounded time.

``python -m tests.fuzz_files`` does the same for an hour, with every kind of file.
"""

from __future__ import annotations

import contextlib
import json
import random
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_gpuorch.cli.predictions import verify
from lightning_gpuorch.control.coordinator import Coordinator
from lightning_gpuorch.control.messages.base import Sender
from lightning_gpuorch.control.messages.leases import JobOpened, OpenJob
from lightning_gpuorch.errors import CorruptPartError, GPUOrchError
from lightning_gpuorch.predictions import LoaderLayout, Manifest, PartStore, StoredBatch, read_predictions
from lightning_gpuorch.predictions.storage.journal import loader_directory
from lightning_gpuorch.predictions.storage.manifest import load, open_or_create
from lightning_gpuorch.predictions.storage.part_file import Envelope, encode_envelope
from tests.fuzz_files import fuzz
from tests.support import mutations

pytestmark = [pytest.mark.filterwarnings("ignore")]  # numpy and torch warn of much that nobody would write

VALUES: list[Any] = [
    torch.arange(6.0).reshape(2, 3), {"a": [1, 2, {"b": (3,)}], 2: {4, 5}}, ["word"] * 20, [True] * 17,
    torch.eye(3).to_sparse(),
]  # fmt: skip
RAW = b"".join(encode_envelope({"chunk": 0, "metadata": {}, "batches": []}, VALUES).buffers)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak of memory is read from /proc")
def test_a_thousand_changes_of_every_kind_of_file() -> None:
    findings = fuzz("suite", range(1500))
    assert findings.changes == 1500
    assert not findings.problems, findings.summary()
    assert min(findings.outcomes["read"], findings.outcomes["refused"]) > 300, findings.summary()


@pytest.mark.slow
@given(st.randoms(use_true_random=False))
@settings(max_examples=200)
def test_a_changed_part_gives_values_or_the_projects_error(rng: random.Random) -> None:
    raw = mutations.change_part(rng, RAW)
    with contextlib.suppress(GPUOrchError):
        envelope = Envelope(raw, "part")
        for position in range(envelope.num_predictions):
            envelope.prediction(position)


@given(st.randoms(use_true_random=False))
@settings(max_examples=100)
def test_a_changed_manifest_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, rng: random.Random) -> None:
    directory = tmp_path_factory.mktemp("job")
    open_or_create(directory, MANIFEST)
    path = directory / "manifest.json"
    path.write_bytes(mutations.change_sealed(rng, path.read_bytes()))
    with contextlib.suppress(GPUOrchError):
        load(directory)
        read_predictions(directory, allow_missing=True)


# --- A real directory, with bad parts of every kind ---------------------------------------------------------------------

MANIFEST = Manifest(
    loaders=[LoaderLayout(unit="sample", num_units=80, batch_size=4, chunk_size=4, identity={"dataset": "d"})],
    created=1.7e9,
)


def forge(path: Path, **changes: Any) -> None:
    """Change sections of a part, and sign it."""
    part = mutations.Part(path.read_bytes())
    for name, change in changes.items():
        setattr(part, name, change(getattr(part, name)))
    path.write_bytes(part.signed())


def make_pipe(path: Path) -> None:
    path.unlink()
    mutations.os.mkfifo(path)


def make_link(path: Path) -> None:
    kept = path.with_name("kept")
    path.rename(kept)
    path.symlink_to(kept)


def make_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


BAD: dict[str, Any] = {
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-3]),
    "flipped": lambda path: path.write_bytes(path.read_bytes()[:-3] + b"abc"),
    "empty": lambda path: path.write_bytes(b""),
    "huge without content": lambda path: mutations.os.truncate(path, 2**40),
    "pipe": make_pipe,
    "link": make_link,
    "directory": make_directory,
    "another chunk": lambda path: forge(path, fields=lambda fields: {**fields, "chunk": 77}),
    "metadata": lambda path: forge(path, fields=lambda fields: {**fields, "metadata": []}),
    "batches": lambda path: forge(path, fields=lambda fields: {**fields, "batches": 3}),
    "claims": lambda path: forge(
        path,
        fields=lambda fields: {
            **fields, "batches": [{"first_unit": 0, "size": 4, "indices": {"start": -(2**62), "stop": 2**62}}],
        },
    ),
    "structure": lambda path: forge(path, structure=lambda _: {"no": "list"}),
    "fewer predictions": lambda path: forge(path, structure=lambda _: []),
    "columns": lambda path: forge(path, entries=lambda _: {"0": {"dtype": "F32", "shape": [4], "data_offsets": [0, 999]}}),
}  # fmt: skip
"""What can be told without the packages that predictions are made of: a job that goes on sets it aside."""
UNDECODABLE: dict[str, Any] = {
    "shape": lambda path: forge(path, entries=lambda _: {"0": {"dtype": "F32", "shape": [9], "data_offsets": [0, 16]}}),
    "range in a set": lambda path: forge(path, structure=lambda _: [["set", ["range", 0, 2**50, 1]]]),
    "unknown node": lambda path: forge(path, structure=lambda _: [["pickle", "x"]]),
}


@pytest.fixture
def job(tmp_path: Path) -> Path:
    open_or_create(tmp_path, MANIFEST)
    store = PartStore(loader_directory(tmp_path, 0))
    for chunk in range(20):
        start = 4 * chunk
        store.commit(chunk, [StoredBatch(start, list(range(start, start + 4)), 4, torch.arange(4.0) + start)], {})
    return tmp_path


def spoil(job: Path, kinds: dict[str, Any]) -> dict[int, str]:
    """Make every second part bad; returns which, and how."""
    store, spoilt = PartStore(loader_directory(job, 0)), {}
    for number, (kind, change) in enumerate(kinds.items()):
        change(store.path(number))
        spoilt[number] = kind
    return spoilt


def test_a_job_that_goes_on_sets_bad_parts_aside_and_keeps_the_others(job: Path) -> None:
    spoilt = spoil(job, BAD)
    coordinator = Coordinator(1)
    request = OpenJob(
        sender=Sender(rank=0, replica=0, generation=0), job=0, directory=str(job), storage_options={}, ephemeral=False,
        manifest=MANIFEST.to_dict(), part_bytes=2**26, part_seconds=30.0, resume_check="all",
    )  # fmt: skip
    opened = coordinator.handle(request).result(60)
    assert isinstance(opened, JobOpened)
    assert opened.resumed_chunks == 20 - len(spoilt)
    store = PartStore(loader_directory(job, 0))
    assert store.done() == set(range(20)) - spoilt.keys(), [spoilt[chunk] for chunk in store.done() & spoilt.keys()]
    aside = {path.name for path in store.directory.glob("*.damaged")}
    assert aside == {f"{store.path(chunk).name}.damaged" for chunk in spoilt}
    for chunk in spoilt:  # what was computed in their place
        start = 4 * chunk
        store.commit(chunk, [StoredBatch(start, list(range(start, start + 4)), 4, torch.arange(4.0) + start)], {})
    assert torch.cat(list(read_predictions(job))).tolist() == list(range(80))


def test_verify_names_all_bad_parts(job: Path) -> None:
    readable = {
        kind: change for kind, change in BAD.items() if kind in ("flipped", "structure", "fewer predictions", "columns")
    }
    spoilt = spoil(job, {**readable, **UNDECODABLE})
    done = CliRunner().invoke(verify, [str(job)])
    assert done.exit_code == 1
    for chunk, kind in spoilt.items():
        assert f"part-{chunk:09d}.gpq" in done.output, kind
    assert f"part-{len(spoilt):09d}" not in done.output


@pytest.mark.parametrize("kind", [*BAD, *UNDECODABLE])
def test_verify_names_a_bad_part_of_any_kind(job: Path, kind: str) -> None:
    {**BAD, **UNDECODABLE}[kind](PartStore(loader_directory(job, 0)).path(7))
    done = CliRunner().invoke(verify, [str(job)])
    assert done.exit_code == 1
    assert "part-000000007.gpq" in done.output
    assert not isinstance(done.exception, Exception) or isinstance(done.exception, SystemExit)


# --- Claims that are larger than the file -------------------------------------------------------------------------------


def test_a_manifest_may_claim_more_batches_than_memory_holds(job: Path) -> None:
    raw = json.loads((job / "manifest.json").read_text())
    raw["loaders"][0].update(num_units=2**61, batch_size=1)
    (job / "manifest.json").write_bytes(mutations.seal(raw))
    with pytest.raises(CorruptPartError, match="fewer bytes"):
        read_predictions(job, allow_missing=True)
    with pytest.raises(GPUOrchError, match="missing"):
        read_predictions(job)


def envelope_of(structure: bytes) -> Envelope:
    part = mutations.Part(RAW)
    part.structure_text = lambda _: structure
    return Envelope(part.signed(), "part")


@pytest.mark.parametrize(
    "structure",
    [
        b"[[" + b"[[[],[]],[]]," * 700_000 + b"0]]", b'[["x",' + b"[" * 200 + b"[1,[2]]," * 1_000_000 + b"0" + b"]" * 202,
        b"[[" + b'{"":{"":{}}},' * 700_000 + b"0]]",
    ],
)  # fmt: skip
def test_json_that_would_take_much_more_memory_than_bytes_is_refused_before_it_is_parsed(structure: bytes) -> None:
    tracemalloc.start()
    try:
        envelope = envelope_of(structure)
        with pytest.raises(CorruptPartError, match="in memory"):
            envelope.prediction(0)
        assert tracemalloc.get_traced_memory()[1] < 12 * len(structure)
    finally:
        tracemalloc.stop()


def test_text_may_hold_any_number_of_brackets() -> None:
    code = '[{"a": [1, 2]}, "\\\\"]' * 300_000
    assert envelope_of(json.dumps([code]).encode()).prediction(0) == code


def test_file_names_that_are_no_utf_8_come_back() -> None:
    names = {Path("/data/\udce9t\udce9"): 1, Path("/data/\ud7ff"): 2}
    assert Envelope(b"".join(encode_envelope({}, [names, "x"]).buffers), "part").prediction(0) == names
    assert envelope_of(b'["\\uDCE9", ["list", []]]').prediction(0) == "\udce9"


def test_ranges_of_scattered_samples_take_no_memory_by_their_length(tmp_path: Path) -> None:
    layout = LoaderLayout(unit="scattered", num_units=2**40, batch_size=2**30, chunk_size=1)
    open_or_create(tmp_path, Manifest(loaders=[layout], created=1.7e9))
    store = PartStore(loader_directory(tmp_path, 0))
    for rank in range(8):
        start = rank * 2**27  # each overlaps the next by half
        store.commit(rank, [StoredBatch(0, [0], 1, rank)], {})
        entry = {"first_unit": start, "size": 2**28, "indices": {"start": start, "stop": start + 2**28}}
        forge(store.path(rank), fields=lambda fields, entry=entry: {**fields, "batches": [entry]})
    tracemalloc.start()
    try:
        found = read_predictions(tmp_path, allow_missing=True)
        assert [(len(units), units[0]) for units in found.missing.ranges] == [(2**40 - 9 * 2**27, 9 * 2**27)]
        assert found.indices[9 * 2**27 - 1] == 9 * 2**27 - 1
        assert tracemalloc.get_traced_memory()[1] < 2**25
    finally:
        tracemalloc.stop()


def test_keys_with_equal_hashes_are_refused() -> None:
    prime = 2**61 - 1
    raw = b"".join(encode_envelope({}, [{number * prime: 0 for number in range(1, 1000)}]).buffers)
    with pytest.raises(CorruptPartError, match="999 keys have the same hash"):
        Envelope(raw, "part").prediction(0)


def test_tables_whose_values_take_no_bytes_are_refused_and_others_come_back() -> None:
    nulls = pa.FixedSizeListArray.from_arrays(pa.nulls(2**24), 2**24)
    again = pa.ListViewArray.from_arrays(
        pa.array([0] * 5000, pa.int32()), pa.array([5000] * 5000, pa.int32()), pa.array(range(5000), pa.int16())
    )
    view = struct.pack("<i4sii", 100_000, b"xxxx", 0, 0)
    buffers = [None, pa.py_buffer(view * 2000), pa.py_buffer(b"x" * 100_000)]
    text = pa.Array.from_buffers(pa.string_view(), 2000, buffers)
    for hostile in (nulls, again, text):
        raw = b"".join(encode_envelope({}, [pa.table({"a": hostile})]).buffers)
        assert len(raw) < 2**18
        with pytest.raises(CorruptPartError, match=r"bytes for \d+ values"):
            Envelope(raw, "part").prediction(0)
    plain = pa.table(
        {
            "list": [[1, 2], None], "fixed": pa.array([[1, 2], [3, 4]], pa.list_(pa.int8(), 2)),
            "struct": [{"a": "x"}, {"a": None}],
            "dictionary": pa.array(["u", "v"]).dictionary_encode(), "view": pa.array(["p", "q" * 40], pa.string_view()),
            "runs": pa.RunEndEncodedArray.from_arrays(pa.array([1, 2], pa.int32()), pa.array([5, 6])),
            "map": pa.array([[("k", 1)], []], pa.map_(pa.string(), pa.int8())), "null": [None, None],
        }
    )  # fmt: skip
    back = Envelope(b"".join(encode_envelope({}, [plain]).buffers), "part").prediction(0)
    assert back.equals(plain)
