"""Jobs over streams of shards: complete, in order, and each byte of the source read once, whatever dies on the way."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_gpuorch.errors import EXIT_DATA_MISSING, MissingPredictionsError
from lightning_gpuorch.predictions.reading.reader import read_predictions
from tests.conftest import Runner, gpuorch_run

SHARDS = 6
EXPECTED = [row for shard in range(SHARDS) for row in range(1000 * shard, 1000 * shard + (37 * shard) % 90)]
ROW_BYTES = 512


def read_in(directory: Path) -> int:
    """What was read of a source, by all processes of all runs."""
    return sum(map(int, (directory / "notes.txt").read_text().split()))


def run(runner: Runner, *arguments: object, devices: int = 2, code: int = 0) -> object:
    """The rows that were predicted, in their order."""
    options = ("shards.py", "--devices", devices, *arguments)
    return runner.run(*options, timeout=170, launcher=gpuorch_run(devices), code=code).result


def test_four_replicas_read_each_byte_once_and_another_number_goes_on(runner: Runner, tmp_path: Path) -> None:
    source, damaged = tmp_path / "source", tmp_path / "source" / "shard-4.damaged"
    source.mkdir()
    damaged.touch()
    options = ("--directory", source, "--output", tmp_path / "out")
    finished = runner.run(
        "shards.py", "--devices", 4, *options, timeout=170, launcher=gpuorch_run(4), code=EXIT_DATA_MISSING
    )
    assert read_in(source) == ROW_BYTES * len(EXPECTED)
    assert "shard 4 (" in finished.output
    assert "shard-4.bin) cannot be read any further than its first 56 samples" in finished.output
    with pytest.raises(MissingPredictionsError, match="not read to their end: shards 4") as raised:
        read_predictions(tmp_path / "out")
    assert len(raised.value.indices) == 1
    predictions = read_predictions(tmp_path / "out", allow_missing=True)
    there = [int(row[0]) // 2 for batch in predictions if batch is not None for row in batch]
    assert there == [row for row in EXPECTED if row // 1000 != 4 or row < 4056]
    damaged.unlink()
    assert run(runner, *options, devices=1) == EXPECTED
    assert read_in(source) == ROW_BYTES * (len(EXPECTED) + (37 * 4) % 90), "shard 4 alone is read again"


@pytest.mark.parametrize("extra", [(), ("--dynamic", "--workers", 2)])
def test_a_shard_whose_replica_dies_is_entered_by_another(
    runner: Runner, tmp_path: Path, extra: tuple[object, ...]
) -> None:
    rows = run(runner, "--directory", tmp_path / "source", "--dies", tmp_path / "died", "--at", 4, *extra)
    assert rows == EXPECTED
    assert (tmp_path / "died").exists()
    again = read_in(tmp_path / "source") // ROW_BYTES - len(EXPECTED)
    assert again < len(EXPECTED) // 2, "only shards that were not read to their end"


def test_the_ranks_of_a_group_read_the_same_shards_and_give_up_the_same(runner: Runner, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "shard-4.damaged").touch()
    run(
        runner, "--tp", 2, "--workers", 1, "--dynamic", "--directory", source, "--output", tmp_path / "out",
        code=EXIT_DATA_MISSING,
    )  # fmt: skip
    predictions = read_predictions(tmp_path / "out", allow_missing=True)
    there = [int(row[0]) // 2 for batch in predictions if batch is not None for row in batch]
    assert there == [row for row in EXPECTED if row // 1000 != 4 or row < 4056]


@pytest.mark.parametrize(
    ("kind", "package"),
    [("web_dataset", "webdataset"), ("hugging_face", "datasets"), ("lit_data", "litdata"), ("arrow", "pyarrow")],
)
def test_shards_of_known_libraries(runner: Runner, tmp_path: Path, kind: str, package: str) -> None:
    pytest.importorskip(package)
    source = tmp_path / "source"
    source.mkdir()
    if kind == "lit_data":  # whose writer waits for other ranks where it finds some
        from litdata.streaming.writer import BinaryWriter

        writer = BinaryWriter(str(source / "litdata"), chunk_size=30)
        for index, row in enumerate(EXPECTED):
            writer[index] = {"x": row}
        writer.done()
        writer.merge(1)
    assert run(runner, "--kind", kind, "--directory", source, "--workers", 1) == EXPECTED
    if kind != "arrow":  # whose reader is not ours to note in
        assert len((source / "notes.txt").read_text().split()) == len(EXPECTED), "each sample is read once"
