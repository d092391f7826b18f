"""Parts, manifests and notes in an object store: a real S3 server, with and without a proxy that answers badly."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DataLoader

from lightning_gpuorch import read_predictions
from lightning_gpuorch.cli import gpuorch
from lightning_gpuorch.control.jobs import remove_ephemeral
from lightning_gpuorch.errors import (
    ConfigurationError,
    CorruptPartError,
    GPUOrchError,
    JobMismatchError,
    PredictionStorageError,
)
from lightning_gpuorch.paths import ObjectPath, location
from lightning_gpuorch.predictions import LoaderLayout, Manifest, PartStore, StoredBatch, check_writable
from lightning_gpuorch.predictions.storage import object_store
from lightning_gpuorch.predictions.storage.fragments import FragmentReader, FragmentWriter
from lightning_gpuorch.predictions.storage.journal import loader_directory, remove_fragments
from lightning_gpuorch.predictions.storage.manifest import (
    load,
    open_or_create,
    read_quarantine,
    record_mismatch,
    record_quarantine,
    set_num_units,
)
from lightning_gpuorch.predictions.storage.resume import set_right
from lightning_gpuorch.predictions.storage.stores import store_of
from lightning_gpuorch.pytorch import GPUOrchStrategy
from lightning_gpuorch.worker import session
from tests.support.object_store import FaultyProxy, S3Server, bucket, environment_of, one_bucket, proxy, s3_server

__all__ = ["bucket", "one_bucket", "proxy", "s3_server"]

pytest.importorskip("obstore")


def layout(num_units: int | None = 8) -> LoaderLayout:
    return LoaderLayout(unit="sample", num_units=num_units, batch_size=2, chunk_size=4, identity={"length": 8})


def batches(chunk: int, value: float = 1.0) -> list[StoredBatch]:
    first = chunk * 4
    return [
        StoredBatch(start, list(range(start, start + 2)), 2, torch.tensor([start, start + 1.0]) * value)
        for start in (first, first + 2)
    ]


@pytest.fixture(params=["memory", "s3"])
def directory(request: pytest.FixtureRequest) -> ObjectPath:
    """A prefix in a memory, and in a bucket of a server."""
    if request.param == "memory":
        return _location(f"memory://{os.urandom(8).hex()}/a/b")
    server: S3Server = request.getfixturevalue("s3_server")
    return _location(request.getfixturevalue("bucket") + "/a b/%20?#ü", server.endpoint)


def _location(url: str, endpoint: str = "http://127.0.0.1:1", **options: str) -> ObjectPath:
    given = {"endpoint": endpoint, "access_key_id": "any", "secret_access_key": "any", "region": "us-east-1", **options}
    found = location(url, "url", given)
    assert isinstance(found, ObjectPath)
    return found


def write_job(root: ObjectPath, chunks: Sequence[int] = (0, 1)) -> None:
    open_or_create(root, Manifest(loaders=[layout()]))
    store = PartStore(loader_directory(root, 0))
    for chunk in chunks:
        assert store.commit(chunk, batches(chunk), {"run": "r"})


def values(predictions: Any) -> list[float]:
    return [float(v) for batch in predictions for v in batch]


def test_a_job_is_written_read_and_taken_up_again(directory: ObjectPath) -> None:
    write_job(directory)
    assert values(read_predictions(directory)) == list(range(8))
    store = PartStore(loader_directory(directory, 0))
    assert store.done() == {0, 1}
    assert store.is_durable(1)
    assert not store.is_durable(2)
    assert not store.commit(1, batches(1, 3.0), {"run": "other"}), "the first has won"
    assert values(read_predictions(directory)) == list(range(8))
    assert open_or_create(directory, Manifest(loaders=[layout()])).loaders[0] == layout()
    with pytest.raises(JobMismatchError, match=r"number of samples: 8 there, 10 here"):
        open_or_create(directory, Manifest(loaders=[layout(10)]))
    store.discard(1)
    assert store.done() == {0}
    names = set(store_of(directory).names(directory))
    assert names == {"manifest.json"}, "the trial of the beginning leaves nothing"


def test_parts_without_a_manifest_are_somebody_elses(directory: ObjectPath) -> None:
    PartStore(loader_directory(directory, 0)).commit(0, batches(0), {})
    with pytest.raises(JobMismatchError, match=r"holds predictions and no manifest\.json"):
        open_or_create(directory, Manifest(loaders=[layout()]))


def test_notes_and_marks(directory: ObjectPath) -> None:
    open_or_create(directory, Manifest(loaders=[layout(None)]))
    for start in (3, 5):
        record_quarantine(directory, 0, start, start + 1, "it is bad")
    assert [(entry.start, entry.stop) for entry in read_quarantine(directory)] == [(3, 4), (5, 6)]
    assert set_num_units(directory, 0, 8).loaders[0].num_units == 8
    assert set_num_units(directory, 0, 8).loaders[0].num_units == 8
    with pytest.raises(JobMismatchError, match="ended after 6 batches here and after 8 elsewhere"):
        set_num_units(directory, 0, 6)
    record_mismatch(directory, "they differ.")
    with pytest.raises(GPUOrchError, match="cannot be trusted"):
        load(directory)


def test_damage_is_found_and_set_aside(directory: ObjectPath) -> None:
    write_job(directory)
    store = PartStore(loader_directory(directory, 0))
    path = store.path(1)
    raw = bytearray(store.store.read(path))
    raw[len(raw) // 2] ^= 1
    store.store.replace(path, bytes(raw))
    with pytest.raises(CorruptPartError, match="part-000000001"):
        values(read_predictions(directory))
    assert [chunk for chunk, error in store.verify() if error] == [1]
    assert len(set_right(store, layout(), "all")[0]) == 1
    assert store.done() == {0}
    assert f"{path.name}.damaged" in set(store.store.names(store.directory))
    empty = store.path(0)
    store.store.replace(empty, b"")
    with pytest.raises(CorruptPartError, match="ends after 0 bytes"):
        store.header(0)


def test_fragments_are_found_by_whoever_goes_on(directory: ObjectPath) -> None:
    open_or_create(directory, Manifest(loaders=[layout()]))
    writer = FragmentWriter(directory, 0, "samples")
    for batch in batches(0):
        writer.add(batch, {0})
    writer.write()
    reader = FragmentReader(directory, 0, "samples")
    assert reader.has_any(look_again=True)
    found = list(reader.find(range(4)))
    assert torch.equal(torch.cat([batch.output for batch in found]), torch.arange(4.0))
    writer.on_durable(0)
    assert not FragmentReader(directory, 0, "samples").has_any(look_again=True)
    writer.add(batches(1)[0], {1})
    writer.write()
    remove_fragments(directory)
    assert not FragmentReader(directory, 0, "samples").has_any(look_again=True)


def test_large_parts_go_up_in_pieces_and_are_created_once_too(
    directory: ObjectPath, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(object_store, "MULTIPART_BYTES", 2**20)
    store = PartStore(directory / "dataloader_0")
    big = torch.arange(5 * 2**20 / 4 + 3)  # more than one piece of the least size, and not a multiple of it
    assert store.commit(0, [StoredBatch(0, None, 1, [big, big[:5]])], {"run": "a"})
    assert not store.commit(0, [StoredBatch(0, None, 1, [big + 1])], {"run": "b"})
    assert torch.equal(store.read(0).output(0)[0], big)
    assert list(store_of(directory).names(store.directory / ".uploads")) == [], "nothing is left of the way it went"
    assert store.sweep_temporaries(0.0) == 0


def test_of_racing_writers_one_wins(s3_server: S3Server, bucket: str) -> None:
    root = _location(bucket + "/race", s3_server.endpoint)
    for chunk in range(3):
        won: list[int] = []
        start = threading.Barrier(4)

        def write(number: int, chunk: int = chunk, won: list[int] = won, start: Any = start) -> None:
            start.wait(30)
            if PartStore(root / "dataloader_0").commit(chunk, batches(chunk, number), {"run": str(number)}):
                won.append(number)

        threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert len(won) == 1
        assert PartStore(root / "dataloader_0").read(chunk).metadata["run"] == str(won[0])


class Once:
    """A rule that does something to the first requests of a kind."""

    def __init__(self, fault: str, *, method: str = "PUT", count: int = 1, part: str = "part-"):
        self.fault, self.method, self.left, self.part = fault, method, count, part

    def __call__(self, method: str, path: str) -> str | None:
        if method != self.method or self.part not in path or not self.left:
            return None
        self.left -= 1
        return self.fault


@pytest.fixture
def behind(proxy: FaultyProxy, bucket: str) -> ObjectPath:
    """A prefix that is reached through the proxy, by a client of little patience with one request."""
    return _location(bucket + "/x", proxy.endpoint, timeout="1s")


@pytest.mark.parametrize("fault", ["500", "503", "500 after", "lost", "hang", "dead"])
def test_whatever_happens_to_a_commit_it_ends_right(proxy: FaultyProxy, behind: ObjectPath, fault: str) -> None:
    store = PartStore(behind / "dataloader_0")
    proxy.rule = Once(fault, count=2)
    assert store.commit(0, batches(0), {"run": "mine"}), "it was ours, whether the first answer told so or not"
    assert proxy.done == [fault] * 2
    proxy.rule = Once(fault)
    assert not store.commit(0, batches(0, 2.0), {"run": "other"}), "it was theirs, whatever the answers"
    assert store.read(0).metadata["run"] == "mine"


@pytest.mark.parametrize("fault", ["500", "lost", "slow", "dead"])
def test_reads_and_lists_outlive_bad_answers(proxy: FaultyProxy, behind: ObjectPath, fault: str) -> None:
    write_job(behind)
    for method in ("GET", "HEAD"):
        proxy.rule = Once(fault, method=method, count=3, part="")
        assert values(read_predictions(behind)) == list(range(8))
        assert PartStore(behind / "dataloader_0").is_durable(0)
    assert proxy.done.count(fault) >= 4


def test_an_answer_lost_in_the_commit_of_a_large_part(
    proxy: FaultyProxy, behind: ObjectPath, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(object_store, "MULTIPART_BYTES", 2**20)
    store = PartStore(behind / "dataloader_0")
    big = torch.arange(2.0**19)
    for number, rule in enumerate((
        Once("500", part="uploads"), Once("lost", method="POST", part="part-", count=2), Once("lost", part="partNumber")
    )):  # fmt: skip
        proxy.rule = rule
        assert store.commit(number, [StoredBatch(0, None, 1, big + number)], {"run": "mine"})
        assert rule.left == 0
        assert torch.equal(store.read(number).output(0), big + number)


def test_a_store_that_ignores_conditions_is_refused_by_name(proxy: FaultyProxy, behind: ObjectPath) -> None:
    proxy.rule = lambda method, path: "unconditional" if method == "PUT" else None
    with pytest.raises(ConfigurationError, match=rf"{behind}: this store takes no conditional put"):
        open_or_create(behind, Manifest(loaders=[layout()]))
    assert load(behind) is None, "nothing was begun"


def test_a_store_without_conditional_copies_gets_large_parts_whole(
    proxy: FaultyProxy, behind: ObjectPath, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(object_store, "MULTIPART_BYTES", 2**20)
    proxy.rule = lambda method, path: "unconditional" if method == "POST" else None
    store = PartStore(behind / "dataloader_0")
    assert store.commit(0, [StoredBatch(0, None, 1, torch.arange(2.0**19))], {"run": "a"})
    assert not store.commit(0, [StoredBatch(0, None, 1, torch.arange(2.0**19))], {"run": "b"})
    assert store.read(0).metadata["run"] == "a"


def test_what_is_wrong_with_a_bucket_is_said_before_work_starts(s3_server: S3Server, bucket: str) -> None:
    wanted = Manifest(loaders=[layout()])
    with pytest.raises(PredictionStorageError, match=r"s3://no-such-bucket/x: there is no such bucket"):
        open_or_create(_location("s3://no-such-bucket/x", s3_server.endpoint), wanted)
    with pytest.raises(ConfigurationError, match="names no bucket"):
        location("s3://", "output_dir")
    with pytest.raises(ConfigurationError, match="'endpoit' is not valid"):
        check_writable(_location("s3://bucket/x", endpoit="http://127.0.0.1"))
    with pytest.raises(PredictionStorageError, match="there is no such bucket"):
        read_predictions(_location("s3://no-such-bucket/x", s3_server.endpoint))
    with pytest.raises(ConfigurationError, match="holds no predictions"):
        read_predictions(_location(f"{bucket}/nothing", s3_server.endpoint))


def test_a_store_that_denies_access_is_refused_with_the_remedy(proxy: FaultyProxy, behind: ObjectPath) -> None:
    proxy.rule = lambda method, path: "403" if method == "PUT" else None
    with pytest.raises(PredictionStorageError, match=r"the store denies access \(403 AccessDenied.*storage_options"):
        open_or_create(behind, Manifest(loaders=[layout()]))


def test_an_endpoint_where_nothing_listens_ends_in_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(object_store, "_FIRST_CONTACT_SECONDS", 0.5)
    with pytest.raises(PredictionStorageError, match=r"s3://b/x cannot be accessed: .*127\.0\.0\.1:1"):
        open_or_create(_location("s3://b/x"), Manifest(loaders=[layout()]))


def _in_a_fork(root: ObjectPath, answers: Any) -> None:
    try:
        answers.put(values(read_predictions(root)))
    except GPUOrchError as error:
        answers.put(str(error))


@pytest.mark.slow
@pytest.mark.parametrize(("method", "expected"), [("fork", "spawn or forkserver"), ("spawn", [0.0, 1.0])])
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_other_processes_can_read_but_a_fork_says_why_not(
    s3_server: S3Server, bucket: str, method: str, expected: Any
) -> None:
    root = _location(bucket, s3_server.endpoint)
    open_or_create(root, Manifest(loaders=[layout(2)]))
    PartStore(root / "dataloader_0").commit(0, batches(0)[:1], {})
    context: Any = multiprocessing.get_context(method)
    answers = context.Queue()
    process = context.Process(target=_in_a_fork, args=(root, answers))
    process.start()
    try:
        answer = answers.get(timeout=120)
    finally:
        process.join(30)
    assert answer == expected if isinstance(expected, list) else expected in answer


def test_predictions_can_be_sent_and_options_are_not_shown(s3_server: S3Server, bucket: str) -> None:
    root = _location(bucket, s3_server.endpoint)
    write_job(root)
    assert values(pickle.loads(pickle.dumps(read_predictions(root)))) == list(range(8))
    assert "any" not in repr(root) + str(root)
    assert str(root / "a").endswith("/a")


@pytest.fixture
def in_the_environment(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    for name, value in environment_of(s3_server.endpoint).items():
        monkeypatch.setenv(name, value)
    return lambda text: monkeypatch.setenv("GPUORCH_STORAGE_OPTIONS", text)


def test_the_command_line_takes_urls(bucket: str, tmp_path: Any, in_the_environment: Callable[[str], None]) -> None:
    url = f"{bucket}/job"
    in_the_environment('{"timeout": "20s"}')
    write_job(location(url, "url", {}))  # type: ignore[arg-type]
    runner = CliRunner()
    verified = runner.invoke(gpuorch, ["predictions", "verify", url])
    assert verified.exit_code == 0, verified.output
    assert "8 samples read and intact" in verified.output
    assert "0: tensor(0.)" in runner.invoke(gpuorch, ["predictions", "show", url]).output
    target = tmp_path / "out.jsonl"
    assert runner.invoke(gpuorch, ["predictions", "export", url, str(target)]).exit_code == 0
    assert len(target.read_text().splitlines()) == 8
    assert "creates an object once only" in runner.invoke(gpuorch, ["doctor", "--output-dir", url]).output
    PartStore(location(url, "url", {}) / "dataloader_0").discard(1)
    incomplete = runner.invoke(gpuorch, ["predictions", "verify", url])
    assert incomplete.exit_code == 1
    assert "4 missing: 4-7" in incomplete.output
    in_the_environment("{")
    assert "GPUORCH_STORAGE_OPTIONS cannot be read" in runner.invoke(gpuorch, ["predictions", "verify", url]).output


class Double(LightningModule):
    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return batch * 2


def predict(strategy: GPUOrchStrategy, root: Any) -> Any:
    session.leave()
    quiet: Any = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)
    trainer = Trainer(accelerator="cpu", devices=1, strategy=strategy, default_root_dir=root, **quiet)
    return trainer.predict(Double(), DataLoader(torch.arange(6.0), batch_size=4))


def test_a_trainer_takes_options_and_keeps_what_nobody_asked_for_until_its_end(
    bucket: str, s3_server: S3Server, tmp_path: Any, in_the_environment: Callable[[str], None]
) -> None:
    options = {"endpoint": s3_server.endpoint, "timeout": "30s"}
    predicted = predict(GPUOrchStrategy(output_dir=f"{bucket}/asked", storage_options=options), tmp_path)
    assert values(predicted) == [0.0, 2.0, 4.0, 6.0, 8.0, 10.0]
    assert values(read_predictions(f"{bucket}/asked", storage_options=options)) == values(predicted)
    root = location(f"{bucket}/root", "root", options)
    strategy = GPUOrchStrategy(storage_options=options)
    assert values(predict(strategy, str(root))) == values(predicted)
    assert store_of(root).holds_anything(root / "gpuorch")
    assert strategy.runtime.world.coordinator is not None
    remove_ephemeral(strategy.runtime.world.coordinator.jobs)  # as the process does at its end
    assert not store_of(root).holds_anything(root / "gpuorch"), "it is removed, as a directory of the machine is"
    with pytest.raises(ConfigurationError, match="storage_options is a dict; expected an object of names and texts"):
        GPUOrchStrategy(storage_options={"secret_access_key": b"not text"})


def test_lengths_of_parts_come_with_one_listing(proxy: FaultyProxy, behind: ObjectPath) -> None:
    store = PartStore(behind / "dataloader_0")
    for chunk in range(5):
        assert store.commit(chunk, batches(chunk), {})
    asked: list[str] = []
    proxy.rule = lambda method, path: asked.append(method)
    assert list(store.sizes_bytes()) == [store.store.size_bytes(store.path(chunk)) for chunk in range(5)]
    assert asked == ["GET", *["HEAD"] * 5]
