"""Streams that shard themselves by rank: complete, in order, or refused; never a part of the data and exit code 0."""

import importlib.util
import sys
from pathlib import Path

import pytest

from lightning_gpuorch.errors import EXIT_CONFIGURATION, InputMismatchError
from lightning_gpuorch.predictions.reading.reader import read_predictions
from tests.conftest import SCRIPTS, gpuorch_run

LENGTH = 61
OWN = [
    "ByEnvironment",
    "ByLocalRank",
    "ByProcessGroup",
    "ByProcessGroupUnasked",
    "ByImportedFunctions",
    "ByRankZeroOnly",
    "ByTrainer",
    "numbers",
]


def in_worker_order(workers):
    """Batches of 4 from each worker in turn, each of which reads every n-th number."""
    if workers < 2:
        return list(range(LENGTH))
    shares = [list(range(worker, LENGTH, workers)) for worker in range(workers)]
    batches = [[share[start : start + 4] for start in range(0, len(share), 4)] for share in shares]
    rounds = max(map(len, batches))
    return [row for number in range(rounds) for share in batches if number < len(share) for row in share[number]]


@pytest.mark.parametrize(("devices", "tp"), [(2, 1), (2, 2)])
def test_a_stream_that_asks_for_its_rank_while_it_is_read_is_told_that_it_is_alone(runner, devices, tp):
    result = runner.run(
        "sharded_streams.py", "--devices", devices, "--tp", tp, "--kinds", *OWN, "--workers", 0, 2,
        timeout=170, launcher=gpuorch_run(devices),
    ).result  # fmt: skip
    for kind in OWN:
        assert result[f"{kind}-0"] == list(range(LENGTH)), kind
        assert result[f"{kind}-2"] == in_worker_order(0 if kind == "numbers" else 2), kind


def test_the_same_with_dynamic_batching_and_after_a_death(runner, tmp_path):
    result = runner.run(
        "sharded_streams.py", "--kinds", "ByEnvironment", "ByTrainer", "--workers", 0, 2, "--dynamic", "--dies", "yes",
        "--directory", tmp_path, timeout=170, launcher=gpuorch_run(),
    ).result  # fmt: skip
    for kind in ("ByEnvironment", "ByTrainer"):
        assert result[f"{kind}-0"] == list(range(LENGTH)), kind
        assert result[f"{kind}-2"] == in_worker_order(2), kind


def test_under_torchrun_a_stream_is_told_that_it_is_alone(runner):
    torchrun = (str(Path(sys.executable).with_name("torchrun")), "--nproc-per-node=2", "--standalone")
    result = runner.run("sharded_streams.py", "--kinds", *OWN, timeout=170, launcher=torchrun).result
    for kind in OWN:
        assert result[f"{kind}-0"] == list(range(LENGTH)), kind


def test_a_stream_that_was_built_for_its_rank_ends_the_job_and_names_both_ranks(runner, tmp_path):
    finished = runner.run(
        "sharded_streams.py", "--kinds", "BuiltWithRank", "--output", tmp_path / "out",
        timeout=120, launcher=gpuorch_run(), code=EXIT_CONFIGURATION,
    )  # fmt: skip
    assert "rank 1 has read something else as the first batch of the stream than rank 0" in finished.output.replace(
        "rank 0 has read something else as the first batch of the stream than rank 1",
        "rank 1 has read something else as the first batch of the stream than rank 0",
    )
    assert "remove what splits it by rank" in finished.output
    with pytest.raises(InputMismatchError, match="cannot be trusted"):
        read_predictions(tmp_path / "out" / "BuiltWithRank-0")


@pytest.mark.parametrize(
    ("kind", "package"),
    [
        ("hugging_face", "datasets"),
        ("web_dataset", "webdataset"),
        ("web_dataset_unsplit", "webdataset"),
        ("stateful", "torchdata"),
    ],
)
def test_streams_of_known_libraries_are_complete_and_as_on_one_device(runner, tmp_path, kind, package):
    pytest.importorskip(package)
    arguments = ("sharded_streams.py", "--kinds", kind, "--workers", 0, 2, "--directory")
    alone = runner.run(*arguments, tmp_path / "one", "--devices", 1, timeout=120, launcher=gpuorch_run(1)).result
    for rows in alone.values():
        assert sorted(rows) == list(range(LENGTH))
    for extra in ((), ("--dies", "yes")):
        both = runner.run(*arguments, tmp_path / f"two{len(extra)}", *extra, timeout=120, launcher=gpuorch_run()).result
        assert both == alone


def test_litdata_streams_are_complete_and_as_on_one_device(runner, tmp_path):
    if importlib.util.find_spec("litdata") is None:
        pytest.skip("litdata is not installed")
    made = (
        "import sys, litdata; sys.path.insert(0, sys.argv[2])\n"
        "from sharded_streams import litdata_row\n"
        "if __name__ == '__main__':\n"
        f"    litdata.optimize(fn=litdata_row, inputs=list(range({LENGTH})), output_dir=sys.argv[1], num_workers=1, "
        "chunk_size=10, verbose=False)\n"
    )
    script = tmp_path / "make.py"
    script.write_text(made)
    for workers in (0, 2):
        runner.run(str(script), tmp_path / f"litdata-{workers}" / "litdata", SCRIPTS, timeout=120)
    arguments = ("sharded_streams.py", "--kinds", "litdata", "--workers", 0, 2, "--directory", tmp_path)
    alone = runner.run(*arguments, "--devices", 1, timeout=120, launcher=gpuorch_run(1)).result
    for rows in alone.values():
        assert sorted(rows) == list(range(LENGTH))
    for extra in ((), ("--dies", "yes")):
        assert runner.run(*arguments, *extra, timeout=120, launcher=gpuorch_run()).result == alone
