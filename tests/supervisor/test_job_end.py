"""What an output directory tells of the end of a job."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from lightning_gpuorch.config import OrchestratorConfig
from lightning_gpuorch.control.client import NodePlace
from lightning_gpuorch.control.messages.base import Sender
from lightning_gpuorch.control.messages.leases import OpenJob
from lightning_gpuorch.errors import ControlPlaneError, NodeRankTakenError
from lightning_gpuorch.predictions import LoaderLayout, Manifest, PartStore, StoredBatch
from lightning_gpuorch.predictions.storage.journal import loader_directory
from lightning_gpuorch.predictions.storage.manifest import open_or_create, set_num_units
from lightning_gpuorch.supervisor.job_end import recorded_exit_code, what_is_lacking
from lightning_gpuorch.supervisor.rendezvous import Rendezvous
from lightning_gpuorch.telemetry.events.log import EventLog
from tests.conftest import free_port


def _record(kind: str, **fields: object) -> None:
    """Nobody reads the events here."""


def _job(directory: Path) -> PartStore:
    sampled = LoaderLayout(unit="sample", num_units=12, batch_size=4, chunk_size=4, identity={})
    stream = LoaderLayout(unit="batch", num_units=None, batch_size=None, chunk_size=2, identity={})
    open_or_create(directory, Manifest(loaders=[sampled, stream]))
    store = PartStore(loader_directory(directory, 0))
    for chunk in range(3):
        store.commit(chunk, [StoredBatch(4 * chunk, None, 4, torch.zeros(4))], {})
    streamed = PartStore(loader_directory(directory, 1))
    streamed.commit(0, [StoredBatch(unit, None, None, 0) for unit in range(2)], {})
    set_num_units(directory, 1, 2)
    return store


def test_a_job_of_which_nothing_is_missing_has_ended_well(tmp_path: Path) -> None:
    _job(tmp_path)
    assert what_is_lacking(str(tmp_path), None) is None


def test_a_sample_that_was_given_up_is_lacking(tmp_path: Path) -> None:
    store = _job(tmp_path)
    store.discard(1)
    store.commit(1, [StoredBatch(4, None, 3, torch.zeros(3), [4, 5, 7])], {})
    assert "lacks 4 of 12" in str(what_is_lacking(str(tmp_path), None))


def test_a_later_predict_call_counts(tmp_path: Path) -> None:
    _job(tmp_path)
    _job(tmp_path / "predict-1").discard(2)
    assert "predict-1/dataloader_0 lacks 4 of 12" in str(what_is_lacking(str(tmp_path), None))


@pytest.mark.parametrize("harm", ["no directory", "no manifest", "manifest", "end of the stream"])
def test_a_directory_that_does_not_tell_is_no_success(tmp_path: Path, harm: str) -> None:
    root = tmp_path / "out"
    _job(root)
    if harm == "no directory":
        root.rename(tmp_path / "elsewhere")
    elif harm == "no manifest":
        (root / "manifest.json").unlink()
    elif harm == "manifest":
        (root / "manifest.json").write_text("{}")
    else:
        (root / "dataloader_1" / "end.json").unlink()
    assert what_is_lacking(str(root), None)


def test_the_exit_code_of_a_run_is_that_of_node_0(tmp_path: Path) -> None:
    events = tmp_path / "runs" / "run-1" / "events"
    assert recorded_exit_code(str(tmp_path), "run-1", None) is None
    for source, code in (("supervisor", 65), ("supervisor-1", 1)):
        log = EventLog(events, source)
        log.record("run", run_id="run-1")
        assert recorded_exit_code(str(tmp_path), "run-1", None) == (65 if code == 1 else None)
        log.record("end", exit_code=code)
        log.close()
    assert recorded_exit_code(str(tmp_path), "run-1", None) == 65
    assert recorded_exit_code(str(tmp_path), "run-2", None) is None


@pytest.mark.parametrize("recorded", [None, 0, 65])
def test_a_node_that_has_lost_node_0_ends_with_the_exit_code_that_it_has_recorded(
    tmp_path: Path, recorded: int | None
) -> None:
    out, config = tmp_path / "out", OrchestratorConfig(token="secret", lease_term_sec=1.0)
    port = free_port()
    first, second = (
        Rendezvous(config, NodePlace(2, node, "127.0.0.1", port), 1, f"run-{node + 1}", tmp_path, None, _record)
        for node in range(2)
    )
    try:
        with ThreadPoolExecutor(1) as pool:
            joining = pool.submit(first.join)
            second.join()
            joining.result(30)
        manifest = Manifest(loaders=[LoaderLayout(unit="sample", num_units=4, batch_size=4, chunk_size=4)]).to_dict()
        request = OpenJob(
            sender=Sender(rank=0, replica=0, generation=0), job=0, directory=str(out), storage_options={},
            ephemeral=False, manifest=manifest, part_bytes=2**26, part_seconds=30.0, resume_check="all",
        )  # fmt: skip
        assert first.coordinator is not None
        first.coordinator.handle(request).result(30)
        assert second.state(fresh=True).records == str(out)
    finally:
        for node in (second, first):
            node.stop_watching()
            node.close()
    if recorded is not None:
        log = EventLog(out / "runs" / "run-1" / "events", "supervisor")
        log.record("end", exit_code=recorded)
        log.close()
    expected = 1 if recorded is None else recorded
    assert second.code_without_coordinator(ControlPlaneError("the coordinator is silent")) == expected
    assert second.code_without_coordinator(NodeRankTakenError("another one has it")) == 78
