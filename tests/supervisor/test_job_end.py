"""What an output directory tells of the end of a job."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lightning_gpuorch.predictions import LoaderLayout, Manifest, PartStore, StoredBatch
from lightning_gpuorch.predictions.storage.journal import loader_directory
from lightning_gpuorch.predictions.storage.manifest import open_or_create, set_num_units
from lightning_gpuorch.supervisor.job_end import recorded_exit_code, what_is_lacking
from lightning_gpuorch.telemetry.events.log import EventLog


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
