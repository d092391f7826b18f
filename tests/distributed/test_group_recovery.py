"""Faults inside of a tensor-parallel group, in jobs of real processes."""

from __future__ import annotations

from pathlib import Path

from lightning_gpuorch import read_predictions
from lightning_gpuorch.errors import EXIT_DATA_MISSING
from tests.benchmarks.group_recovery import KINDS, campaigns, on_ranks
from tests.conftest import Runner


def test_one_rank_out_of_memory_cut_off_and_late_and_nothing_is_restarted(runner: Runner) -> None:
    faults = ["connection:16:2", "late:40:1"]
    result = runner.run("tp_faults.py", "--tp", 2, "--budget", "--timeout", 3, "--faults", *faults).result
    assert result["difference"] < 1e-5
    assert result["order"]
    assert result["batches"] == 8
    first, second = result["ranks"]
    assert first == second
    assert first["generation"] == 0
    assert first["ooms"] >= 2
    assert first["splits"] == 8
    assert first["recoveries"] == first["ooms"] + 3


def test_a_sample_that_does_not_fit_alone_is_given_up_by_all_ranks_together(runner: Runner, tmp_path: Path) -> None:
    out = tmp_path / "out"
    ended = runner.run("tp_faults.py", "--tp", 2, "--too-large", 17, "--output", out, code=EXIT_DATA_MISSING)
    assert "no prediction for 1 samples: 17 " in ended.output
    assert "restarting" not in ended.output
    predictions = read_predictions(out, allow_missing=True)
    assert list(predictions.missing) == [17]
    assert [i for batch in predictions for i in batch["index"].tolist()] == [i for i in range(60) if i != 17]


def test_communication_that_fails_again_and_again_restarts_the_replica(runner: Runner) -> None:
    ended = runner.run("tp_faults.py", "--tp", 2, "--faults", "connection:16:3")
    assert ended.result["difference"] < 1e-5
    assert ended.result["order"]
    assert [rank["generation"] for rank in ended.result["ranks"]] == [1, 1]
    assert "2 tries in place did not help" in ended.output


def test_a_bug_on_one_rank_is_not_retried_and_the_other_rank_says_whose_it_is(runner: Runner) -> None:
    ended = runner.run("tp_faults.py", "--tp", 2, "--restarts", 0, "--faults", "bug:16:1", code=1)
    assert "PeerFailedError: the step failed on rank 1: RuntimeError: shapes do not match" in ended.output
    assert "Traceback" in ended.output
    assert "44 units missing: 16-59" in ended.output


def test_a_small_campaign_of_faults_anywhere() -> None:
    """Its large sister is ``python -m tests.benchmarks.group_recovery campaign``."""
    by_rank = on_ranks(3, campaigns, 8, KINDS, 1, timeout_seconds=170)
    for results in zip(*by_rank, strict=True):
        for result in results:
            assert result["equal"] == result["injected"] == result["cut"] == 8
            assert result["checksum"] == results[0]["checksum"]
            assert result["recoveries"] == results[0]["recoveries"] >= 8
            assert result["unfinished_works"] == 0
            assert result["end"]["threads"] <= result["start"]["threads"]
            assert result["end"]["descriptors"] <= result["start"]["descriptors"]
