"""Out-of-memory errors in a job of several processes."""

from __future__ import annotations

from pathlib import Path

from lightning_gpuorch import read_predictions
from lightning_gpuorch.errors import EXIT_DATA_MISSING
from tests.conftest import Runner


def test_every_replica_halves_and_the_result_is_whole(runner: Runner, tmp_path: Path) -> None:
    result = runner.run("oom_halving.py", "--devices", 2, "--output", tmp_path / "out").result
    assert result["batches"] == 13
    assert result["first"] == [float(i) for i in range(100)]
    assert result["sum"] == [2 * i + 0.5 for i in range(100)]
    assert result["ooms"] >= 1, "of all ranks: one may have done everything"


def test_samples_that_do_not_fit_alone_are_named_and_the_others_are_there(runner: Runner, tmp_path: Path) -> None:
    out = tmp_path / "out"
    ended = runner.run("oom_halving.py", "--devices", 2, "--output", out, "--too-large", 17, 64, code=EXIT_DATA_MISSING)
    assert "17, 64" in ended.output
    predictions = read_predictions(out, allow_missing=True)
    assert list(predictions.missing) == [17, 64]
    kept = [value for batch in predictions for value in batch["first"]]
    assert kept == [float(i) for i in range(100) if i not in (17, 64)]
