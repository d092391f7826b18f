"""Parquet parts of whole jobs: read by others while the job runs, whole after a kill and a resume, joined by their key."""

import json
import time

import pytest

from lightning_gpuorch import read_predictions
from tests.conftest import gpuorch_run

pq = pytest.importorskip("pyarrow.parquet")
JOB = "parquet_job.py"


def _rows(output):
    paths = sorted((output / "dataloader_0").glob("part-*.parquet"))
    return pq.ParquetDataset(paths).read().to_pydict() if paths else {"row": []}


def test_others_read_the_parts_of_a_running_job_and_after_a_kill_and_a_resume_of_all(runner, tmp_path):
    process = runner.start(JOB, "--output", "out", "--kill", "--step", 0.2, launcher=gpuorch_run())
    deadline = time.monotonic() + 120
    while not 12 <= len(seen := _rows(tmp_path / "out")["row"]) < 200:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert len(set(seen)) == len(seen)
    assert not (tmp_path / "out" / "dataloader_0" / "_files.json").exists()
    process.terminate()
    assert runner.wait(process) in (75, 0)
    finished = runner.run(JOB, "--output", "out", "--kill", launcher=gpuorch_run())
    assert finished.result == {"right": True, "type": ["embedding", "label"]}
    rows = _rows(tmp_path / "out")
    assert rows["row"] == rows["index"] == list(range(200))
    assert rows["id"] == [f"id-{i}" for i in range(200)]
    assert rows["url"] == [f"https://example/{i}" for i in range(200)]
    assert rows["embedding"] == [[float(i), 2.0 * i, 3.0 * i] for i in range(200)]
    assert rows["label"] == [f"l{i % 3}" for i in range(200)]
    files = json.loads((tmp_path / "out" / "dataloader_0" / "_files.json").read_text())["files"]
    assert sum(file["rows"] for file in files) == 200
    assert read_predictions(tmp_path / "out").verify() == 200


def test_with_dynamic_batching_rows_are_those_of_their_samples(runner, tmp_path):
    assert runner.run(JOB, "--output", "out", "--dynamic", "--step", 0, launcher=gpuorch_run()).result["right"]
    rows = _rows(tmp_path / "out")
    assert rows["id"] == [f"id-{i}" for i in range(200)]
    assert [row[0] for row in rows["embedding"]] == [float(i) for i in range(200)]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--key", "uid"), "there is no column 'uid' in the batches of the dataset; there are 'id', 'url', 'x'"),
        (("--equal-keys", "2", "--samples", "8"), "key_column='id' is not unique: 'id-1' of samples 1 and 2"),
        (("--equal-keys", "20", "--samples", "40"), "key_column='id' is not unique: 'id-19' of samples 19 and 20"),
        (("--columns", "row"), "['row'] cannot be kept"),
    ],
)
def test_a_column_that_is_not_there_or_not_unique_is_named(runner, arguments, told):
    finished = runner.run(JOB, "--output", "out", *arguments, "--devices", 1, launcher=gpuorch_run(1), code=78)
    assert told in finished.output
    assert "restarting replica" not in finished.output


FAILING = ("--raising", 5, 18, "--unreadable", 7, 20, 21, 22, 23, "--samples", 40, "--step", 0, "--on-error", "record")


@pytest.mark.parametrize("output_format", ["parquet", "gpq"])
@pytest.mark.parametrize("dynamic", [(), ("--dynamic",)])
def test_failed_samples_are_rows_with_their_error_and_are_not_tried_again(runner, tmp_path, output_format, dynamic):
    command = (JOB, "--output", "out", "--format", output_format, *FAILING, *dynamic)
    assert runner.run(*command, launcher=gpuorch_run()).result["right"]
    found = read_predictions(tmp_path / "out")
    assert [(error.index, error.type, error.message.partition(" (")[0]) for error in found.errors] == [
        (5, "ValueError", "sample 5 cannot be computed"),
        (7, "OSError", "file 7 is broken"),
        (18, "ValueError", "sample 18 cannot be computed"),
        *((i, "OSError", f"file {i} is broken") for i in range(20, 24)),
    ]
    assert len(found) == 10
    assert found[5] is None, "all of it has failed"
    assert found[1]["label"] == ["l1", "l0"]
    assert found.verify() == 40
    batches = (tmp_path / "batches.txt").read_text()
    assert runner.run(*command, launcher=gpuorch_run()).result["right"]
    assert (tmp_path / "batches.txt").read_text() == batches, "the job is complete"
    if output_format == "parquet":
        rows = _rows(tmp_path / "out")
        assert sorted(rows["index"]) == list(range(40))
        at = rows["index"].index(18)
        assert (rows["error_type"][at], rows["embedding"][at], rows["id"][at]) == ("ValueError", None, None)
        assert [rows["error_type"].count(kind) for kind in ("ValueError", "OSError", None)] == [2, 5, 33]


def test_more_errors_than_are_allowed_end_the_job(runner):
    finished = runner.run(JOB, "--output", "out", *FAILING, "--most", 3, launcher=gpuorch_run(), code=65)
    assert "max_errored_samples=3" in finished.output
